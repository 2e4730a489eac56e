"""Imports what MLflow's registry held before aliases moved to the store: adapters, their versions, where aliases stood.

Earlier releases moved several aliases by a tag that said where they shall stand (`MOVE`); a move that was broken off
there counts as made, as it did for them.
"""

from __future__ import annotations

import json
import sqlite3
from collections import defaultdict
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.registry.seal import TAG
from pedro.registry.tags import PREFIX
from pedro.registry.versions import TENANT, read_version
from pedro.store import Inherited, Store, Version, exclusive

if TYPE_CHECKING:
    from mlflow.entities.model_registry import RegisteredModel

    from pedro.registry.connection import Connection

MOVE = f"{PREFIX}move"


@dataclass(frozen=True)
class TakenOver:
    """What was new to the store."""

    adapters: int
    versions: int
    refused: tuple[str, ...] = ()
    """Versions that bear no seal of the platform's, and were left out."""


def take_over(
    connection: Connection, store: Store, *, again: bool = False, sealed: Callable[[Version, str], bool] | None = None
) -> TakenOver:
    """Enter what the store does not know of the registry's adapters and versions: once, then only `again`.

    `sealed` says whether a version bears its seal, without which it is left out; None: each is taken as it is. Raises
    UnavailableError if the registry does not answer.
    """
    with exclusive(store.url, "takeover"):
        if store.imported() is not None and not again:  # by whoever had the lock before
            return TakenOver(0, 0)
        known = {version.ref for some in store.list_all_versions().values() for version in some} if sealed else set()
        refused: list[str] = []

        def wanted(version: Version, seal: str) -> bool:
            if sealed is None or version.ref in known or sealed(version, seal):
                return True
            refused.append(version.ref)
            return False

        adapters, versions = store.take_over(_inherited(connection, wanted, empty=sealed is None))
        store.mark_imported()
    return TakenOver(adapters, versions, tuple(sorted(refused)))


def _inherited(connection: Connection, wanted: Callable[[Version, str], bool], *, empty: bool) -> list[Inherited]:
    """The adapters with the versions that are wanted; those without any only where `empty`."""
    if _is_empty(connection.sqlite_file):
        return []
    versions: dict[str, list[Version]] = defaultdict(list)
    with connection.answering():
        found = connection.pages(connection.client.search_registered_models, filter_string=None)
        models = {model.name: model for model in found if TENANT in model.tags}
        for entity in connection.pages(connection.client.search_model_versions, filter_string=None):
            if entity.name in models and wanted(version := read_version(entity), entity.tags.get(TAG, "")):
                versions[entity.name].append(version)
    return [
        Inherited(name, int(model.creation_timestamp) / 1000, aliases_of(model), tuple(versions[name]))
        for name, model in models.items()
        if empty or versions[name]
    ]


def aliases_of(model: RegisteredModel) -> dict[str, int]:
    """The aliases of a registered model of MLflow, a move that was under way included."""
    aliases = {alias: int(version) for alias, version in (model.aliases or {}).items()}
    moves: dict[str, int | None] = json.loads(model.tags.get(MOVE) or "{}")
    for alias, version in moves.items():
        if version is None:
            aliases.pop(alias, None)
        else:
            aliases[alias] = version
    return aliases


def _is_empty(database: Path | None) -> bool:
    """Whether an sqlite store holds no model, which is known without MLflow; False for a tracking server."""
    if database is None:
        return False
    if not database.is_file():
        return True
    try:
        with closing(sqlite3.connect(f"{database.absolute().as_uri()}?mode=ro", uri=True)) as link:
            return link.execute("SELECT 1 FROM registered_models LIMIT 1").fetchone() is None
    except sqlite3.Error:
        return False  # MLflow says what is wrong with it
