"""Keeps adapters resident within a byte budget. Independent of the kind of adapter and of its callers.

States: loading → ready → draining → gone. Loads run on separate threads; the pool's mutex guards bookkeeping only and
is never held during a load, so a slow load delays only requests for that adapter, all of which share one load. A
request acquires an adapter and releases it. Adapters with references are never evicted; one that is removed anyway
drains, and requests that hold it keep it. An adapter pinned by an operator stays resident until it is unpinned. A load
that fails for a possibly temporary reason (a store or a disk is away) is retried while requests wait for it, for at
most `RETRY_FOR_S`. A failed load is an error for the requests that wait for it, and is retried only after a back-off.
The cost of a call does not depend on the number of resident adapters.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, Generic

from pedro.engine.adapter_state import A, AdapterState, Failure, PooledAdapter, ResidentAdapter
from pedro.errors import AdapterError, AdapterUnusableError, ConflictError, PedroError, UnavailableError
from pedro.refs import without_digest

log = logging.getLogger(__name__)
FIRST_BACKOFF_S, LAST_BACKOFF_S = 1.0, 60.0
RETRY_EVERY_S, RETRY_FOR_S = 1.0, 20.0
MAX_FAILURES = 1024
NO_ROOM = "adapter_budget"  # error code: pinned adapters leave no room


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
        self._entries: dict[str, PooledAdapter[A]] = {}
        self._evictable: OrderedDict[str, PooledAdapter[A]] = OrderedDict()  # least recently used first
        self._evictable_bytes = self._used_bytes = self._pinned_bytes = 0
        self._pinned: set[str] = set()
        self._draining: list[PooledAdapter[A]] = []
        self._waiters: Counter[str] = Counter()
        self._failures: dict[str, Failure] = {}
        self._new_failures: list[tuple[str, PedroError]] = []
        self._load_queue: queue.SimpleQueue[PooledAdapter[A] | None] = queue.SimpleQueue()
        self._retry_queue: queue.SimpleQueue[tuple[float, PooledAdapter[A]] | None] = queue.SimpleQueue()
        self._closed = False
        self._loading = self._loads = self._evictions = self._failed = 0
        self._threads = [
            threading.Thread(target=self._run_loader, name=f"adapter-loader-{i}", daemon=True) for i in range(loaders)
        ]
        self._threads.append(threading.Thread(target=self._run_retries, name="adapter-retries", daemon=True))
        for thread in self._threads:
            thread.start()

    def add_waiters(self, ref: str, count: int = 1) -> None:
        """Start loading `ref` for `count` waiting requests. Raises the last load's error during its back-off."""
        with self._changed:
            self._raise_failure(ref)
            self._waiters[ref] += count
            self._ensure(ref)
            self._update_evictable(ref)

    def remove_waiter(self, ref: str) -> None:
        """A request that waited for `ref` was served or cancelled."""
        with self._changed:
            self._waiters[ref] -= 1
            if self._waiters[ref] <= 0:
                del self._waiters[ref]
                self._update_evictable(ref)
                self._changed.notify_all()

    def preload(self, ref: str) -> None:
        """Start loading `ref` although no request waits for it. Raises the last load's error during its back-off."""
        with self._changed:
            self._raise_failure(ref)
            self._ensure(ref)

    def acquire(self, ref: str) -> PooledAdapter[A] | None:
        """The adapter, referenced until `release`; None while it loads. Starts a load if there is none."""
        with self._changed:
            entry = self._ensure(ref)
            if entry is None or entry.state is not AdapterState.READY:
                return None
            entry.refcount += 1
            entry.total_uses += 1
            self._update_evictable(ref)
            return entry

    def ready(self, ref: str) -> A | None:
        """The adapter if `acquire` would give it now; as there, a load starts if there is none."""
        with self._changed:
            entry = self._ensure(ref)
            return entry.adapter if entry is not None and entry.state is AdapterState.READY else None

    def release(self, entry: PooledAdapter[A]) -> None:
        """Drop a reference taken by `acquire`; a draining adapter without references is freed."""
        with self._changed:
            assert entry.refcount > 0, f"adapter {entry.ref} was released more often than acquired"
            entry.refcount -= 1
            if entry.refcount:
                return
            if entry.state is AdapterState.DRAINING:
                self._draining.remove(entry)
                self._discard(entry)
            else:
                self._update_evictable(entry.ref)
            self._changed.notify_all()

    def load(self, ref: str, timeout_s: float = 60.0) -> None:
        """Returns once `ref` is resident. Raises the load's error, or UnavailableError on timeout."""
        with self._changed:
            self._wait_until_ready(ref, timeout_s)

    def pin(self, ref: str, timeout_s: float = 60.0) -> None:
        """Load `ref` and keep it resident until `unpin` or `evict`, even if others need the memory.

        Raises as `load` does, and ConflictError if the pinned adapters would exceed the budget.
        """
        with self._changed:
            entry = self._wait_until_ready(ref, timeout_s)
            if ref in self._pinned:
                return
            if self._pinned_bytes + entry.nbytes > self.budget_bytes:
                raise ConflictError(self._no_room(entry.nbytes, ref), code=NO_ROOM)
            self._pinned.add(ref)
            self._pinned_bytes += entry.nbytes
            self._update_evictable(ref)

    def unpin(self, ref: str) -> None:
        """Let a pinned adapter be evicted again; no effect if it is not pinned."""
        with self._changed:
            if ref in self._pinned:
                self._give_back_pin(self._entries[ref])
                self._update_evictable(ref)
                self._changed.notify_all()

    def evict(self, ref: str) -> bool:
        """Remove `ref`, pinned or not: at once, or when its last reference is released. Later requests reload it.

        False if it is not in the pool.
        """
        with self._changed:
            self._failures.pop(ref, None)
            if ref not in self._entries:
                return False
            self._remove(self._entries[ref])
            self._changed.notify_all()
            return True

    def take_failures(self) -> list[tuple[str, PedroError]]:
        """Loads that failed since the last call."""
        if not self._new_failures:
            return []
        with self._changed:
            failures, self._new_failures = self._new_failures, []
            return failures

    def residents(self) -> dict[str, ResidentAdapter]:
        """The adapters in the pool, by ref, including draining ones."""
        with self._changed:
            return {
                entry.ref: ResidentAdapter(
                    state=entry.state,
                    nbytes=entry.nbytes,
                    refcount=entry.refcount,
                    total_uses=entry.total_uses,
                    pinned=entry.ref in self._pinned and entry.state is AdapterState.READY,
                )
                for entry in (*self._draining, *self._entries.values())
            }

    def stats(self) -> dict[str, Any]:
        """Counters since the start, and current bytes."""
        with self._changed:
            return {
                "resident": len(self._entries) - self._loading,
                "loading": self._loading,
                "pinned": len(self._pinned),
                "bytes": self._used_bytes,
                "budget_bytes": self.budget_bytes,
                "loads": self._loads,
                "failed_loads": self._failed,
                "evictions": self._evictions,
            }

    def close(self) -> None:
        """Stop loading. Acquired adapters stay usable."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for _ in self._threads:
            self._load_queue.put(None)
        self._retry_queue.put(None)

    def _ensure(self, ref: str) -> PooledAdapter[A] | None:
        """The entry of `ref`; a new one starts loading, unless a failed load is still backing off."""
        entry = self._entries.get(ref)
        if entry is not None:
            return entry
        failure = self._failures.get(ref)
        if self._closed or (failure is not None and time.monotonic() < failure.retry_at):
            return None
        entry = self._entries[ref] = PooledAdapter[A](ref)
        self._loading += 1
        self._load_queue.put(entry)
        return entry

    def _wait_until_ready(self, ref: str, timeout_s: float) -> PooledAdapter[A]:
        """The entry of `ref`, which stays resident while the caller holds the mutex."""
        until = time.monotonic() + timeout_s
        self._raise_failure(ref)
        self._waiters[ref] += 1
        try:
            self._ensure(ref)
            while (entry := self._entries.get(ref)) is None or entry.state is not AdapterState.READY:
                self._raise_failure(ref)
                if entry is None or not self._changed.wait(until - time.monotonic()):
                    raise UnavailableError(f"adapter {ref!r} is not loaded yet; try again later")
            return entry
        finally:
            self.remove_waiter(ref)

    def _raise_failure(self, ref: str) -> None:
        failure = self._failures.get(ref)
        if failure is not None and time.monotonic() < failure.retry_at:
            raise failure.error.with_traceback(None)  # else tracebacks of all its waiters would accumulate

    def _run_loader(self) -> None:
        while (entry := self._load_queue.get()) is not None:
            try:
                if self._is_current(entry):  # else it was evicted before its turn
                    self._make_ready(entry, self._load(entry.ref))
            except Exception as error:  # network or disk: fails this adapter only
                if may_pass(error):
                    if self._retry_later(entry, error):
                        continue
                    log.exception("adapter %s could not be loaded", entry.ref)
                self._fail(entry, as_answered(entry.ref, error))
            self._on_change()

    def _retry_later(self, entry: PooledAdapter[A], error: Exception) -> bool:
        """Whether a failed load will be retried shortly: requests wait for it, and not for too long yet."""
        with self._changed:
            now = time.monotonic()
            if entry.retry_until is None:
                entry.retry_until = now + RETRY_FOR_S
                log.warning("adapter %s could not be loaded and is retried: %s", entry.ref, error)
            if now >= entry.retry_until or not self._waiters[entry.ref] or not self._is_current(entry):
                return False
        self._retry_queue.put((now + RETRY_EVERY_S, entry))
        return True

    def _run_retries(self) -> None:
        while (item := self._retry_queue.get()) is not None:
            at, entry = item
            time.sleep(max(0.0, at - time.monotonic()))
            self._load_queue.put(entry)

    def _make_ready(self, entry: PooledAdapter[A], adapter: A) -> None:
        """Make the loaded adapter ready as soon as it fits."""
        with self._changed:
            if adapter.nbytes > self.budget_bytes:
                log.warning("adapter %s takes %d bytes of %d for all", entry.ref, adapter.nbytes, self.budget_bytes)
                raise AdapterError("it is larger than the engine's memory for adapters; train a smaller one")
            while self._is_current(entry) and not self._make_room(adapter.nbytes):
                if self._pinned_bytes + adapter.nbytes > self.budget_bytes:  # waiting would not help
                    log.warning(self._no_room(adapter.nbytes, entry.ref))  # tenants must not see these numbers
                    raise UnavailableError(
                        f"model: {without_digest(entry.ref)} has no room beside the pinned adapters; an operator must "
                        "unpin or unload one of them",
                        code=NO_ROOM,
                    )
                self._changed.wait()
            if not self._is_current(entry):
                return
            entry.adapter, entry.nbytes = adapter, adapter.nbytes
            entry.to(AdapterState.READY)
            self._loading -= 1
            self._used_bytes += entry.nbytes
            self._update_evictable(entry.ref)
            self._failures.pop(entry.ref, None)
            self._loads += 1
            self._changed.notify_all()

    def _no_room(self, nbytes: int, ref: str) -> str:
        return (
            f"adapter {ref!r} takes {nbytes:,} bytes, but pinned adapters hold {self._pinned_bytes:,} of the "
            f"{self.budget_bytes:,} bytes for all; unpin or unload one of them, or raise adapter_bytes"
        )

    def _fail(self, entry: PooledAdapter[A], error: PedroError) -> None:
        with self._changed:
            self._failed += 1
            if not self._is_current(entry):
                return
            past = self._failures.get(entry.ref)
            times = past.times + 1 if past else 1
            backoff_s = min(FIRST_BACKOFF_S * 2 ** (times - 1), LAST_BACKOFF_S)
            if len(self._failures) >= MAX_FAILURES:
                del self._failures[next(iter(self._failures))]
            self._failures[entry.ref] = Failure(error, times, time.monotonic() + backoff_s)
            self._new_failures.append((entry.ref, error))
            self._remove(entry)
            self._changed.notify_all()

    def _is_current(self, entry: PooledAdapter[A]) -> bool:
        """Whether this load still counts: its entry was not evicted meanwhile and the pool is open."""
        return not self._closed and self._entries.get(entry.ref) is entry

    def _make_room(self, nbytes: int) -> bool:
        """Evict until `nbytes` fit, least recently used first. False if pinned and referenced adapters prevent it."""
        if self.budget_bytes - self._used_bytes + self._evictable_bytes < nbytes:
            return False
        while self.budget_bytes - self._used_bytes < nbytes:
            self._remove(next(iter(self._evictable.values())))
            self._evictions += 1
        return True

    def _update_evictable(self, ref: str) -> None:
        """Add `ref` to the evictable entries as the most recently used, or remove it from them.

        A newly loaded adapter stays until its first waiter was served, else two could evict each other.
        """
        entry = self._entries.get(ref)
        if entry is None or entry.state is not AdapterState.READY:
            return
        fresh = entry.total_uses == 0 and self._waiters[ref] > 0
        may_go = not (entry.refcount or fresh or ref in self._pinned)
        if (ref in self._evictable) != may_go:
            self._evictable_bytes += entry.nbytes if may_go else -entry.nbytes
            if may_go:
                self._evictable[ref] = entry
            else:
                del self._evictable[ref]

    def _remove(self, entry: PooledAdapter[A]) -> None:
        """Remove an entry: gone, or draining while it has references."""
        del self._entries[entry.ref]
        if entry.state is AdapterState.LOADING:
            self._loading -= 1
            entry.to(AdapterState.GONE)
            return
        if self._evictable.pop(entry.ref, None) is not None:
            self._evictable_bytes -= entry.nbytes
        if entry.ref in self._pinned:
            self._give_back_pin(entry)
        if entry.refcount:
            entry.to(AdapterState.DRAINING)
            self._draining.append(entry)
        else:
            self._discard(entry)

    def _give_back_pin(self, entry: PooledAdapter[A]) -> None:
        """Free its bytes: loads that were refused for lack of them may be retried at once."""
        self._pinned.discard(entry.ref)
        self._pinned_bytes -= entry.nbytes
        for ref in [ref for ref, failure in self._failures.items() if failure.error.code == NO_ROOM]:
            del self._failures[ref]

    def _discard(self, entry: PooledAdapter[A]) -> None:
        """Drop an entry without references."""
        self._used_bytes -= entry.nbytes
        entry.to(AdapterState.GONE)


def may_pass(error: Exception) -> bool:
    """Whether a load with this error may succeed shortly: a store, a network or a disk is away."""
    return not isinstance(error, PedroError) or (
        isinstance(error, UnavailableError) and error.code == UnavailableError.code
    )


def as_answered(ref: str, error: Exception) -> PedroError:
    """The error for a request whose adapter version could not be loaded."""
    if isinstance(error, PedroError) and not may_pass(error):
        return error if error.status >= 500 else unusable(ref, error)
    return UnavailableError(
        f"model: {without_digest(ref)} could not be loaded now; try again later",
        param="model",
        code="adapter_unavailable",
    )


def unusable(ref: str, error: PedroError) -> AdapterUnusableError:
    """The error for a request whose adapter version cannot be served: the version is at fault, not the request."""
    return AdapterUnusableError(f"model: {without_digest(ref)} cannot be served: {error.message}", param="model")
