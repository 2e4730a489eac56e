"""Makes a replica drop deleted adapter versions: from memory, and from this host's cache.

Follows the store's change feed. A request that uses such a version keeps it in memory until it ends. If the feed cannot
say what changed, for instance after a tenant was erased, cached prompts are dropped, too: names may have new owners.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from pedro.errors import NotFoundError
from pedro.refs import ModelRef
from pedro.store import ADAPTER, CHAMPION
from pedro.stored_files import remove

if TYPE_CHECKING:
    from pedro.registry import Registry
    from pedro.store import Position, Store

LOOK_EVERY_S = 5.0
DISK_EVERY_S = 30.0  # minimum interval between comparisons of the cache with the store
log = logging.getLogger("pedro.serving")


class GoneVersions:
    """Runs on a thread until `close`. `residents` lists what is in memory, `evict` removes one; `forget_prompts` drops
    all cached prompts."""

    def __init__(
        self,
        registry: Registry,
        residents: Callable[[], Collection[str]],
        evict: Callable[[str], object],
        forget_prompts: Callable[[], None],
    ) -> None:
        self._registry = registry
        self._residents, self._evict, self._forget_prompts = residents, evict, forget_prompts
        self._seen: Position | None = None
        self._disk_due, self._disk_at = False, 0.0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gone-versions", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._over.set()

    def _watch(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            try:
                self.look()
            except Exception:
                log.debug("deleted versions are unknown now; retrying", exc_info=True)

    def look(self) -> None:
        """Drop versions deleted since the last call. Raises UnavailableError."""
        store = self._registry.store
        here = store.position()
        if here != self._seen:
            delta = None if self._seen is None else store.changes(self._seen)
            complete = delta is not None and delta.complete
            names = {subject for kind, subject in delta.changed if kind == ADAPTER} if delta and complete else None
            if delta is not None and not complete:
                self._forget_prompts()
            self._evict_of(store, names)
            self._disk_due = self._disk_due or names is None or bool(names)
            self._seen = here
        if self._disk_due and time.monotonic() >= self._disk_at:
            self.sweep_cache()
            self._disk_due, self._disk_at = False, time.monotonic() + DISK_EVERY_S

    def sweep_cache(self) -> None:
        """Remove this host's copies of deleted versions. Raises UnavailableError."""
        folder = self._registry.adapter_cache
        try:  # listed first: copies are only made of versions in the store
            cached = [name for name in os.listdir(folder) if not name.startswith(".")]
        except OSError:
            return
        runs = {name.rpartition("-")[2] for name in cached}
        known = {self._registry.cached(*content).name for content in self._registry.store.content_in_use(runs)}
        for name in cached:
            if name not in known:
                remove(str(folder / name))

    def _evict_of(self, store: Store, names: Collection[str] | None) -> None:
        """Remove deleted versions of these adapters, or of all, from memory."""
        for resident in self._residents():
            ref = ModelRef.parse(resident)
            if (names is None or ref.name in names) and not _is_there(store, ref):
                self._evict(resident)


def _is_there(store: Store, ref: ModelRef) -> bool:
    try:
        version = store.get_version(ref.name, ref.version or CHAMPION)
    except NotFoundError:
        return False
    return ref.digest in ("", version.digest)
