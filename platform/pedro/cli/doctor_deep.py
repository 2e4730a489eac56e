"""`pedro doctor --deep`: not only whether services answer, but whether what is kept is whole and can be used.

Reads every version that an alias names from where it lies, and writes a small file to the storage, which it removes.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from pedro.config import SERVER_RECORD
from pedro.errors import ConfigError, PedroError, UnavailableError

if TYPE_CHECKING:
    from pedro.config import Settings

Probe = tuple[str, Callable[[], str], str]
SHOWN = 5


def deep_probes(settings: Settings) -> Iterator[Probe]:
    """Name, what to do (it raises PedroError or OSError), and the remedy where it fails."""
    yield "storage", lambda: _storage(settings), "check PEDRO_STORAGE, its rights and its keys"
    yield "secrets", lambda: _secrets(settings), "bring the file back; it is in no backup"
    yield "versions", lambda: _versions(settings), "roll back or delete these, or restore the artifacts from a backup"
    yield "server", lambda: _server(settings), "read PEDRO_HOME/logs; `pedro down` and `pedro serve` begin anew"


def _storage(settings: Settings) -> str:
    from pedro.stored_files import GONE, remove
    from pedro.training.storage import join, read_text, write_text

    written = secrets.token_hex(512)
    place = join(settings.storage, f"{GONE}{secrets.token_hex(8)}")  # `pedro gc` removes it if this is killed
    try:
        write_text(place, written)
        if read_text(place) != written:
            raise UnavailableError(f"{settings.storage}: what was written is not what is read")
    finally:
        remove(place)
    return f"{settings.storage}: written, read back and removed"


def _secrets(settings: Settings) -> str:
    from pedro.key_files import KeyFile

    found = []
    for what, path, setting in (
        ("seal", settings.seal_file, "PEDRO_SEAL_KEY_FILE"),
        ("webhooks", settings.webhook_key_file, "PEDRO_WEBHOOK_KEY_FILE"),
    ):
        keys = len(KeyFile(path, setting).all())
        if keys and path.stat().st_mode & 0o007:
            raise ConfigError(f"{setting}: {path} can be read by anybody; chmod 600 it")
        found.append(f"{what} {keys or 'no'} key{'' if keys == 1 else 's'}")
    return ", ".join(found)


def _versions(settings: Settings) -> str:
    """Raises PedroError naming the first few that are not what was registered."""
    from pedro.registry import Registry

    registry = Registry.open(settings)
    wrong, right = [], 0
    for name in registry.models():
        for version in registry.versions(name):
            if version.aliases:
                try:
                    registry.verify(version)
                    right += 1
                except PedroError as error:
                    wrong.append(error.message)
    if wrong:
        more = f"; and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise PedroError("; ".join(wrong[:SHOWN]) + more)
    return f"the files of {right} that aliases name are those that were registered"


def _server(settings: Settings) -> str:
    """Of this home, if it runs one."""
    import httpx

    try:
        url = json.loads((settings.home / SERVER_RECORD).read_text())["url"]
    except FileNotFoundError:
        return "none runs for this home"
    try:
        reply = httpx.get(f"{url}/ready", timeout=10)
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url} does not answer ({type(error).__name__})") from error
    state = reply.json().get("status", "")
    if reply.status_code != 200 or state != "ready":
        raise UnavailableError(f"{url} answers, and is {state or reply.status_code}")
    return f"{url} is ready"
