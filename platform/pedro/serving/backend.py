"""The gateway's backend on Ray Serve: names resolved here, tokens made by an engine replica. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import calendar
import time
from collections.abc import AsyncGenerator
from typing import Any

from pedro.errors import PedroError, ScopeError, UnavailableError, model_not_found
from pedro.gateway.backend import AdapterCard, Delta, GenerateCall, ModelCard, VersionCard
from pedro.registry import Registry, Version
from pedro.serving.catalog import EVERYONE, Catalog


class ServeBackend:
    """Conforms to `pedro.gateway.backend.Backend`."""

    def __init__(self, model_name: str, max_model_len: int, catalog: Catalog, registry: Registry, engine: Any) -> None:
        self._model_name = model_name
        self._max_model_len = max_model_len
        self._catalog = catalog
        self._registry = registry
        self._engine = engine
        self._started = int(time.time())

    async def list_models(self, tenant: str) -> list[ModelCard]:
        """The backbone, then the champions of the tenant."""
        return [self._backbone_card(), *(self._card(v.name, v) for v in await self._catalog.champions(tenant))]

    async def get_model(self, tenant: str, name: str) -> ModelCard:
        """The card of one name; the uniform 404 otherwise."""
        if name == self._model_name:
            return self._backbone_card()
        return self._card(name, await self._catalog.resolve(tenant, name))

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        """Deltas of the call, in slices of time as the replica sends them."""
        version = None
        if call.model != self._model_name:
            version = await self._catalog.resolve(call.tenant, call.model)
        stream = self._engine.options(stream=True).generate.remote(call, ref_of(version) if version else None)
        try:
            async for piece in stream:
                if isinstance(piece, PedroError):
                    raise piece
                for delta in piece:
                    yield delta
        finally:
            stream.cancel()

    async def list_adapters(self, tenant: str) -> list[AdapterCard]:
        """Every adapter with its versions, for operators."""
        names = await asyncio.to_thread(self._registry.models, None if tenant == EVERYONE else tenant)
        return [await self._adapter(name) for name in names]

    async def promote(self, tenant: str, name: str, version: int) -> AdapterCard:
        """Move the champion; every server of this registry follows within its watch interval."""
        self._own(tenant, name)
        await asyncio.to_thread(self._registry.promote, name, version)
        await self._catalog.refresh()
        return await self._adapter(name)

    async def rollback(self, tenant: str, name: str) -> AdapterCard:
        """Swap champion and previous."""
        self._own(tenant, name)
        await asyncio.to_thread(self._registry.rollback, name)
        await self._catalog.refresh()
        return await self._adapter(name)

    async def ready(self) -> bool:
        """The catalogue is known and a replica answers."""
        if not self._catalog.fresh:
            return False
        try:
            return bool(await self._engine.ready.remote())
        except Exception as error:
            raise UnavailableError("no engine replica answers yet") from error

    def _own(self, tenant: str, name: str) -> None:
        if tenant != EVERYONE and name.partition(".")[0] != tenant:
            raise model_not_found(name)
        if "." not in name:
            raise ScopeError(f"'{name}' is the backbone, which has no versions")

    def _backbone_card(self) -> ModelCard:
        return ModelCard(self._model_name, self._started, "pedro", self._model_name, max_model_len=self._max_model_len)

    def _card(self, name: str, version: Version) -> ModelCard:
        return ModelCard(
            id=name,
            created=calendar.timegm(time.strptime(version.created, "%Y-%m-%dT%H:%M:%SZ")),
            owned_by=version.tenant,
            backbone=self._model_name,
            version=version.version,
            digest=version.digest,
            max_model_len=self._max_model_len,
        )

    async def _adapter(self, name: str) -> AdapterCard:
        versions = await asyncio.to_thread(self._registry.versions, name)
        return AdapterCard(
            name=name,
            aliases={alias: version.version for version in versions for alias in version.aliases},
            versions=tuple(
                VersionCard(v.version, v.digest, v.created, v.method, v.gate, v.aliases, v.metrics)
                for v in reversed(versions)
            ),
        )


def ref_of(version: Version) -> str:
    """The engine's reference: it names one version and its weights, so it can never mean others."""
    return f"{version.ref}#{version.digest}"
