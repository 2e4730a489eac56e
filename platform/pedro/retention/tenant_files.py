"""The files of one tenant: in the storage, in this home, in MLflow. Listed by what names them, removed one by one.

What several tenants have in common, a data set that another one's job names too, is nobody's and stays.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.config import UPLOADS
from pedro.data.dataset import SOURCE
from pedro.registry.purge import (
    experiments_of,
    kept_runs,
    models_of,
    purge_experiment,
    purge_model,
    purge_run,
    run_bytes,
)
from pedro.retention.finding import Finding
from pedro.retention.view import DATASET, data_of, leftover
from pedro.stored_files import GONE, StoredPart, part, parts, remove
from pedro.training.storage import join, read_text
from pedro.training.sweep.records import BY_SPEC

if TYPE_CHECKING:
    from pedro.retention.view import View

MASK = b"x"


@dataclass
class TenantFiles:
    """What there is of a tenant outside the database, as one run of the erasure sees it."""

    view: View
    tenant: str

    def findings(self) -> Iterator[Finding]:
        """Everything, what names other things last."""
        yield from self._mlflow()
        yield from self._work()
        yield from self._data()
        yield from self._caches()
        yield from self._uploads()
        yield from self._logs()
        yield from self._records()

    @cached_property
    def owners(self) -> set[str]:
        """Ids of the tenant's jobs and sweeps, from the rows, the specs in the storage and the sweeps' records."""
        rows = {job_id for job_id, job in self.view.jobs.items() if job.record.tenant == self.tenant}
        sweeps = {sweep for sweep, record in self.view.sweeps.items() if record.spec["base"]["tenant"] == self.tenant}
        return rows | sweeps | {job for job, spec in self._specs.items() if spec.get("tenant") == self.tenant}

    @cached_property
    def _specs(self) -> dict[str, dict[str, object]]:
        """Resolved specs of jobs in the storage."""
        found = {}
        for folder in parts(join(self.view.settings.storage, "jobs")):
            text = read_text(join(folder.location, "spec.json"))
            if text is not None:
                found[folder.name] = json.loads(text)
        return found

    def _mlflow(self) -> Iterator[Finding]:
        registry = self.view.registry
        for name in sorted(models_of(registry, self.tenant)):
            yield Finding("models", name, 0, "", partial(_done, partial(purge_model, registry, name)))
        names = experiments_of(registry, self.tenant)
        for run in kept_runs(registry, names):
            yield Finding("runs", run.id, run_bytes(run), "", partial(purge_run, registry, run))
        for name in sorted(names):
            yield Finding("experiments", name, 0, "", partial(purge_experiment, registry, name))
        folder = self.view.settings.home / "artifacts"
        for found in parts(str(folder)):  # of an experiment that MLflow forgot before its folder went
            if found.name == self.tenant or found.name.startswith(f"{self.tenant}."):
                yield _file("artifacts", found)

    def _work(self) -> Iterator[Finding]:
        """Checkpoints and Ray Tune's records."""
        owners = self.owners
        for place in ("runs", "tune"):
            for found in parts(join(self.view.settings.storage, place)):
                if self.view.owner_of(found.name) in owners or _again_of(found.name, owners):
                    yield _file("checkpoints", found)

    @cached_property
    def named_data(self) -> tuple[set[str], set[str]]:
        """Digests of data sets: those that this tenant names and no other, and those that others name."""
        own: set[str] = set()
        others: set[str] = set()
        for tenant, text in self._texts():
            (own if tenant == self.tenant else others).update(data_of(text, ""))
        return own - others, others

    def _texts(self) -> Iterator[tuple[str, str]]:
        """Every tenant with a text that may name its data."""
        for spec in self._specs.values():
            yield str(spec.get("tenant")), json.dumps(spec)
        for record in self.view.sweeps.values():
            yield record.spec["base"]["tenant"], json.dumps(record.spec)
        for job in self.view.jobs.values():
            yield job.record.tenant, json.dumps(job.record.spec)
        for tenant, _, spec in self.view.store.version_specs():
            yield tenant, json.dumps(spec)
        for file in self.view.store.stored_files():
            yield file.tenant, file.location

    def _data(self) -> Iterator[Finding]:
        own, _ = self.named_data
        for found in parts(join(self.view.settings.storage, "datasets")):
            match = DATASET.match(f"datasets/{found.name}")
            if match and match[1] in own:
                yield _file("datasets", found)

    def _caches(self) -> Iterator[Finding]:
        """This host's: versions that are gone, and rows and files unless they are known to be of others' data."""
        view, (_, others) = self.view, self.named_data
        cached = parts(str(view.registry.adapter_cache))
        there = {view.registry.cached(digest, run).name for digest, run in view.store.content_in_use()}
        for found in cached:
            if found.name not in there:
                yield _file("caches", found)
        for found in parts(str(view.settings.cache)):
            source = _text(Path(found.location) / SOURCE).removeprefix("sha256:")
            if found.name.startswith(("rows-", ".rows-", GONE)) and source not in others:
                yield _file("caches", found)
        for found in parts(str(view.settings.cache / "fetched")):
            match = re.search(r"[0-9a-f]{64}", found.name)
            if match is None or match[0] not in others:
                yield _file("caches", found)

    def _uploads(self) -> Iterator[Finding]:
        view = self.view
        folder = join(view.settings.storage, UPLOADS, self.tenant)
        rows = view.store.stored_files()
        shared = {view.place_of(file) for file in rows if file.tenant != self.tenant}
        own = {view.place_of(file) for file in rows if file.tenant == self.tenant} - shared
        elsewhere = [place for place in sorted(own) if not place.startswith(f"{folder}/") and not DATASET.search(place)]
        for found in map(part, [*elsewhere, folder]):  # with what an upload left that was broken off
            if found is not None:
                yield _file("uploads", found)

    def _logs(self) -> Iterator[Finding]:
        """Lines of logs: overwritten where they stand, since a server or a controller may be writing behind them."""
        log, name = self.view.settings.requests_log, re.escape(self.tenant).encode()
        as_text = rb'\S+ \S+ \S+ %b |(?!\{).*="%b(?:\.[^"]*)?"' % (name, name)
        as_json = rb'\{.*"(?:tenant|model)": "%b(?:\.[^"]*)?"' % name
        of_requests = rb"^(?:%b|%b).*$" % (as_text, as_json)
        jobs = b"|".join(re.escape(owner).encode() for owner in sorted(self.owners))
        of_controller = rb"^.*(?:\(%b\.%b).*$" % (name, b"|" + jobs if jobs else b"")
        for pattern, paths in (
            (of_requests, sorted(log.parent.glob(f"{log.name}*"))),
            (of_controller, sorted(log.parent.glob("controller.log*"))),
        ):
            lines = re.compile(pattern, re.MULTILINE)
            for path in paths:
                count = len(lines.findall(path.read_bytes()))
                if count:
                    yield Finding("log lines", f"{path.name}: {count} lines", 0, "", partial(_mask, path, lines))

    def _records(self) -> Iterator[Finding]:
        """Specs, logs and records of jobs and sweeps, by which all else was found."""
        owners, storage = self.owners, self.view.settings.storage
        for found in parts(join(storage, "jobs")):
            if self.view.owner_of(found.name) in owners or _again_of(found.name, owners):
                yield _file("jobs", found)
        for found in parts(str(self.view.settings.home / "sweeps")):
            if found.name in owners:
                yield _file("sweeps", found)
        for found in parts(join(storage, "sweeps", BY_SPEC)):
            if json.loads(read_text(found.location) or "{}").get("id") in owners:
                yield _file("sweeps", found)
        for found in parts(join(storage, "sweeps")):
            if found.name in owners:
                yield _file("sweeps", found)
        places = [join(storage, place) for place in ("jobs", "runs", "tune", "datasets", "sweeps", UPLOADS)]
        for place in [*places, str(self.view.settings.home / "sweeps")]:
            for found in parts(place):
                if leftover(found):  # of an erasure that was broken off
                    yield _file("leftovers", found)


def _again_of(name: str, owners: set[str]) -> bool:
    """Whether a folder is that of a sweep's trial or of its later drivers."""
    return any(name.startswith((f"{owner}-trial-", f"{owner}-again-")) for owner in owners)


def _file(kind: str, found: StoredPart) -> Finding:
    return Finding(kind, found.name, found.bytes, "", partial(_done, partial(remove, found.location)))


def _done(work: partial[None]) -> bool:
    work()
    return True


def _mask(path: Path, pattern: re.Pattern[bytes]) -> bool:
    """Overwrite the lines that match, byte for byte."""
    with path.open("r+b") as file:
        text = file.read()
        for match in pattern.finditer(text):
            file.seek(match.start())
            file.write(MASK * (match.end() - match.start()))
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
