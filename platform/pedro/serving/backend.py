"""The gateway's backend on Ray Serve: names resolved here, tokens made by an engine replica. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import calendar
import logging
import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from ray.exceptions import RayActorError

from pedro.errors import PedroError, ScopeError, UnavailableError, model_not_found
from pedro.gateway.backend import AdapterCard, Delta, GenerateCall, ModelCard, VersionCard
from pedro.registry import Registry, Version
from pedro.serving.catalog import EVERYONE, Catalog

ATTEMPTS = 3
log = logging.getLogger("pedro.serving")


class ServeBackend:
    """Conforms to `pedro.gateway.backend.Backend`."""

    def __init__(self, model_name: str, max_model_len: int, catalog: Catalog, registry: Registry, engine: Any) -> None:
        self._model_name = model_name
        self.max_model_len = max_model_len
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
        """Deltas of the call, in slices of time as the replica sends them.

        A call whose replica dies is issued again, from the token it had come to: the same version, conditioning and
        seed, so the answer is the one it would have been. Several choices begin again, unless some were sent already.
        """
        ref = None
        if call.model != self._model_name:
            ref = ref_of(await self._catalog.resolve(call.tenant, call.model))
        self._check_size(call.prompt)
        if "seed" not in call.params:
            call = replace(call, params={**call.params, "seed": secrets.randbits(63)})
        sent: list[int] = []
        for attempt in range(1, ATTEMPTS + 1):
            last: Delta | None = None
            try:
                async with aclosing(self._stream(call, ref, tuple(sent))) as deltas:
                    async for last in deltas:
                        sent += last.token_ids[last.prompt_tokens if call.echo else 0 :]
                        if call.echo and call.n == 1:
                            call = replace(call, echo=False)  # sent now: not again
                        yield last
                return
            except RayActorError as error:
                if call.n == 1 and last is not None and last.finish_reason is not None:
                    return
                if attempt == ATTEMPTS or (call.n > 1 and sent):
                    raise UnavailableError(
                        "the engine that answered was lost; try again", code="replica_lost"
                    ) from error
                log.warning("request %s: its replica died after %d tokens; issued again", call.request_id, len(sent))

    async def _stream(
        self, call: GenerateCall, ref: str | None, resumed: tuple[int, ...]
    ) -> AsyncGenerator[Delta, None]:
        """The call on one replica."""
        stream = self._engine.options(stream=True).generate.remote(call, ref, resumed)
        try:
            async for piece in stream:
                if isinstance(piece, PedroError):
                    raise piece
                for delta in piece:
                    yield delta
        finally:
            stream.cancel()

    def _check_size(self, prompt: str | tuple[int, ...] | None) -> None:
        """Refuse here what no replica could take, rather than carry it there."""
        if isinstance(prompt, tuple) and len(prompt) > self.max_model_len:
            raise PedroError(
                f"the prompt has {len(prompt):,} tokens, and the context is {self.max_model_len:,} tokens; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )

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
        return ModelCard(self._model_name, self._started, "pedro", self._model_name, max_model_len=self.max_model_len)

    def _card(self, name: str, version: Version) -> ModelCard:
        return ModelCard(
            id=name,
            created=calendar.timegm(time.strptime(version.created, "%Y-%m-%dT%H:%M:%SZ")),
            owned_by=version.tenant,
            backbone=self._model_name,
            version=version.version,
            digest=version.digest,
            max_model_len=self.max_model_len,
        )

    async def _adapter(self, name: str) -> AdapterCard:
        versions = await asyncio.to_thread(self._registry.versions, name)
        return AdapterCard(
            name=name,
            aliases={alias: version.version for version in versions for alias in version.aliases},
            versions=tuple(
                VersionCard(v.version, v.digest, v.created, v.method, v.gate, v.aliases, _numbers(v.metrics))
                for v in reversed(versions)
            ),
        )


def ref_of(version: Version) -> str:
    """The engine's reference: it names one version and its weights, so it can never mean others."""
    return f"{version.ref}#{version.digest}"


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """The metrics that are numbers; a version's record also says which split they are of."""
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}
