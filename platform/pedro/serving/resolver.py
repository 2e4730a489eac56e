"""Resolves a model's name to the adapter version that it means now.

What names mean is followed in the store every `interval_s`, at once where it notifies; a name is resolved to one
immutable version when a request is admitted, so a request never sees two versions. A name deleted and made again is
another name.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pedro.errors import AdapterError, NotFoundError, UnavailableError, model_not_found
from pedro.gateway.backend import ALL_TENANTS
from pedro.refs import ModelRef, tenant_of
from pedro.registry import CHAMPION, Registry, Version
from pedro.serving.catalog import AdapterCatalog

if TYPE_CHECKING:
    from pedro.store import KnownAdapter

STALE_AFTER_S = 10.0
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
        """Whether the store was ever read."""
        return self._read_at is not None

    @property
    def fresh(self) -> bool:
        """Whether the store was read lately."""
        return self._read_at is not None and time.monotonic() - self._read_at < STALE_AFTER_S

    @property
    def _read_at(self) -> float | None:
        return None if self._catalog is None else self._catalog.read_at

    async def watch(self) -> None:
        """Follow the store until cancelled; while it does not answer, the last state stays in force."""
        away = False
        while True:
            try:
                await self.refresh()
                if away:
                    log.warning("the platform's database answers again")
                away = False
            except Exception:
                if not away:
                    log.warning("the platform's database does not answer; serving what is known of it", exc_info=True)
                away = True
            if self._catalog is None or self._catalog.store.is_file:
                await asyncio.sleep(self._interval_s)
            else:
                await asyncio.to_thread(self._catalog.store.wait_for_change, self._interval_s)

    async def refresh(self) -> None:
        """Hear what changed since the last time. Raises UnavailableError."""
        if self._catalog is None:
            self._catalog = AdapterCatalog(await asyncio.to_thread(lambda: self._registry.store))
        await self._catalog.follow()

    async def resolve(self, tenant: str, model: str, share: Share | None = None) -> Version:
        """The version that `model` means to `tenant` now.

        `share` says where a request stands among those that a canary, named by its version, has the first of: from 0
        to 1. Without it the champion is meant.
        Raises the uniform 404 for an unknown name and for a foreign one alike, UnavailableError while what it means
        cannot be known, AdapterError for an adapter of another backbone.
        """
        try:
            ref = ModelRef.parse(model)
        except NotFoundError:
            raise model_not_found(model) from None
        if ref.digest or not visible(ref.name, tenant):  # which weights a name means is the store's to say
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
        """What stands in the shadow of a version, with its share; None where nothing does, or it is no champion."""
        known = None if self._catalog is None else self._catalog.known(version.name)
        shadow = None if known is None else known.adapter.standing.shadow
        if known is None or shadow is None or known.adapter.aliases.get(CHAMPION) != version.version:
            return None
        found = known.versions.get(shadow.version)
        return None if found is None or found.backbone_digest != self._backbone_digest else (found, shadow.weight)

    async def champions(self, tenant: str) -> list[Version]:
        """The champions that `tenant` may call, by name, those of other backbones left out."""
        if self._catalog is None:
            return []
        adapters = await self._catalog.of_tenant(None if tenant == ALL_TENANTS else tenant)
        champions = [known.versions.get(known.adapter.aliases.get(CHAMPION, 0)) for known in adapters]
        return [one for one in champions if one is not None and one.backbone_digest == self._backbone_digest]


def _meant(ref: ModelRef, known: KnownAdapter, share: Share | None) -> int | None:
    """The number of the version that a name means."""
    if ref.version is not None:
        return ref.version
    standing = known.adapter.standing
    canary = standing.canary
    if canary and share and ref.alias in (None, CHAMPION) and share(canary.version) < canary.weight:
        return canary.version
    return standing.aliases.get(ref.alias or CHAMPION)


def visible(name: str, tenant: str) -> bool:
    """Whether the adapter `name` is one of `tenant`'s."""
    return tenant in (ALL_TENANTS, tenant_of(name))
