"""Keeps adapters resident within a byte budget. Knows nothing of requests, prompts or what an adapter is made of.

States: loading → ready → draining → gone. Loads run on threads of their own; the pool's mutex guards bookkeeping
only and is never held while something loads, so a slow load delays nobody but those who wait for that adapter.
Any number of them wait for one load. A pinned adapter is never evicted: taken out while pinned it drains, and
those that hold it keep it. One that an operator keeps stays until it is let go. A failed load is an error for those
who asked, and is not tried again before a back-off has passed. No call costs more for more adapters resident.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Generic

from pedro.engine.residence import A, Entry, Failure, Residence
from pedro.errors import AdapterError, AdapterUnusableError, ConflictError, PedroError, UnavailableError

log = logging.getLogger(__name__)
FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 60.0
MAX_FAILURES = 1024
NO_ROOM = "adapter_budget"  # the code of an error for want of room beside what operators keep


class AdapterPool(Generic[A]):
    """Loads by ref, keeps within `budget_bytes`, evicts the least recently used. Thread-safe.

    `load(ref)` runs on a loader thread and may block. `on_change` is called after a load ends, from that thread.
    """

    def __init__(
        self, load: Callable[[str], A], budget_bytes: int, on_change: Callable[[], None], loaders: int = 4
    ) -> None:
        self.budget_bytes = budget_bytes
        self._load = load
        self._on_change = on_change
        self._changed = threading.Condition()
        self._entries: dict[str, Entry[A]] = {}
        self._idle: OrderedDict[str, Entry[A]] = OrderedDict()  # what may be evicted, least recently used first
        self._idle_bytes = self._used_bytes = self._kept_bytes = 0
        self._kept: set[str] = set()
        self._draining: list[Entry[A]] = []
        self._wants: Counter[str] = Counter()
        self._failures: dict[str, Failure] = {}
        self._news: list[tuple[str, PedroError]] = []
        self._todo: queue.SimpleQueue[Entry[A] | None] = queue.SimpleQueue()
        self._closed = False
        self._loading = self._loads = self._evictions = self._failed = 0
        self._threads = [
            threading.Thread(target=self._serve, name=f"adapter-loader-{i}", daemon=True) for i in range(loaders)
        ]
        for thread in self._threads:
            thread.start()

    def want(self, ref: str, times: int = 1) -> None:
        """Say that so many wait for `ref`; its load starts. Raises the last load's error while it backs off."""
        with self._changed:
            self._raise_failure(ref)
            self._wants[ref] += times
            self._ensure(ref)
            self._place(ref)

    def unwant(self, ref: str) -> None:
        """Take back one `want`: the request was served or went away."""
        with self._changed:
            self._wants[ref] -= 1
            if self._wants[ref] <= 0:
                del self._wants[ref]
                self._place(ref)
                self._changed.notify_all()

    def preload(self, ref: str) -> None:
        """Start loading `ref` though nobody waits for it. Raises the last load's error while it backs off."""
        with self._changed:
            self._raise_failure(ref)
            self._ensure(ref)

    def pin(self, ref: str) -> Entry[A] | None:
        """The adapter, held until `unpin`; None while it loads. Starts a load where there is none."""
        with self._changed:
            entry = self._ensure(ref)
            if entry is None or entry.state is not Residence.READY:
                return None
            entry.pins += 1
            entry.uses += 1
            self._place(ref)
            return entry

    def unpin(self, entry: Entry[A]) -> None:
        """Let go of what `pin` gave; a draining adapter nobody holds any more is gone."""
        with self._changed:
            assert entry.pins > 0, f"adapter {entry.ref} was unpinned more often than pinned"
            entry.pins -= 1
            if entry.pins:
                return
            if entry.state is Residence.DRAINING:
                self._draining.remove(entry)
                self._free(entry)
            else:
                self._place(entry.ref)
            self._changed.notify_all()

    def load(self, ref: str, *, keep: bool = False, timeout_s: float = 60.0) -> None:
        """Returns once `ref` is resident; `keep` has it stay, whatever room others need, until `let_go` or `evict`.

        Raises the load's error, UnavailableError where it takes longer, and ConflictError where all that is kept
        would exceed the budget.
        """
        until = time.monotonic() + timeout_s
        with self._changed:
            self._raise_failure(ref)
            self._wants[ref] += 1  # holds it here until it is kept
            try:
                self._ensure(ref)
                while (entry := self._entries.get(ref)) is None or entry.state is not Residence.READY:
                    self._raise_failure(ref)
                    if entry is None or not self._changed.wait(until - time.monotonic()):
                        raise UnavailableError(f"adapter {ref!r} is not loaded yet; try again later")
                if keep and ref not in self._kept:
                    if self._kept_bytes + entry.nbytes > self.budget_bytes:
                        raise ConflictError(self._no_room(entry.nbytes, ref), code=NO_ROOM)
                    self._kept.add(ref)
                    self._kept_bytes += entry.nbytes
            finally:
                self.unwant(ref)

    def let_go(self, ref: str) -> None:
        """Make a kept adapter one like the others; nothing changes for one that is not kept."""
        with self._changed:
            if ref in self._kept:
                self._unkeep(self._entries[ref])
                self._place(ref)
                self._changed.notify_all()

    def evict(self, ref: str) -> bool:
        """Take `ref` out, kept or not: at once, or once nobody holds it. Later requests load it anew.

        False if it is not here.
        """
        with self._changed:
            self._failures.pop(ref, None)
            if ref not in self._entries:
                return False
            self._remove(self._entries[ref])
            self._changed.notify_all()
            return True

    def take_failures(self) -> list[tuple[str, PedroError]]:
        """The loads that failed since the last call."""
        if not self._news:
            return []
        with self._changed:
            news, self._news = self._news, []
            return news

    def residents(self) -> dict[str, dict]:
        """State, bytes, pins, uses and whether it is kept, of each adapter, draining ones included."""
        with self._changed:
            entries = [*self._draining, *self._entries.values()]
            return {
                e.ref: {
                    "state": e.state.value,
                    "bytes": e.nbytes,
                    "pins": e.pins,
                    "uses": e.uses,
                    "kept": e.ref in self._kept and e.state is Residence.READY,
                }
                for e in entries
            }

    def stats(self) -> dict:
        """Counts since the start, and bytes now."""
        with self._changed:
            return {
                "resident": len(self._entries) - self._loading,
                "loading": self._loading,
                "kept": len(self._kept),
                "bytes": self._used_bytes,
                "budget_bytes": self.budget_bytes,
                "loads": self._loads,
                "failed_loads": self._failed,
                "evictions": self._evictions,
            }

    def close(self) -> None:
        """Stop loading. What is pinned stays usable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._todo.put(None)

    def _ensure(self, ref: str) -> Entry[A] | None:
        """The entry of `ref`; a new one starts to load, unless a failed load still backs off."""
        entry = self._entries.get(ref)
        if entry is not None:
            return entry
        failure = self._failures.get(ref)
        if self._closed or (failure is not None and time.monotonic() < failure.retry_at):
            return None
        entry = self._entries[ref] = Entry[A](ref)
        self._loading += 1
        self._todo.put(entry)
        return entry

    def _raise_failure(self, ref: str) -> None:
        failure = self._failures.get(ref)
        if failure is not None and time.monotonic() < failure.retry_at:
            raise failure.error.with_traceback(None)  # else it would gather those of all whom it is raised for

    def _serve(self) -> None:
        while (entry := self._todo.get()) is not None:
            try:
                if self._wanted(entry):  # else it was evicted before its turn
                    self._settle(entry, self._load(entry.ref))
            except PedroError as error:
                self._fail(entry, error if error.status >= 500 else unusable(entry.ref, error))
            except Exception:  # a loader meets networks and disks: whatever it is, it fails this adapter only
                log.exception("adapter %s could not be loaded", entry.ref)
                self._fail(entry, UnavailableError(f"adapter {entry.ref!r} could not be loaded now; try again later"))
            self._on_change()

    def _settle(self, entry: Entry[A], adapter: A) -> None:
        """Make the loaded adapter ready as soon as there is room for it."""
        with self._changed:
            if adapter.nbytes > self.budget_bytes:
                raise AdapterError(
                    f"adapter {entry.ref!r} takes {adapter.nbytes:,} bytes and the engine keeps {self.budget_bytes:,} "
                    "for all adapters; raise adapter_bytes or train a smaller one"
                )
            while self._wanted(entry) and not self._make_room(adapter.nbytes):
                if self._kept_bytes + adapter.nbytes > self.budget_bytes:  # waiting would not help
                    log.warning(self._no_room(adapter.nbytes, entry.ref))  # tenants are told no figures of others
                    raise UnavailableError(
                        f"adapter {entry.ref!r} has no room beside the pinned ones; an operator must unpin or unload "
                        "one of them",
                        code=NO_ROOM,
                    )
                self._changed.wait()
            if not self._wanted(entry):
                return
            entry.adapter, entry.nbytes = adapter, adapter.nbytes
            entry.to(Residence.READY)
            self._loading -= 1
            self._used_bytes += entry.nbytes
            self._place(entry.ref)
            self._failures.pop(entry.ref, None)
            self._loads += 1
            self._changed.notify_all()

    def _no_room(self, nbytes: int, ref: str) -> str:
        return (
            f"adapter {ref!r} takes {nbytes:,} bytes, but pinned adapters hold {self._kept_bytes:,} of the "
            f"{self.budget_bytes:,} bytes for all; unpin or unload one of them, or raise adapter_bytes"
        )

    def _fail(self, entry: Entry[A], error: PedroError) -> None:
        with self._changed:
            self._failed += 1
            if not self._wanted(entry):
                return
            past = self._failures.get(entry.ref)
            times = past.times + 1 if past else 1
            backoff_s = min(FIRST_BACKOFF_S * 2 ** (times - 1), LAST_BACKOFF_S)
            if len(self._failures) >= MAX_FAILURES:
                del self._failures[next(iter(self._failures))]
            self._failures[entry.ref] = Failure(error, times, time.monotonic() + backoff_s)
            self._news.append((entry.ref, error))
            self._remove(entry)
            self._changed.notify_all()

    def _wanted(self, entry: Entry[A]) -> bool:
        """Whether this load still counts: neither evicted meanwhile nor the pool closed."""
        return not self._closed and self._entries.get(entry.ref) is entry

    def _make_room(self, nbytes: int) -> bool:
        """Evict until `nbytes` fit, least recently used first. False if what must stay leaves no room."""
        if self.budget_bytes - self._used_bytes + self._idle_bytes < nbytes:
            return False
        while self.budget_bytes - self._used_bytes < nbytes:
            self._remove(next(iter(self._idle.values())))
            self._evictions += 1
        return True

    def _place(self, ref: str) -> None:
        """Enter or strike `ref` in the list of what may be evicted; entering makes it the most recently used.

        A fresh adapter stays until the first who waited for it was served, else two could evict each other.
        """
        entry = self._entries.get(ref)
        if entry is None or entry.state is not Residence.READY:
            return
        fresh = entry.uses == 0 and self._wants[ref] > 0
        may_go = not (entry.pins or fresh or ref in self._kept)
        if (ref in self._idle) != may_go:
            self._idle_bytes += entry.nbytes if may_go else -entry.nbytes
            if may_go:
                self._idle[ref] = entry
            else:
                del self._idle[ref]

    def _remove(self, entry: Entry[A]) -> None:
        """Take an entry out: gone, or draining while somebody holds it."""
        del self._entries[entry.ref]
        if entry.state is Residence.LOADING:
            self._loading -= 1
            entry.to(Residence.GONE)
            return
        if self._idle.pop(entry.ref, None) is not None:
            self._idle_bytes -= entry.nbytes
        if entry.ref in self._kept:
            self._unkeep(entry)
        if entry.pins:
            entry.to(Residence.DRAINING)
            self._draining.append(entry)
        else:
            self._free(entry)

    def _unkeep(self, entry: Entry[A]) -> None:
        """Its room is for others again: what was refused for want of it may be tried at once."""
        self._kept.discard(entry.ref)
        self._kept_bytes -= entry.nbytes
        for ref in [ref for ref, failure in self._failures.items() if failure.error.code == NO_ROOM]:
            del self._failures[ref]

    def _free(self, entry: Entry[A]) -> None:
        """Nobody holds it any more."""
        self._used_bytes -= entry.nbytes
        entry.to(Residence.GONE)


def unusable(ref: str, error: PedroError) -> AdapterUnusableError:
    """What a request is told whose adapter version cannot be served: that is at fault, and not the request."""
    named = ref.partition("#")[0]
    return AdapterUnusableError(f"model: {named} cannot be served: {error.message}", param="model")
