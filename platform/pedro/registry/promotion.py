"""Moves several aliases of one adapter in one step, although MLflow sets them one by one.

A move is a tag of the registered model that says where its aliases shall stand: writing it is the move. Who reads
the aliases reads the tag with them (`aliases_of`), so nobody sees half a move; `finish` then sets the aliases and
takes the tag away. What a mover that was killed left to do, the next one does. Movers hold the registry's lock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pedro.registry.tags import PREFIX
from pedro.registry.versions import PROMOTED, utc

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import RegisteredModel

MOVE = f"{PREFIX}move"
CHAMPION, PREVIOUS, CANDIDATE = "champion", "previous", "candidate"


def aliases_of(model: RegisteredModel) -> dict[str, int]:
    """The aliases of a registered model of MLflow, a move that is under way included."""
    aliases = {alias: int(version) for alias, version in (model.aliases or {}).items()}
    for alias, version in _under_way(model).items():
        if version is None:
            aliases.pop(alias, None)
        else:
            aliases[alias] = version
    return aliases


def move(client: MlflowClient, name: str, wanted: Mapping[str, int | None]) -> dict[str, int]:
    """Move aliases of an adapter together; None takes one away. Gives where all stand then.

    A new champion says when it became one.
    """
    if CHAMPION in wanted:
        client.set_model_version_tag(name, str(wanted[CHAMPION]), PROMOTED, utc(time.time()))
    client.set_registered_model_tag(name, MOVE, json.dumps(dict(wanted)))
    model = client.get_registered_model(name)
    finish(client, model)
    return aliases_of(model)


def finish(client: MlflowClient, model: RegisteredModel) -> None:
    """Set the aliases as the model's move says, if one is under way; again does no harm."""
    if MOVE not in model.tags:
        return
    for alias, version in _under_way(model).items():
        if version is not None:
            client.set_registered_model_alias(model.name, alias, str(version))
        elif alias in (model.aliases or {}):
            client.delete_registered_model_alias(model.name, alias)
    client.delete_registered_model_tag(model.name, MOVE)


def _under_way(model: RegisteredModel) -> dict[str, int | None]:
    moves: dict[str, int | None] = json.loads(model.tags.get(MOVE) or "{}")
    return moves
