"""Writes when keys were used last: gathered in memory and written together, never in a request's way.

Knows of no request. What a gateway that dies had not written yet is lost: up to a minute.
"""

from __future__ import annotations

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from pedro.errors import PedroError

if TYPE_CHECKING:
    from pedro.store import Store

WRITE_EVERY_S = 60.0
MAX_WAITING = 20_000  # keys
log = logging.getLogger("pedro.gateway")


class LastUsed:
    """For one event loop; with several gateways the store takes one time a minute of each key."""

    def __init__(self, store: Store, write_every_s: float = WRITE_EVERY_S) -> None:
        self._store = store
        self._write_every_s = write_every_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-used")
        self._waiting: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def note(self, key_id: str) -> None:
        """The key was used now."""
        if len(self._waiting) < MAX_WAITING or key_id in self._waiting:
            self._waiting[key_id] = time.time()
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(self._write_every_s, self._write_soon)

    def close(self) -> None:
        """Write what is left, and end."""
        if self._timer is not None:
            self._timer.cancel()
        self._thread.submit(self._write, self._taken())
        self._thread.shutdown(wait=True)

    def _write_soon(self) -> None:
        self._timer = None
        self._thread.submit(self._write, self._taken())

    def _taken(self) -> dict[str, float]:
        taken, self._waiting = self._waiting, {}
        return taken

    def _write(self, at: dict[str, float]) -> None:
        if not at:
            return
        try:
            self._store.mark_used(at)
        except PedroError as error:  # the next minute's say as much
            log.warning("when keys were used last could not be written: %s", error)
