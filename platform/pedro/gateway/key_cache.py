"""Keys as one gateway knows them, by the hash of their secret: asked for once, then kept by the store's change feed.

A request costs no question to the database while the feed was read lately; what was revoked is refused once it is read
again. While the database is away, keys that were used before are good for `AWAY_S`.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pedro.errors import AuthenticationError, UnavailableError
from pedro.store import KEY, QUOTA, KeyRecord, Position, Quota, Store, hash_secret, unknown_key

AWAY_S = 600.0
PATIENCE_S = 0.25  # how long a request waits for the feed, before it trusts what is known
AGAIN_AFTER_S = 1.0  # when a feed that could not be read is asked for again
MAX_KEYS, MAX_UNKNOWN = 20_000, 20_000
Known = tuple[KeyRecord, Quota]
T = TypeVar("T")
V = TypeVar("V")


class KeyCache:
    """For one event loop; the database is asked on threads of its own, so that a slow one holds up nobody else."""

    def __init__(self, store: Store, follow_every_s: float) -> None:
        self._store = store
        self._follow_every_s = follow_every_s
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pedro-auth")
        self._keys: OrderedDict[str, Known] = OrderedDict()
        self._unknown: OrderedDict[str, None] = OrderedDict()
        self._position: Position | None = None
        self._read_at: float | None = None
        self._due_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Known:
        """The live key with this secret, and its tenant's quota.

        Raises AuthenticationError, the same for unknown and revoked, and UnavailableError where it cannot be known.
        """
        await self._follow()
        hashed = hash_secret(secret)
        known = self._keys.get(hashed)
        if known is not None:
            self._keys.move_to_end(hashed)
            return known
        if hashed in self._unknown:
            raise unknown_key()
        asked_at = self._position
        try:
            known = await self._ask(lambda: self._store.authenticate(secret))
        except AuthenticationError:
            if asked_at == self._position:  # what was read is as of now, as far as the feed tells
                _remember(self._unknown, hashed, None, MAX_UNKNOWN)
            raise
        if asked_at == self._position:
            _remember(self._keys, hashed, known, MAX_KEYS)
        return known

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    async def _follow(self) -> None:
        """Read the feed if that is due; whoever comes meanwhile waits for the same reading."""
        now = time.monotonic()
        if now < self._due_at:
            return
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read())
            self._reading.add_done_callback(_retrieve)
        await asyncio.wait({self._reading}, timeout=None if self._read_at is None else PATIENCE_S)
        error = self._reading.exception() if self._reading.done() and not self._reading.cancelled() else None
        if self._reading.done() and error is None:
            return
        if self._read_at is None or now - self._read_at > AWAY_S:
            raise UnavailableError("The platform's database does not answer; try again.", code="database") from error
        self._due_at = now + AGAIN_AFTER_S

    async def _read(self) -> None:
        began = time.monotonic()
        here = await self._ask(self._store.position)
        since = self._position
        if since is None:
            self._position = here
        elif here != since:
            delta = await self._ask(lambda: self._store.changes(since))
            self._position = delta.position  # from here on nothing is kept that was asked for before
            if delta.complete:
                await self._ask_again(
                    {subject for kind, subject in delta.changed if kind == KEY},
                    {subject for kind, subject in delta.changed if kind == QUOTA},
                )
            else:
                self._keys.clear()
                self._unknown.clear()
        self._read_at, self._due_at = began, began + self._follow_every_s

    async def _ask_again(self, keys: set[str], quotas: set[str]) -> None:
        """Look up again what changed of the keys that are known."""
        if keys:
            self._unknown.clear()
        changed = [
            hashed
            for hashed, (record, _) in self._keys.items()
            if record.id in keys or f"key:{record.id}" in quotas or f"tenant:{record.tenant}" in quotas
        ]
        found: dict[str, Known] = {}
        try:
            if changed:
                found = await self._ask(lambda: self._store.find_keys(changed))
        finally:  # where that fails they are forgotten: a key that was revoked must not be taken for a good one
            for hashed in changed:
                if hashed in found:
                    self._keys[hashed] = found[hashed]
                else:
                    self._keys.pop(hashed, None)

    async def _ask(self, question: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._threads, question)


def _retrieve(reading: asyncio.Task[None]) -> None:
    """It may be that nobody waits for it any more."""
    if not reading.cancelled():
        reading.exception()


def _remember(held: OrderedDict[str, V], key: str, value: V, most: int) -> None:
    held[key] = value
    while len(held) > most:
        held.popitem(last=False)
