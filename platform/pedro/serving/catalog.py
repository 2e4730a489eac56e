"""What one server knows of adapters: looked up when first asked for, then kept up to date by the store's change feed.

Bounded in memory. A name that is not there is remembered as such until something of that name changes. While the
store is away, what is known stays in force.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

from pedro.errors import NotFoundError, UnavailableError
from pedro.refs import tenant_of
from pedro.store import ADAPTER, KnownAdapter, Position, Store, Version

MAX_KNOWN = 50_000  # adapters, each with the versions that its aliases name
MAX_MISSING = 20_000  # names, and as many versions
MAX_NUMBERED = 64  # versions of one adapter that were asked for by number
MAX_TOGETHER = 400  # names that are looked up in one question; those asked for meanwhile are the next one
Found = KnownAdapter | None


@dataclass
class _Question:
    """A name that is being looked up; `outdated` once it changed meanwhile."""

    answer: asyncio.Future[Found]
    outdated: bool = False


@dataclass
class AdapterCatalog:
    """The adapters of one store, for one event loop."""

    store: Store
    max_known: int = MAX_KNOWN
    read_at: float | None = None
    """When (`time.monotonic`) the feed was read last; None before."""
    _position: Position | None = None
    _known: OrderedDict[str, KnownAdapter] = field(default_factory=OrderedDict)
    _missing: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _no_version: OrderedDict[tuple[str, int], KnownAdapter] = field(default_factory=OrderedDict)
    """Versions that are not there, with the adapter as it was then: one that changed is another record."""
    _asked: dict[str, _Question] = field(default_factory=dict)
    _waiting: list[str] = field(default_factory=list)
    """Those of the names asked for that are in no question yet."""
    _asking: asyncio.Task[None] | None = None
    _following: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def follow(self) -> None:
        """Read what changed since the last time and look up again what of it is known. Raises UnavailableError."""
        async with self._following:  # the watcher, and who just moved an alias: what is older must not come last
            await self._follow()

    async def _follow(self) -> None:
        here = await asyncio.to_thread(self.store.position)
        if self._position is None:
            self._position = here
        elif here != self._position:
            delta = await asyncio.to_thread(self.store.changes, self._position)
            if delta.complete:
                changed = {subject for kind, subject in delta.changed if kind == ADAPTER}
            else:
                changed = {*self._known, *self._missing, *self._asked}
            await self._look_again(changed)
            self._position = delta.position if delta.complete else here
        self.read_at = time.monotonic()

    async def get(self, name: str) -> Found:
        """An adapter; None if there is none of that name. Raises UnavailableError where that cannot be known now."""
        known = self._known.get(name)
        if known is not None:
            self._known.move_to_end(name)
            return known
        if name in self._missing:
            return None
        question = self._asked.get(name)
        if question is None:
            question = self._asked[name] = _Question(asyncio.get_running_loop().create_future())
            question.answer.add_done_callback(_retrieve)
            self._waiting.append(name)
            if self._asking is None or self._asking.done():
                self._asking = asyncio.create_task(self._ask())
        return await asyncio.shield(question.answer)

    def known(self, name: str) -> Found:
        """An adapter as far as it is known already; nothing is looked up."""
        return self._known.get(name)

    async def version(self, name: str, number: int) -> Version | None:
        """A version by its number; None if there is none. Raises UnavailableError where that cannot be known now."""
        known = await self.get(name)
        if known is None:
            return None
        if number in known.versions:
            return known.versions[number]
        if self._no_version.get((name, number)) is known:
            return None
        try:
            version = await asyncio.to_thread(self.store.get_version, name, number)
        except NotFoundError:
            if self._known.get(name) is known:  # it did not change meanwhile
                self._no_version[name, number] = known
                _bound(self._no_version, MAX_MISSING)
            return None
        if len(known.versions) < MAX_NUMBERED:
            known.versions[number] = version
        return version

    async def of_tenant(self, tenant: str | None) -> list[KnownAdapter]:
        """All adapters of a tenant, or of all, by name; while the store is away, those that are known."""
        try:
            names = await asyncio.to_thread(self.store.list_adapters, tenant)
            found = await asyncio.to_thread(self.store.look_up, list(names))
        except UnavailableError:
            found = {name: known for name, known in self._known.items() if tenant in (None, tenant_of(name))}
        return [found[name] for name in sorted(found)]

    async def _ask(self) -> None:
        """Look up the names that wait, many in one question, until none is left."""
        while self._waiting:
            names, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
            for name in names:
                self._asked[name].outdated = False
            try:
                found = await asyncio.to_thread(self.store.look_up, names)
            except Exception as error:  # noqa: BLE001 (whoever asked is told)
                for name in names:
                    self._asked.pop(name).answer.set_exception(error)
                continue
            for name in names:
                if self._asked[name].outdated:  # it changed between the asking and the answer
                    self._waiting.append(name)
                else:
                    self._remember(name, found.get(name))
                    self._asked.pop(name).answer.set_result(found.get(name))

    async def _look_again(self, changed: Collection[str]) -> None:
        for name in changed:
            self._missing.pop(name, None)
            if name in self._asked:
                self._asked[name].outdated = True
        names = [name for name in changed if name in self._known]
        for start in range(0, len(names), MAX_TOGETHER):
            some = names[start : start + MAX_TOGETHER]
            found = await asyncio.to_thread(self.store.look_up, some)
            for name in some:
                if name not in found:
                    self._known.pop(name, None)
                elif name in self._known:
                    self._known[name] = found[name]

    def _remember(self, name: str, found: Found) -> None:
        if found is None:
            self._missing[name] = None
        else:
            self._known[name] = found
        _bound(self._known, self.max_known)
        _bound(self._missing, MAX_MISSING)


def _bound(held: OrderedDict[Any, Any], most: int) -> None:
    while len(held) > most:
        held.popitem(last=False)


def _retrieve(answer: asyncio.Future[Found]) -> None:
    """It may be that nobody waits for it any more."""
    if not answer.cancelled():
        answer.exception()
