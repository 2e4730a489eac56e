"""Resolves a model's name to the adapter version that it means now.

Aliases are read from the registry every `interval_s`; a name is resolved to one immutable version when a request
is admitted, so a request never sees two versions. A name deleted and made again is another name.
"""

from __future__ import annotations

import asyncio
import logging
import time
from functools import partial

from pedro.errors import AdapterError, NotFoundError, UnavailableError, model_not_found
from pedro.gateway.backend import ALL_TENANTS
from pedro.refs import ModelRef, tenant_of
from pedro.registry import CHAMPION, RegisteredAdapter, Registry, Version

STALE_AFTER_S = 30.0
PATIENCE_S = 1.0  # how long a request waits to hear that a version it names by number still exists
Key = tuple[str, int, int]  # name, when it was made, version: a name made again shares nothing with the old one
log = logging.getLogger("pedro.serving")


class ModelResolver:
    """Resolves names for one serving process; `watch` runs for as long as the process serves."""

    def __init__(self, registry: Registry, backbone_id: str, backbone_digest: str, interval_s: float) -> None:
        self._registry = registry
        self._backbone_id = backbone_id
        self._backbone_digest = backbone_digest
        self._interval_s = interval_s
        self._entries: dict[str, RegisteredAdapter] = {}
        self._versions: dict[Key, tuple[float, Version]] = {}
        self._asking: dict[Key, asyncio.Task[Version]] = {}
        self._stamp: object | None = None
        self._read_at: float | None = None

    @property
    def fresh(self) -> bool:
        """Whether the registry was read lately."""
        return self._read_at is not None and time.monotonic() - self._read_at < STALE_AFTER_S

    async def watch(self) -> None:
        """Read the aliases until cancelled; while the registry does not answer, the last state stays in force."""
        away = False
        while True:
            try:
                await self.refresh()
                if away:
                    log.warning("the registry answers again")
                away = False
            except Exception:
                if not away:
                    log.warning("the registry does not answer; serving the aliases of the last reading", exc_info=True)
                away = True
            await asyncio.sleep(self._interval_s)

    async def refresh(self) -> None:
        """Read the aliases once, unless the registry says that nothing in it has changed since."""
        stamp = await asyncio.to_thread(self._registry.stamp)
        if stamp is not None and stamp == self._stamp:
            self._read_at = time.monotonic()
            return
        entries = await asyncio.to_thread(self._registry.catalog)
        live = {(name, entry.created) for name, entry in entries.items()}
        self._versions = {key: held for key, held in self._versions.items() if key[:2] in live}
        self._entries, self._stamp = entries, stamp  # the stamp is older than the reading, never newer
        self._read_at = time.monotonic()

    async def resolve(self, tenant: str, model: str) -> Version:
        """The version that `model` means to `tenant` now.

        Raises the uniform 404 for an unknown name and for a foreign one alike, UnavailableError while the registry
        was never read, AdapterError for an adapter of another backbone.
        """
        try:
            ref = ModelRef.parse(model)
        except NotFoundError:
            raise model_not_found(model) from None
        if ref.digest or not visible(ref.name, tenant):  # which weights a name means is the registry's to say
            raise model_not_found(model)
        if self._read_at is None:
            raise UnavailableError("the model catalogue is not loaded yet; try again in a moment")
        entry = self._entries.get(ref.name)
        if entry is None:
            raise model_not_found(model)
        if ref.version is not None:
            version = await self._version(ref.name, entry, ref.version, self._interval_s, model)
        else:
            number = entry.aliases.get(ref.alias or CHAMPION)
            if number is None:
                raise model_not_found(model)
            version = await self._version(ref.name, entry, number, float("inf"), model)
        if version.backbone_digest != self._backbone_digest:
            raise AdapterError(
                f"model: '{model}' was trained on backbone {version.backbone_id} ({version.backbone_digest}), but this "
                f"server runs {self._backbone_id} ({self._backbone_digest}); serve that one (`pedro serve --backbone "
                f"{version.backbone_id}`) or train it again on this one",
                param="model",
            )
        return version

    async def champions(self, tenant: str) -> list[Version]:
        """The champions that `tenant` may call, by name, those of other backbones left out."""
        champions = []
        for name, entry in sorted(self._entries.items()):
            if visible(name, tenant) and CHAMPION in entry.aliases:
                try:
                    version = await self._version(name, entry, entry.aliases[CHAMPION], float("inf"), name)
                except NotFoundError:  # deleted since the last reading
                    continue
                if version.backbone_digest == self._backbone_digest:
                    champions.append(version)
        return champions

    async def _version(self, name: str, entry: RegisteredAdapter, number: int, max_age_s: float, model: str) -> Version:
        """A version's record; an explicit number is asked for again once `max_age_s` has passed: it may be deleted.

        Any number of requests wait for one question. While the registry is away, what is known stays in force.
        """
        key = (name, entry.created, number)
        held = self._versions.get(key)
        if held is not None and time.monotonic() - held[0] <= max_age_s:
            return held[1]
        asking = self._asking.get(key)
        if asking is None:
            asking = self._asking[key] = asyncio.create_task(self._ask(key))
            asking.add_done_callback(partial(self._answered, key))
        await asyncio.wait({asking}, timeout=None if held is None else PATIENCE_S)
        error = asking.exception() if asking.done() else None
        if isinstance(error, NotFoundError):
            raise model_not_found(model)
        if asking.done() and error is None:
            return asking.result()
        if held is None:
            raise UnavailableError("the adapter registry does not answer; try again in a moment") from error
        return held[1]

    async def _ask(self, key: Key) -> Version:
        """The version's record as the registry has it now, kept for the next who asks."""
        name, _, number = key
        try:
            version = await asyncio.to_thread(self._registry.get, name, number)
        except NotFoundError:
            self._versions.pop(key, None)
            raise
        self._versions[key] = (time.monotonic(), version)
        return version

    def _answered(self, key: Key, asking: asyncio.Task[Version]) -> None:
        self._asking.pop(key, None)
        if not asking.cancelled():
            asking.exception()  # it may be that nobody waits for it any more


def visible(name: str, tenant: str) -> bool:
    """Whether the adapter `name` is one of `tenant`'s."""
    return tenant in (ALL_TENANTS, tenant_of(name))
