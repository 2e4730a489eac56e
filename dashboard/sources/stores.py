"""Access to the registry and the platform's records for pages.

Reading never creates a store, and a store that does not answer is returned as a message.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pedro.errors import PedroError
from pedro.registry import Registry
from pedro.store import Store
from sources.view import tenant_seen, whole

if TYPE_CHECKING:
    from pedro.config import Settings

SQLITE = "sqlite:///"
Found = TypeVar("Found")
Nothing = TypeVar("Nothing")


def ask_registry(
    settings: Settings, read: Callable[[Registry], Found], nothing: Nothing
) -> tuple[Found | Nothing, str]:
    """What `read` finds, or `nothing` and why not; no reason where there simply is no registry yet."""
    found = _ask(settings.tracking_uri, lambda file: read(_registry(whole(settings), file)), nothing)
    return found[0], _said(settings, found[1])


def ask_store(settings: Settings, read: Callable[[Store], Found], nothing: Nothing) -> tuple[Found | Nothing, str]:
    """What `read` finds, or `nothing` and why not; no reason where there simply are no records yet."""
    found = _ask(settings.database_url, lambda file: read(_store(settings.database_url, file)), nothing)
    return found[0], _said(settings, found[1])


def is_there(url: str) -> bool:
    """Whether a store could answer: its file exists, or it is a server."""
    return not url.startswith(SQLITE) or Path(url.removeprefix(SQLITE)).is_file()


def _said(settings: Settings, problem: str) -> str:
    """What a reader is told: a tenant nothing of addresses and files."""
    return "It cannot be read right now." if problem and tenant_seen(settings) is not None else problem


def _ask(url: str, read: Callable[[object], Found], nothing: Nothing) -> tuple[Found | Nothing, str]:
    file: object = None
    if url.startswith(SQLITE):
        try:
            stat = Path(url.removeprefix(SQLITE)).stat()
        except OSError:
            return nothing, ""
        file = stat.st_dev, stat.st_ino  # a file that is another one now is another store
    try:
        return read(file), ""
    except PedroError as error:
        return nothing, error.message
    except Exception as error:  # noqa: BLE001 (whatever a store holds or its client raises, the page says so)
        return nothing, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


@lru_cache(maxsize=8)
def _registry(settings: Settings, _file: object) -> Registry:
    return Registry.open(settings)


@lru_cache(maxsize=8)
def _store(url: str, _file: object) -> Store:
    return Store(url)
