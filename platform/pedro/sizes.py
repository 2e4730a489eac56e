"""How many bytes a home and its storage hold, by kind: for `pedro doctor` and the metrics. Reads names and sizes only.

Kinds are few and fixed, so that they may be labels. A folder of many files takes seconds: nobody waits for it who
answers requests.
"""

from __future__ import annotations

import time
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING

from pedro.config import BACKBONES, UPLOADS
from pedro.errors import UnavailableError
from pedro.stored_files import parts, total_bytes

if TYPE_CHECKING:
    from pedro.config import Settings

MEASURE_EVERY_S = 300.0
OTHER = "other"
IN_HOME = {
    "pedro.db": "database",
    "mlflow.db": "registry",
    "artifacts": "artifacts",
    BACKBONES: "backbones",
    "comparisons": "comparisons",
    "logs": "logs",
    "ray": "logs",
    "sweeps": "sweeps",
}
IN_CACHE = {"adapters": "adapter_cache"}
IN_STORAGE = {
    "datasets": "datasets",
    "runs": "checkpoints",
    "tune": "checkpoints",
    "jobs": "jobs",
    "sweeps": "sweeps",
    UPLOADS: "uploads",
    BACKBONES: "backbones",
}
DATA_CACHE = "data_cache"
KINDS = tuple(sorted({*IN_HOME.values(), *IN_CACHE.values(), *IN_STORAGE.values(), DATA_CACHE, OTHER}))


def measure(settings: Settings) -> dict[str, int]:
    """Bytes by kind, each of `KINDS`. Raises UnavailableError where the storage does not answer."""
    sizes = dict.fromkeys(KINDS, 0)
    storage = settings.storage
    for name, size in _of_home(settings.home, storage):
        sizes[IN_HOME.get(name.removesuffix("-wal").removesuffix("-shm"), OTHER)] += size
    for found in parts(str(settings.cache)):
        sizes[IN_CACHE.get(found.name, DATA_CACHE)] += found.bytes
    for found in parts(storage):
        sizes[IN_STORAGE.get(found.name, OTHER)] += found.bytes
    return sizes


def _of_home(home: Path, storage: str) -> list[tuple[str, int]]:
    """The home's parts, without the cache and a storage within it, which are measured by themselves."""
    try:
        names = sorted(path.name for path in home.iterdir())
    except OSError:
        return []
    apart = {"cache", *([Path(storage).relative_to(home).parts[0]] if _within(storage, home) else [])}
    return [(name, total_bytes(str(home / name))) for name in names if name not in apart]


def _within(storage: str, home: Path) -> bool:
    return "://" not in storage and storage != str(home) and Path(storage).is_relative_to(home)


class SizeGauges:
    """The last measurement as Prometheus text; `refresh` measures where the last one is old. Thread-safe."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = Lock()
        self._text = ""
        self._due_at = 0.0

    def refresh(self) -> None:
        """Measure, at most every `MEASURE_EVERY_S`. Never on the way of a request."""
        if time.monotonic() < self._due_at or not self._lock.acquire(blocking=False):
            return
        try:
            self._due_at = time.monotonic() + MEASURE_EVERY_S
            sizes = measure(self._settings)
        except UnavailableError:
            return
        finally:
            self._lock.release()
        lines = [f'pedro_stored_bytes{{kind="{kind}"}} {float(size)}' for kind, size in sizes.items()]
        heading = "# HELP pedro_stored_bytes Bytes in the home and the storage, by kind.\n"
        self._text = heading + "# TYPE pedro_stored_bytes gauge\n" + "\n".join(lines) + "\n"

    def text(self) -> str:
        """Empty until something was measured."""
        return self._text
