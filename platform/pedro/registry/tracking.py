"""Writes runs: parameters, metrics, tags and artifacts, from any process that has the run's id."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from pedro.errors import AdapterError, UnavailableError
from pedro.registry.connection import Connection
from pedro.registry.tags import PARENT, stored

LONGEST_PARAMETER = 6000  # characters, MLflow's bound
_BATCH = 100  # parameters in one request, MLflow's bound


class Tracking(Connection):
    """The half of the registry that training writes to while it runs."""

    def __init__(self, tracking_uri: str, artifact_root: str, server_database: str | None = None) -> None:
        super().__init__(tracking_uri, artifact_root, server_database)
        self._away = threading.Event()  # the last download failed though its files are there, as far as is known
        self._probe = threading.Lock()

    def start_run(
        self,
        *,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        """Open a run, under the run `parent` if one is given, and return its id; any process may write to it."""
        entity = self.client.get_experiment_by_name(experiment)
        if entity is None:
            local = self.tracking_uri.startswith("sqlite:")
            location = (Path(self.artifact_root) / experiment).as_uri() if local else None
            with suppress(self.error):  # somebody else was first
                self.client.create_experiment(experiment, artifact_location=location)
            entity = self.client.get_experiment_by_name(experiment)
        assert entity is not None, f"experiment {experiment} was made and is gone"
        family = {PARENT: parent} if parent else {}
        run = self.client.create_run(entity.experiment_id, run_name=name, tags={**stored(tags), **family})
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:LONGEST_PARAMETER]) for key, value in params.items()]
        for start in range(0, len(entries), _BATCH):
            self.client.log_batch(run.info.run_id, params=entries[start : start + _BATCH])
        run_id: str = run.info.run_id
        return run_id

    def log_metrics(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to each of the metrics' histories."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def tag_run(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in stored(tags).items():
            self.client.set_tag(run_id, key, value)

    def log_artifacts(self, run_id: str, directory: str | Path, path: str | None = None) -> None:
        """Copy a directory's files into the run, under `path`."""
        self.client.log_artifacts(run_id, str(directory), path)

    def download_artifacts(self, run_id: str, path: str, into: Path, of: str = "run") -> Path:
        """Copy what `log_artifacts` put under `path` into a directory; where it is then.

        Raises AdapterError if it is gone, UnavailableError if the store does not answer or the copy cannot be written.
        A store that does not answer keeps a thread for seconds: after a download that failed one thread at a time asks
        whether it does, and until then all others fail at once.
        """
        if self._away.is_set():
            away = f"{of}: the registry's artifact store does not answer; try again later"
            if not self._probe.acquire(blocking=False):
                raise UnavailableError(away)
            try:
                if self._has_artifacts(run_id, path) is None:
                    raise UnavailableError(away)
            finally:
                self._probe.release()
            self._away.clear()
        try:
            return Path(self.client.download_artifacts(run_id, path, str(into)))
        except Exception as error:  # MLflow's, a disk's, or one of a storage's client
            self._away.set()  # first: the next question may take as long
            there = self._has_artifacts(run_id, path)
            if there is not None:
                self._away.clear()
            if there is False:
                raise AdapterError(f"{of}: its files are gone from the registry's artifact store") from error
            why = str(error).partition("\n")[0]
            raise UnavailableError(
                f"{of}: its files could not be copied from the artifact store ({why:.200})"
            ) from error

    def _has_artifacts(self, run_id: str, path: str) -> bool | None:
        """Whether a run has files under `path`; None while the store does not answer."""
        try:
            return bool(self.client.list_artifacts(run_id, path))
        except self.error as error:
            return False if self.is_missing(error) else None
        except Exception:  # noqa: BLE001 (a storage's client raises any type)
            return None

    def reopen_run(self, run_id: str) -> None:
        """Go on with a run that was closed, or whose writer is gone."""
        self.client.update_run(run_id, status="RUNNING")

    def finish_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def metric_history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """One metric of a run: (step, value), in the order of steps."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))
