"""Resolves a model's name to an adapter version.

Names are kept in sync with the store every `interval_s`, or at once if it notifies. A name is resolved to one immutable
version when a request is admitted, so a request never sees two versions. A name that was deleted and created again
counts as a new one.

One server's cache of adapters (`AdapterCatalog`) is filled on demand and kept current by the store's change feed. Its
memory is bounded. Unknown names are cached as such until they change. While the store is away, cached data stay valid.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

from pedro.errors import AdapterError, NotFoundError, UnavailableError, model_not_found
from pedro.gateway.backend import ALL_TENANTS
from pedro.refs import ModelRef, tenant_of
from pedro.registry import CHAMPION, Registry, Version
from pedro.store import ADAPTER, KnownAdapter, Position, Store

STALE_AFTER_S = 10.0
MAX_KNOWN = 50_000  # adapters, each with the versions of its aliases
MAX_MISSING = 20_000  # unknown names, and as many versions
MAX_NUMBERED = 64  # versions of one adapter requested by number
MAX_TOGETHER = 400  # names looked up in one query; later ones go into the next
Found = KnownAdapter | None
Share = Callable[[int], float]
log = logging.getLogger("pedro.serving")


class ModelResolver:
    """Resolves names for one serving process; `watch` runs for as long as the process serves."""

    def __init__(self, registry: Registry, backbone_id: str, backbone_digest: str, interval_s: float) -> None:
        self._registry = registry
        self._backbone_id = backbone_id
        self._backbone_digest = backbone_digest
        self._interval_s = interval_s
        self._catalog: AdapterCatalog | None = None

    @property
    def loaded(self) -> bool:
        """Whether the store has ever been read."""
        return self._read_at is not None

    @property
    def fresh(self) -> bool:
        """Whether the store was read recently."""
        return self._read_at is not None and time.monotonic() - self._read_at < STALE_AFTER_S

    @property
    def _read_at(self) -> float | None:
        return None if self._catalog is None else self._catalog.read_at

    async def watch(self) -> None:
        """Follow the store until cancelled; while it does not answer, the last state stays valid."""
        away = False
        while True:
            try:
                await self.refresh()
                if away:
                    log.warning("the platform's database answers again")
                away = False
            except Exception:
                if not away:
                    log.warning("the platform's database does not answer; serving from what is cached", exc_info=True)
                away = True
            if self._catalog is None or self._catalog.store.is_file:
                await asyncio.sleep(self._interval_s)
            else:
                await asyncio.to_thread(self._catalog.store.wait_for_change, self._interval_s)

    async def refresh(self) -> None:
        """Apply changes since the last call. Raises UnavailableError."""
        if self._catalog is None:
            self._catalog = AdapterCatalog(await asyncio.to_thread(lambda: self._registry.store))
        await self._catalog.follow()

    async def resolve(self, tenant: str, model: str, share: Share | None = None) -> Version:
        """The version to which `model` resolves for `tenant` now.

        `share` gives a request's position, from 0 to 1, in the split with a canary, which gets the lowest. Without it
        the champion is used. Raises the uniform 404 for unknown names and other tenants' alike, UnavailableError while
        the name cannot be resolved, AdapterError for an adapter of another backbone.
        """
        try:
            ref = ModelRef.parse(model)
        except NotFoundError:
            raise model_not_found(model) from None
        if ref.digest or not visible(ref.name, tenant):  # only the store determines the weights of a name
            raise model_not_found(model)
        if self._catalog is None or not self.loaded:
            raise UnavailableError("the model catalogue is not loaded yet; try again in a moment")
        known = await self._catalog.get(ref.name)
        number = None if known is None else _meant(ref, known, share)
        version = None if number is None else await self._catalog.version(ref.name, number)
        if version is None:
            raise model_not_found(model)
        if version.backbone_digest != self._backbone_digest:
            raise AdapterError(
                f"model: '{model}' was trained on backbone {version.backbone_id} ({version.backbone_digest}), but this "
                f"server runs {self._backbone_id} ({self._backbone_digest}); serve that one (`pedro serve --backbone "
                f"{version.backbone_id}`) or train it again on this one",
                param="model",
            )
        return version

    def shadow_of(self, version: Version) -> tuple[Version, float] | None:
        """The shadow of a version, with its share; None if there is none, or it is not the champion."""
        known = None if self._catalog is None else self._catalog.known(version.name)
        shadow = None if known is None else known.adapter.standing.shadow
        if known is None or shadow is None or known.adapter.aliases.get(CHAMPION) != version.version:
            return None
        found = known.versions.get(shadow.version)
        return None if found is None or found.backbone_digest != self._backbone_digest else (found, shadow.weight)

    async def champions(self, tenant: str) -> list[Version]:
        """The champions that `tenant` may call, by name, without those of other backbones."""
        if self._catalog is None:
            return []
        adapters = await self._catalog.of_tenant(None if tenant == ALL_TENANTS else tenant)
        champions = [known.versions.get(known.adapter.aliases.get(CHAMPION, 0)) for known in adapters]
        return [one for one in champions if one is not None and one.backbone_digest == self._backbone_digest]


@dataclass
class _Question:
    """A name being looked up; `outdated` if it changed meanwhile."""

    answer: asyncio.Future[Found]
    outdated: bool = False


@dataclass
class AdapterCatalog:
    """The adapters of one store, for one event loop."""

    store: Store
    max_known: int = MAX_KNOWN
    read_at: float | None = None
    """When (`time.monotonic`) the feed was last read; None if never."""
    _position: Position | None = None
    _known: OrderedDict[str, KnownAdapter] = field(default_factory=OrderedDict)
    _missing: OrderedDict[str, None] = field(default_factory=OrderedDict)
    _no_version: OrderedDict[tuple[str, int], KnownAdapter] = field(default_factory=OrderedDict)
    """Missing versions, with the adapter's record at that time, which is replaced if it changes."""
    _asked: dict[str, _Question] = field(default_factory=dict)
    _waiting: list[str] = field(default_factory=list)
    """Requested names that are not in a query yet."""
    _asking: asyncio.Task[None] | None = None
    _following: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def follow(self) -> None:
        """Read changes since the last call and look up those of cached names again. Raises UnavailableError."""
        async with self._following:  # the watcher and moves of aliases: older data must not come last
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
        """An adapter; None if there is none of that name. Raises UnavailableError if the store does not answer."""
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
        """An adapter if cached; without a lookup."""
        return self._known.get(name)

    async def version(self, name: str, number: int) -> Version | None:
        """A version by number; None if there is none. Raises UnavailableError if the store does not answer."""
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
            if self._known.get(name) is known:  # unchanged meanwhile
                self._no_version[name, number] = known
                _bound(self._no_version, MAX_MISSING)
            return None
        if len(known.versions) < MAX_NUMBERED:
            known.versions[number] = version
        return version

    async def of_tenant(self, tenant: str | None) -> list[KnownAdapter]:
        """All adapters of a tenant, or of all, by name; while the store is away, the cached ones."""
        try:
            names = await asyncio.to_thread(self.store.list_adapters, tenant)
            found = await asyncio.to_thread(self.store.look_up, list(names))
        except UnavailableError:
            found = {name: known for name, known in self._known.items() if tenant in (None, tenant_of(name))}
        return [found[name] for name in sorted(found)]

    async def _ask(self) -> None:
        """Look up the requested names, many per query, until none is left."""
        while self._waiting:
            names, self._waiting = self._waiting[:MAX_TOGETHER], self._waiting[MAX_TOGETHER:]
            for name in names:
                self._asked[name].outdated = False
            try:
                found = await asyncio.to_thread(self.store.look_up, names)
            except Exception as error:  # noqa: BLE001 (passed to the callers)
                for name in names:
                    self._asked.pop(name).answer.set_exception(error)
                continue
            for name in names:
                if self._asked[name].outdated:  # it changed during the query
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


def _meant(ref: ModelRef, known: KnownAdapter, share: Share | None) -> int | None:
    """The version number of a name."""
    if ref.version is not None:
        return ref.version
    standing = known.adapter.standing
    canary = standing.canary
    if canary and share and ref.alias in (None, CHAMPION) and share(canary.version) < canary.weight:
        return canary.version
    return standing.aliases.get(ref.alias or CHAMPION)


def visible(name: str, tenant: str) -> bool:
    """Whether the adapter `name` belongs to `tenant`."""
    return tenant in (ALL_TENANTS, tenant_of(name))


def _bound(held: OrderedDict[Any, Any], most: int) -> None:
    while len(held) > most:
        held.popitem(last=False)


def _retrieve(answer: asyncio.Future[Found]) -> None:
    """Retrieve a result that may no longer be awaited."""
    if not answer.cancelled():
        answer.exception()
