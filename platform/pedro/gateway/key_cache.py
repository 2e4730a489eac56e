"""Keys as one gateway knows them, by the hash of their secret: asked for once, then kept by the store's change feed.

A request costs no question to the database while the feed was read lately; what was revoked is refused once it is read
again, and a key whose time is over at that moment, since the time is known with the key. Every key is asked for again
after `FRESH_S` all the same, since processes of earlier releases write no feed.
While the database is away, keys that were used before are good for `AWAY_S`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from pedro.errors import AuthenticationError, PedroError, UnavailableError
from pedro.store import KEY, QUOTA, KeyRecord, Position, Quota, Store, hash_secret, unknown_key

AWAY_S = 600.0
PATIENCE_S = 0.25  # how long a request waits for the feed, before it trusts what is known
AGAIN_AFTER_S = 1.0  # when a feed that could not be read is asked for again
FRESH_S = 30.0  # how long an answer is good by itself
MAX_LOOKUPS, MAX_RENEWALS = 48, 16  # at once, of keys that are not known and of those that are
MAX_KEYS, MAX_UNKNOWN = 20_000, 20_000
WRITE_EVERY_S = 60.0
log = logging.getLogger("pedro.gateway")
Known = tuple[KeyRecord, Quota]
T = TypeVar("T")
V = TypeVar("V")


@dataclass
class _Held:
    """A live key as it was at a time (`time.monotonic`)."""

    known: Known
    at: float


class KeyCache:
    """For one event loop; the database is asked on threads of its own, so that a slow one holds up nobody else."""

    def __init__(self, store: Store, follow_every_s: float) -> None:
        self._store = store
        self._follow_every_s = follow_every_s
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="pedro-auth")
        # guesses hold up neither of these: they have threads of their own
        self._renewal_threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="pedro-renew")
        self._feed_thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-keys")
        self._lookups = 0
        self._keys: OrderedDict[str, _Held] = OrderedDict()
        self._unknown: OrderedDict[str, float] = OrderedDict()
        self._renewing: dict[str, asyncio.Task[Known]] = {}
        self._position: Position | None = None
        self._read_at: float | None = None
        self._due_at = 0.0
        self._reading: asyncio.Task[None] | None = None

    async def find(self, secret: str) -> Known:
        """The live key with this secret, and its tenant's quota.

        Raises AuthenticationError, the same for unknown, expired and revoked, and UnavailableError where it cannot be
        known.
        """
        await self._follow()
        hashed = hash_secret(secret)
        held = self._keys.get(hashed)
        if held is not None and not _fresh(held.at):
            await self._renew(hashed, secret)
            held = self._keys.get(hashed)
        if held is not None:
            if held.known[0].has_expired(time.time()):
                raise unknown_key()
            self._keys.move_to_end(hashed)
            return held.known
        if hashed in self._unknown and _fresh(self._unknown[hashed]):
            raise unknown_key()
        if self._lookups >= MAX_LOOKUPS:
            raise UnavailableError("Too many keys are being checked; try again.", code="overloaded")
        self._lookups += 1
        try:
            return await self._look_up(hashed, secret, self._threads)
        finally:
            self._lookups -= 1

    def close(self) -> None:
        for threads in (self._threads, self._renewal_threads, self._feed_thread):
            threads.shutdown(wait=False)

    async def _look_up(self, hashed: str, secret: str, threads: ThreadPoolExecutor) -> Known:
        """What the database says of a key, remembered where nothing changed meanwhile."""
        asked_at, now = self._position, time.monotonic()
        try:
            known = await _on(threads, lambda: self._store.authenticate(secret))
        except AuthenticationError:
            self._keys.pop(hashed, None)
            if asked_at == self._position:  # what was read is as of now, as far as the feed tells
                _remember(self._unknown, hashed, now, MAX_UNKNOWN)
            raise
        if asked_at == self._position:
            _remember(self._keys, hashed, _Held(known, now), MAX_KEYS)
        return known

    async def _renew(self, hashed: str, secret: str) -> None:
        """Ask for a key again; a database that is slow or away leaves what was known, and so does one that is busy
        with others: the key's next request asks again."""
        if hashed not in self._renewing:
            if len(self._renewing) >= MAX_RENEWALS:
                return
            looking = self._look_up(hashed, secret, self._renewal_threads)
            self._renewing[hashed] = renewal = asyncio.create_task(looking)
            renewal.add_done_callback(_retrieve)
            renewal.add_done_callback(lambda _: self._renewing.pop(hashed, None))
        await asyncio.wait({self._renewing[hashed]}, timeout=PATIENCE_S)

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
        here = await _on(self._feed_thread, self._store.position)
        since = self._position
        if since is None:
            self._position = here
        elif here != since:
            delta = await _on(self._feed_thread, lambda: self._store.changes(since))
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
        if not keys and not quotas:  # adapters changed: nothing to look for among thousands of keys
            return
        if keys:
            self._unknown.clear()
        changed = [
            hashed
            for hashed, held in self._keys.items()
            if (record := held.known[0]).id in keys
            or f"key:{record.id}" in quotas
            or f"tenant:{record.tenant}" in quotas
        ]
        found: dict[str, Known] = {}
        now = time.monotonic()
        try:
            if changed:
                found = await _on(self._feed_thread, lambda: self._store.find_keys(changed))
        finally:  # where that fails they are forgotten: a key that was revoked must not be taken for a good one
            for hashed in changed:
                if hashed in found:
                    self._keys[hashed] = _Held(found[hashed], now)
                else:
                    self._keys.pop(hashed, None)


class LastUsed:
    """Writes when keys were used last: gathered in memory and written together, never in a request's way.

    What a gateway that dies had not written yet is lost: up to a minute.

    For one event loop; with several gateways the store takes one time a minute of each key.
    """

    def __init__(self, store: Store, write_every_s: float = WRITE_EVERY_S) -> None:
        self._store = store
        self._write_every_s = write_every_s
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="pedro-used")
        self._waiting: dict[str, float] = {}
        self._timer: asyncio.TimerHandle | None = None

    def note(self, key_id: str) -> None:
        """The key was used now."""
        if len(self._waiting) < MAX_KEYS or key_id in self._waiting:
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


async def _on(threads: ThreadPoolExecutor, question: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, question)


def _fresh(at: float) -> bool:
    return time.monotonic() - at <= FRESH_S


def _retrieve(reading: asyncio.Task[Any]) -> None:
    """It may be that nobody waits for it any more."""
    if not reading.cancelled():
        reading.exception()


def _remember(held: OrderedDict[str, V], key: str, value: V, most: int) -> None:
    held[key] = value
    while len(held) > most:
        held.popitem(last=False)
