"""Makes a replica drop adapter versions that were deleted: in memory, and in this host's cache.

Follows the store's change feed. A request that holds such a version keeps it in memory to its end. Where the feed
cannot tell what changed, as after a tenant was erased, what was kept of prompts goes, too: a name may be another's now.
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
DISK_EVERY_S = 30.0  # the cache is compared with the store at most so often
log = logging.getLogger("pedro.serving")


class GoneVersions:
    """Looks on a thread of its own until `close`. `residents` names what is in memory, `evict` takes one out;
    `forget_prompts` drops what was kept of anybody's."""

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
                log.debug("what was deleted cannot be known now; asked again", exc_info=True)

    def look(self) -> None:
        """Let go of what was deleted since the last look. Raises UnavailableError."""
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
        """Remove this host's copies of versions that are gone. Raises UnavailableError."""
        folder = self._registry.adapter_cache
        try:  # listed first: a copy is made only of a version that the store has
            cached = [name for name in os.listdir(folder) if not name.startswith(".")]
        except OSError:
            return
        runs = {name.rpartition("-")[2] for name in cached}
        known = {self._registry.cached(*content).name for content in self._registry.store.content_in_use(runs)}
        for name in cached:
            if name not in known:
                remove(str(folder / name))

    def _evict_of(self, store: Store, names: Collection[str] | None) -> None:
        """Take versions of these adapters, or of all, out of memory where they are gone."""
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
