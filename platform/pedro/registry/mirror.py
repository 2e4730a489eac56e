"""Mirrors aliases to MLflow, for those who look at its pages. The store is authoritative.

A move is done once the store has it. MLflow hears of it next; where it does not answer, it is told later, and until
then the store knows which adapters it has not heard of.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pedro.registry.takeover import MOVE
from pedro.registry.versions import GATE, PROMOTED

if TYPE_CHECKING:
    from pedro.registry.connection import Connection
    from pedro.store import RegisteredAdapter, Store, Unmirrored

log = logging.getLogger("pedro.registry")


def tell(connection: Connection, store: Store, name: str) -> None:
    """Make MLflow say of one adapter what the store says, if it has not heard it yet; whoever calls holds its lock.

    Raises MLflow's error where it does not answer.
    """
    news = store.to_mirror(name)
    if news is None:
        return
    if news.deleted:
        _try(connection, name, connection.client.delete_registered_model, name)
    else:
        _tell_versions(connection, news)
        _tell_aliases(connection, news.adapter)
    store.mirrored(news.adapter)


def _tell_versions(connection: Connection, news: Unmirrored) -> None:
    client, name = connection.client, news.adapter.name
    for version in news.changed:
        for tag, value in ((GATE, version.gate), (PROMOTED, version.promoted)):
            if value:
                _try(connection, name, client.set_model_version_tag, name, str(version.version), tag, value)
    for number in news.gone:
        _try(connection, name, client.delete_model_version, name, str(number))


def _tell_aliases(connection: Connection, adapter: RegisteredAdapter) -> None:
    client, name = connection.client, adapter.name
    model = _try(connection, name, client.get_registered_model, name)
    if model is None:
        return
    there = {alias: int(version) for alias, version in (model.aliases or {}).items()}
    for alias in there.keys() - adapter.aliases.keys():
        client.delete_registered_model_alias(name, alias)
    for alias, version in adapter.aliases.items():
        if there.get(alias) != version:
            _try(connection, name, client.set_registered_model_alias, name, alias, str(version))
    if MOVE in model.tags:
        client.delete_registered_model_tag(name, MOVE)


def _try(connection: Connection, name: str, ask: Callable[..., Any], *arguments: str) -> Any:
    """What the client answers; None, and a warning, where MLflow does not have what is spoken of."""
    try:
        return ask(*arguments)
    except connection.error as error:
        if not connection.is_missing(error):
            raise
        log.warning("%s: MLflow does not have it any more (%s)", name, str(error).partition("\n")[0])
        return None
