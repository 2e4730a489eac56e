"""Runs and adapter versions in MLflow; the only file that imports it. Knows nothing of tensors or of HTTP.

A registered model is `<tenant>.<adapter>`. A version is immutable: a plain PEFT directory among its run's
artifacts (safetensors, never pickle) and tags that carry its digests, method, spec and metrics. Three aliases
move: `champion` (what the bare name means), `previous` (what rollback returns to) and `candidate` (the newest
version that its gate refused).
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pedro.config import Settings, check_name
from pedro.data.formats import PromptFormat, check_format
from pedro.database import FileWatch, exclusive
from pedro.errors import AdapterError, ConflictError, NotFoundError, UnavailableError, model_not_found
from pedro.moved_home import follow
from pedro.moves import CANDIDATE, CHAMPION, PREVIOUS, aliases_of, finish, move
from pedro.refs import ModelRef
from pedro.secret_files import shown
from pedro.versions import Version, read_version

WHATEVER = -1  # an expected champion that is not compared
MANIFEST = "pedro_adapter.json"
DAMAGED = "adapter_damaged"  # the code of an error that fetching again does not mend
_PAGE = 1000


@dataclass(frozen=True)
class Entry:
    """One registered adapter: its aliases, and when its name was made (ms); made again after a deletion is another."""

    created: int
    aliases: dict[str, int]


class Registry:
    """A connection to one MLflow store. Opening it creates the schema of a new sqlite store (some seconds, once)."""

    def __init__(self, tracking_uri: str, artifact_root: str, cache_dir: Path, database_url: str = "") -> None:
        """`database_url`: whose lock those who move aliases share. Beside an sqlite store it is the store's own."""
        self.tracking_uri = tracking_uri
        own = tracking_uri if tracking_uri.startswith("sqlite:///") else f"sqlite:///{Path(cache_dir) / 'registry'}"
        self._lock = own if own == tracking_uri or not database_url else database_url
        self.artifact_root = artifact_root
        self.cache_dir = Path(cache_dir)
        self._watch = FileWatch()

    @classmethod
    def open(cls, settings: Settings) -> Registry:
        """The registry that the environment names."""
        return cls(settings.tracking_uri, settings.artifact_root, settings.cache, settings.database_url)

    @cached_property
    def client(self) -> Any:
        """MLflow's own client, connected when it is first wanted. Raises UnavailableError."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        from filelock import FileLock

        for name in ("alembic", "mlflow", "mlflow.store.db.utils"):
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            if not self.tracking_uri.startswith("sqlite:///"):
                return _connect(self.tracking_uri)
            database = Path(self.tracking_uri.removeprefix("sqlite:///"))
            database.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{database}.lock"):  # two processes must not both make the schema
                if not database.exists() or not database.stat().st_size:
                    _make_schema(database)
                follow(database, Path(self.artifact_root))
                return _connect(self.tracking_uri)
        except Exception as error:
            remedy = "start it, or unset the variable to use the sqlite store in PEDRO_HOME"
            if self.tracking_uri.startswith("sqlite:"):
                remedy = "is its disk full, or its directory not writable? See PEDRO_HOME and MLFLOW_TRACKING_URI"
            raise UnavailableError(
                f"MLFLOW_TRACKING_URI: no registry answers at {shown(self.tracking_uri)} "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); {remedy}",
                param="MLFLOW_TRACKING_URI",
            ) from error

    # Runs

    def start_run(
        self,
        *,
        experiment: str,
        name: str,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        parent: str | None = None,
    ) -> str:
        """Open a run, under the run `parent` if one is given, and return its id; a process anywhere may `log` to it."""
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            local = self.tracking_uri.startswith("sqlite:")
            location = (Path(self.artifact_root) / experiment).as_uri() if local else None
            with suppress(self.error):  # somebody else was first
                self.client.create_experiment(experiment, artifact_location=location)
            found = self.client.get_experiment_by_name(experiment)
        family = {"mlflow.parentRunId": parent} if parent else {}
        run = self.client.create_run(found.experiment_id, run_name=name, tags={**tags, **family})
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(entries), 100):
            self.client.log_batch(run.info.run_id, params=entries[start : start + 100])
        return run.info.run_id

    def log(self, run_id: str, step: int, metrics: Mapping[str, float]) -> None:
        """Add one point to the curves of a run."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self.client.log_batch(run_id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def tag_run(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        for key, value in tags.items():
            self.client.set_tag(run_id, key, value)

    def log_artifacts(self, run_id: str, directory: str | Path, path: str | None = None) -> None:
        """Copy a directory's files into the run, under `path`."""
        self.client.log_artifacts(run_id, str(directory), path)

    def artifacts(self, run_id: str, path: str, into: Path, of: str = "run") -> Path:
        """Copy what `log_artifacts` put under `path` into a directory; where it is then. AdapterError if it is gone."""
        try:
            return Path(self.client.download_artifacts(run_id, path, str(into)))
        except (self.error, OSError) as error:
            raise AdapterError(f"{of}: its files are gone from the registry's artifact store") from error

    def finish_run(self, run_id: str, status: str = "FINISHED") -> None:
        """Close a run as FINISHED, FAILED or KILLED."""
        self.client.set_terminated(run_id, status)

    def history(self, run_id: str, metric: str) -> list[tuple[int, float]]:
        """One curve of a run: (step, value), in the order of steps."""
        return sorted((point.step, point.value) for point in self.client.get_metric_history(run_id, metric))

    # Versions

    def register(self, run_id: str, directory: str | Path, tenant: str, adapter: str, *, gate: str = "") -> Version:
        """Make the adapter directory the next version of `tenant.adapter`; no alias moves.

        Raises AdapterError, and registers nothing, if it is no whole adapter of known files and finite weights,
        DataError if its prompt's template exceeds its bounds.
        """
        from pedro.methods.adapter_check import check_adapter

        name = _model_name(tenant, adapter)
        manifest = check_adapter(directory)
        if manifest.get("prompt_format"):
            check_format(PromptFormat.from_dict(manifest["prompt_format"]))
        self.client.log_artifacts(run_id, str(directory), "adapter")
        try:
            self.client.create_registered_model(name, tags={"pedro.tenant": tenant, "pedro.adapter": adapter})
        except self.error:  # exists already
            self.client.get_registered_model(name)
        tags = {
            "pedro.digest": manifest["digest"],
            "pedro.manifest_digest": str(manifest.get("manifest_digest") or ""),
            "pedro.backbone": manifest["backbone"]["id"],
            "pedro.backbone_digest": manifest["backbone"]["digest"],
            "pedro.method": manifest["method"]["name"],
            "pedro.trainable_parameters": str(manifest.get("trainable_parameters", 0)),
            "pedro.metrics": json.dumps(manifest.get("metrics") or {}),
            "pedro.spec": json.dumps(manifest.get("spec") or {}),
            "pedro.data_digest": str(manifest.get("data_digest") or ""),
            "pedro.gate": gate,
        }
        made = self.client.create_model_version(name, source=f"runs:/{run_id}/adapter", run_id=run_id, tags=tags)
        return self.get(name, int(made.version))

    def get(self, name: str, which: str | int = CHAMPION) -> Version:
        """A version of `tenant.adapter` by number or alias; NotFoundError (the uniform 404) if there is none."""
        aliases = self._aliases(name)
        number = which if isinstance(which, int) or which.isdigit() else aliases.get(which, 0)
        try:
            return read_version(self.client.get_model_version(name, str(number)), aliases)
        except self.error as error:
            if not _is_missing(error):
                raise UnavailableError("the adapter registry does not answer; try again in a moment") from error
            raise model_not_found(name if which == CHAMPION else f"{name}@{which}") from error

    def find(self, ref: ModelRef) -> Version:
        """The version that `ref` names, the champion where it names none; NotFoundError if there is none such."""
        version = self.get(ref.name, CHAMPION if ref.which is None else ref.which)
        if ref.digest not in ("", version.digest):
            raise model_not_found(str(ref))
        return version

    def versions(self, name: str) -> list[Version]:
        """All versions of `tenant.adapter`, oldest first; empty if there is no such adapter."""
        found = self.pages(self.client.search_model_versions, filter_string=f"name = '{_quotable(name)}'")
        aliases = self._aliases(name)
        return sorted((read_version(entity, aliases) for entity in found), key=lambda version: version.version)

    def models(self, tenant: str | None = None) -> list[str]:
        """Names of the registered adapters, of one tenant or of all."""
        return sorted(name for name in self.catalog() if tenant is None or name.startswith(f"{tenant}."))

    def catalog(self) -> dict[str, Entry]:
        """Every registered adapter with its aliases: the one query that a watcher repeats."""
        models = self.pages(self.client.search_registered_models, filter_string=None)
        return {
            model.name: Entry(created=int(model.creation_timestamp), aliases=aliases_of(model))
            for model in models
            if "pedro.tenant" in model.tags
        }

    def stamp(self) -> object | None:
        """Changes whenever an sqlite store does, at a hundredth of `catalog`'s cost; None for a tracking server.

        Raises UnavailableError where the store is gone.
        """
        if not self.tracking_uri.startswith("sqlite:///"):
            return None
        try:
            return self._watch.stamp(self.tracking_uri.removeprefix("sqlite:///"))
        except (OSError, sqlite3.Error) as error:
            raise UnavailableError("the adapter registry does not answer; try again in a moment") from error

    def set_alias(self, name: str, alias: str, version: int) -> Version:
        """Point `alias` at a version that exists."""
        with self._moving(name):
            self.get(name, version)
            self.client.set_registered_model_alias(name, alias, str(version))
            return self.get(name, version)

    def tag_gate(self, version: Version, gate: str) -> None:
        """Record on a version what its gate decided and why."""
        self.client.set_model_version_tag(version.name, str(version.version), "pedro.gate", gate)

    def promote(self, name: str, version: int, *, expected: int | None = WHATEVER) -> Version:
        """Make a version champion; the champion until now becomes `previous`.

        Raises ConflictError if `expected` is given and the champion is another one by now (None: there is one).
        """
        with self._moving(name) as aliases:
            self.get(name, version)
            champion = aliases.get(CHAMPION)
            if expected not in (WHATEVER, champion):
                now, then = (f"version {n}" if n is not None else "none" for n in (champion, expected))
                raise ConflictError(
                    f"the champion is {now} by now, not {then}; compare {name}:{version} with it and promote it by hand"
                )
            wanted: dict[str, int | None] = {CHAMPION: version}
            if champion is not None and champion != version:
                wanted[PREVIOUS] = champion
            if aliases.get(CANDIDATE) == version:
                wanted[CANDIDATE] = None
            move(self.client, name, wanted)
            return self.get(name, version)

    def rollback(self, name: str, *, expected: int | None = None) -> Version:
        """Swap champion and previous; ConflictError if there is no previous version, or another than `expected`."""
        with self._moving(name) as aliases:
            if not aliases and not self.versions(name):
                raise model_not_found(name)
            if PREVIOUS not in aliases or CHAMPION not in aliases:
                raise ConflictError(
                    f"{name}: no previous version to roll back to; `promote` one of its versions instead"
                )
            if expected not in (None, aliases[PREVIOUS]):
                raise ConflictError(
                    f"{name}: the previous version is {aliases[PREVIOUS]} by now; look, and roll back again"
                )
            self.get(name, aliases[PREVIOUS])
            move(self.client, name, {CHAMPION: aliases[PREVIOUS], PREVIOUS: aliases[CHAMPION]})
            return self.get(name, aliases[PREVIOUS])

    def delete(self, name: str, version: int | None = None) -> None:
        """Delete one version, or the adapter with all of them; the champion alone is refused (ConflictError)."""
        with self._moving(name):
            if version is None:
                if name not in self.catalog():
                    raise model_not_found(name)
                self.client.delete_registered_model(name)
                return
            found = self.get(name, version)
            if CHAMPION in found.aliases:
                raise ConflictError(
                    f"{found.ref} is the champion; promote another version first, or delete all of {name}"
                )
            for alias in found.aliases:
                self.client.delete_registered_model_alias(name, alias)
            self.client.delete_model_version(name, str(version))

    def download(self, version: Version) -> Path:
        """The version's adapter directory on this host, from a cache keyed by its digest and its run.

        The digest covers the weights alone: equal weights may come with another prompt format. Raises AdapterError
        if what the store holds is not what was registered, the prompt format among it.
        """
        target = self.cache_dir / "adapters" / f"{version.digest.removeprefix('sha256:')}-{version.run_id}"
        if (target / MANIFEST).is_file():
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=".loading-", dir=target.parent))
        try:
            source = self.artifacts(version.run_id, "adapter", scratch, of=version.ref)
            manifest = _read_manifest(source)
            sealed = version.manifest_digest or manifest.get("manifest_digest")  # earlier releases recorded none
            if manifest["digest"] != version.digest or manifest.get("manifest_digest") != sealed:
                raise AdapterError(f"{version.ref}: the stored files are not those that were registered", code=DAMAGED)
            try:
                source.rename(target)
            except OSError:  # another process was first with the same content
                if not (target / MANIFEST).is_file():
                    raise
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        return target

    @contextmanager
    def _moving(self, name: str) -> Iterator[dict[str, int]]:
        """Alone among all who move an adapter's aliases: these, after a move that was broken off has been finished."""
        with exclusive(self._lock, name):
            with suppress(self.error):  # no such adapter, as what follows will say
                finish(self.client, self.client.get_registered_model(name))
            yield self._aliases(name)

    def _aliases(self, name: str) -> dict[str, int]:
        """The adapter's aliases; none if there is no such adapter."""
        try:
            return aliases_of(self.client.get_registered_model(name))
        except self.error as error:
            if not _is_missing(error):
                raise UnavailableError("the adapter registry does not answer; try again in a moment") from error
            return {}

    @property
    def error(self) -> Any:
        """What MLflow raises."""
        from mlflow.exceptions import MlflowException

        return MlflowException

    @staticmethod
    def pages(search: Any, **arguments: Any) -> Iterable[Any]:
        """Everything that one of the client's searches finds, page by page."""
        token = None
        while True:
            page = search(max_results=_PAGE, page_token=token, **arguments)
            yield from page
            token = page.token
            if not token:
                return


def _is_missing(error: Any) -> bool:
    return error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")


def _connect(uri: str) -> Any:
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _make_schema(database: Path) -> None:
    """Make an sqlite store whole or not at all: MLflow cannot take up a migration that was broken off."""
    scratch = database.with_name(f"{database.name}.new")
    for left in (scratch, scratch.with_name(f"{scratch.name}-journal")):
        left.unlink(missing_ok=True)
    _connect(f"sqlite:///{scratch}")
    scratch.rename(database)


def _model_name(tenant: str, adapter: str) -> str:
    return ModelRef(check_name("tenant", tenant), check_name("adapter", adapter)).name


def _quotable(name: str) -> str:
    tenant, dot, adapter = name.partition(".")
    if not dot:
        raise NotFoundError(f"{name!r} is no adapter name; expected tenant.adapter", param="model")
    return _model_name(tenant, adapter)


def _read_manifest(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        message = f"{directory.name}: no readable {MANIFEST}, so this is no adapter directory"
        raise AdapterError(message, code=DAMAGED) from error
