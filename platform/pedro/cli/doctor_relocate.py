"""`pedro doctor --relocate`: rewrites the paths of a home that was copied or moved, also before anything is opened.

MLflow's rows are put right whenever its registry is opened; this does so now, and then the data sets that specs of jobs
and sweeps name, so that these go on from here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError

if TYPE_CHECKING:
    from pedro.config import Settings

SPECS = ("jobs/*/spec.json", "sweeps/*/sweep.json")
DATASETS = "datasets"


def relocate(settings: Settings) -> str:
    """What was done. Raises ConfigError for a storage that is no folder, PedroError if the registry does not open."""
    from pedro.registry import Registry
    from pedro.training.storage import write_text

    if "://" in settings.storage:
        raise ConfigError(
            f"PEDRO_STORAGE: {settings.storage} means the same from everywhere; a home with a storage of its own is "
            "what can be moved",
            param="PEDRO_STORAGE",
        )
    Registry.open(settings)
    storage, moved = Path(settings.storage), 0
    for path in sorted(found for pattern in SPECS for found in storage.glob(pattern)):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(f"{path}: no JSON ({error}); restore it, or delete its job or sweep") from None
        here = _here(fields, storage / DATASETS)
        if here != fields:
            write_text(str(path), json.dumps(here, indent=1))
            moved += 1
    specs = (
        f"{moved} spec{'s' if moved != 1 else ''} of jobs and sweeps named another home's data"
        if moved
        else "no spec names data that this home has elsewhere"
    )
    rows = "MLflow's rows name its own artifacts; " if settings.tracking_uri.startswith("sqlite:") else ""
    return f"{settings.home}: {rows}{specs}"


def _here(value: Any, datasets: Path) -> Any:
    """The same with the paths of data sets that are here, by their names, which are those of their contents."""
    if isinstance(value, dict):
        return {name: _here(part, datasets) for name, part in value.items()}
    if isinstance(value, list):
        return [_here(part, datasets) for part in value]
    if isinstance(value, str) and value.startswith("/") and Path(value).parent.name == DATASETS:
        own = datasets / Path(value).name
        return str(own) if own.is_file() else value
    return value
