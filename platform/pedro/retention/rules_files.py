"""Which files may go: caches of this host, half-written ones, checkpoints, data sets, uploads, copies of backbones."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.config import BACKBONES, UPLOADS, backbones_folder
from pedro.errors import NotFoundError
from pedro.retention.finding import Finding
from pedro.retention.policy import LEFTOVER_S
from pedro.retention.view import DATASET, leftover
from pedro.stored_files import GONE, StoredPart, part, parts, remove
from pedro.training.storage import join, read_text

if TYPE_CHECKING:
    from pedro.retention.view import View

HALF = (".loading-", ".rows-", ".new-", ".up-")  # what others write beside its place before they rename it
HALF_DATABASES = ("mlflow.db.new", "mlflow.db.new-journal", "mlflow.db.upgraded")
MAX_LOG_BYTES = 10 << 20
DEPTH = 4  # of folders in which something may be half written or half removed


def leftovers(view: View) -> Iterator[Finding]:
    """What a process that was killed left behind: half removed goes at once, half written after a day."""
    places = [str(view.settings.cache), str(view.settings.home / "artifacts"), str(view.settings.home / "sweeps")]
    for place in [*places, view.settings.storage]:
        for found in _hidden(place, DEPTH):
            yield _left(view, found)
    for found in parts(str(backbones_folder(view.settings.home))):
        if found.name.startswith(".") and ".new-" in found.name:
            yield _left(view, found)
    for name in HALF_DATABASES:
        half = part(str(view.settings.home / name))
        if half is not None:
            yield _left(view, half)


def _left(view: View, found: StoredPart) -> Finding:
    if leftover(found):
        reason = "its removal was broken off"
        return Finding("leftovers", found.name, found.bytes, reason, partial(_gone, found.location))
    return view.by_age("leftovers", found, LEFTOVER_S, "written to")


def _hidden(place: str, depth: int) -> Iterator[StoredPart]:
    if "://" in place or not Path(place).is_dir():  # a storage behind a URL takes files whole
        return
    for entry in sorted(Path(place).iterdir()):
        if entry.name.startswith((GONE, *HALF)):
            found = part(str(entry))
            if found is not None:
                yield found
        elif depth > 1 and entry.is_dir() and not entry.is_symlink():
            yield from _hidden(str(entry), depth - 1)


def adapter_cache(view: View) -> Iterator[Finding]:
    """This host's copies of adapters: of versions that are gone, or that nobody loaded for long."""
    cached = parts(str(view.registry.adapter_cache))  # listed first: a copy is made of what the store has
    there = {view.registry.cached(digest, run).name for digest, run in view.store.content_in_use()}
    for found in cached:
        if not found.name.startswith("."):
            gone = found.name not in there
            finding = view.by_age("adapter cache", found, 0.0 if gone else view.policy.cache_s, "used")
            yield finding if not (gone and finding.goes) else _because(finding, "its version is gone")


def data_cache(view: View) -> Iterator[Finding]:
    """This host's tokenised rows and fetched files."""
    for found in [*parts(str(view.settings.cache)), *parts(str(view.settings.cache / "fetched"))]:
        if found.name.startswith(".") or found.name in ("adapters", "fetched"):
            continue
        yield view.by_age("data cache", found, view.policy.cache_s, "used")


def checkpoints(view: View) -> Iterator[Finding]:
    """Checkpoints of jobs and trials that have ended, and Ray Tune's own records of sweeps."""
    for place in ("runs", "tune"):
        for found in parts(join(view.settings.storage, place)):
            if not leftover(found):
                owner = view.owner_of(found.name)
                stays = view.needs_files(owner)
                finding = view.by_age("checkpoints", found, view.policy.checkpoints_s, "written to", stays)
                yield replace(finding, remove=finding.remove and partial(_unless_open, view, owner, finding.remove))


def _unless_open(view: View, owner: str, remove: Callable[[], bool]) -> bool:
    """Remove files of a job unless it was queued again since it was looked at."""
    if seen := view.jobs.get(owner):
        with suppress(NotFoundError):
            now = view.store.get_job(owner)
            if (now.status, now.attempt) != (seen.record.status, seen.record.attempt):
                return False
    return remove()


def datasets(view: View) -> Iterator[Finding]:
    """Data files that no job, sweep, version or upload names any more."""
    for found in parts(join(view.settings.storage, "datasets")):
        if leftover(found) or found.name.startswith("."):
            continue
        match = DATASET.match(f"datasets/{found.name}")
        who = view.named_data.get(match[1]) if match else None
        stays = f"{who} names it" if who else ""
        yield view.by_age("datasets", found, view.policy.datasets_s, "put there or named", stays)


def uploads(view: View) -> Iterator[Finding]:
    """Uploaded files whose time is over, and contents that no row names (an upload that was broken off)."""
    rows = view.store.stored_files()
    for file in rows:
        if file.expires is None or file.expires >= view.now:
            reason = "it does not expire" if file.expires is None else "it has not expired"
            yield Finding("uploads", file.id, file.bytes, reason)
            continue
        yield Finding("uploads", file.id, file.bytes, "it has expired", partial(_forget_file, view, file.id))
    named = {view.place_of(file) for file in rows}
    for folder in parts(join(view.settings.storage, UPLOADS)):
        for found in parts(folder.location):
            if not leftover(found) and found.location not in named:
                yield view.by_age("uploads", found, LEFTOVER_S, "written to")


def logs(view: View) -> Iterator[Finding]:
    """The controller's log, which begins anew where it has grown too long; those of requests do so by themselves."""
    path = view.settings.home / "logs" / "controller.log"
    found = part(str(path))
    if found is not None:
        long = found.bytes > MAX_LOG_BYTES
        reason = f"{'more than' if long else 'at most'} {MAX_LOG_BYTES >> 20} MiB"
        yield Finding("logs", found.name, found.bytes, reason, partial(_emptied, path) if long else None)


def backbone_copies(view: View) -> Iterator[Finding]:
    """Copies of backbones in the storage that another one of the same name took the place of."""
    root = join(view.settings.storage, BACKBONES)
    if view.settings.storage == str(view.settings.home):  # then these are the backbones themselves
        return
    for found in parts(root):
        if found.name.endswith(".json"):
            current = json.loads(read_text(found.location) or "{}").get("folder", "")
            name = found.name.removesuffix(".json")
            for copy in parts(join(root, name)):
                stays = "its name means it" if current.rstrip("/").endswith(f"{name}/{copy.name}") else ""
                yield view.by_age("backbones", copy, view.policy.cache_s, "written to", stays)


def _forget_file(view: View, file_id: str) -> bool:
    """The row first, which decides; its content unless another row has the same."""
    try:
        location = view.store.forget_file(file_id, view.now)
    except NotFoundError:  # its time was made longer meanwhile
        return False
    if location is not None:
        remove(view.in_storage(location))
    return True


def _emptied(path: Path) -> bool:
    os.truncate(path, 0)  # who writes appends
    return True


def _gone(location: str) -> bool:
    remove(location)
    return True


def _because(finding: Finding, reason: str) -> Finding:
    return Finding(finding.kind, finding.name, finding.bytes, reason, finding.remove)
