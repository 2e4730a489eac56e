"""The backend for a key that is restricted to some adapters: other names do not exist for it.

A name is refused before any lookup, so neither the answer nor its time reveals whether it exists.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, Any

from pedro.errors import NotFoundError, PedroError, model_not_found
from pedro.refs import ModelRef

if TYPE_CHECKING:
    from pedro.gateway.backend import (
        AdapterCard,
        AdapterResidence,
        Backend,
        Delta,
        GenerateCall,
        ModelCard,
        TokenizeResult,
    )
    from pedro.store import Actor


class AllowedBackend:
    """Implements `Backend`. `names`: the allowed adapters, as `tenant.adapter`, with any alias or version."""

    def __init__(self, backend: Backend, names: frozenset[str]) -> None:
        self._backend = backend
        self._names = names

    async def list_models(self, tenant: str) -> list[ModelCard]:
        return [card for card in await self._backend.list_models(tenant) if card.id in self._names]

    async def get_model(self, tenant: str, name: str) -> ModelCard:
        return await self._backend.get_model(tenant, self._allowed(name))

    def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        return self._backend.generate(call) if self._allows(call.model) else _refuse(call.model)

    async def tokenize(
        self, tenant: str, model: str | None, prompt: str | tuple[Mapping[str, str], ...], add_special_tokens: bool
    ) -> TokenizeResult:
        return await self._backend.tokenize(tenant, self._named(model), prompt, add_special_tokens)

    async def detokenize(self, tenant: str, model: str | None, ids: tuple[int, ...]) -> str:
        return await self._backend.detokenize(tenant, self._named(model), ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        return await self._backend.tokenizer_info()

    async def list_adapters(self, tenant: str) -> list[AdapterCard]:
        return [card for card in await self._backend.list_adapters(tenant) if card.name in self._names]

    async def get_adapter(self, tenant: str, name: str) -> AdapterCard:
        return await self._backend.get_adapter(tenant, self._allowed(name))

    async def residents(self, tenant: str) -> list[AdapterResidence]:
        return [held for held in await self._backend.residents(tenant) if held.name in self._names]

    async def load_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return await self._backend.load_adapter(tenant, self._allowed(ref))

    async def pin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return await self._backend.pin_adapter(tenant, self._allowed(ref))

    async def unpin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return await self._backend.unpin_adapter(tenant, self._allowed(ref))

    async def unload_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return await self._backend.unload_adapter(tenant, self._allowed(ref))

    async def promote(
        self, tenant: str, name: str, version: int, *, expected: int | None = None, actor: Actor | None = None
    ) -> AdapterCard:
        return await self._backend.promote(tenant, self._allowed(name), version, expected=expected, actor=actor)

    async def rollback(self, tenant: str, name: str, *, actor: Actor | None = None) -> AdapterCard:
        return await self._backend.rollback(tenant, self._allowed(name), actor=actor)

    async def set_canary(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        return await self._backend.set_canary(tenant, self._allowed(name), version, weight, actor=actor)

    async def set_shadow(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        return await self._backend.set_shadow(tenant, self._allowed(name), version, weight, actor=actor)

    async def delete_version(
        self, tenant: str, name: str, version: int, *, unused: bool = False, actor: Actor | None = None
    ) -> None:
        await self._backend.delete_version(tenant, self._allowed(name), version, unused=unused, actor=actor)

    async def metrics(self) -> str:
        return await self._backend.metrics()

    async def ready(self) -> bool:
        return await self._backend.ready()

    async def degraded(self) -> bool:
        return await self._backend.degraded()

    def _allows(self, name: str) -> bool:
        try:
            return ModelRef.parse(name).name in self._names
        except NotFoundError:
            return False

    def _allowed(self, name: str) -> str:
        """Raises the 404 of an unknown model."""
        if not self._allows(name):
            raise model_not_found(name)
        return name

    def _named(self, model: str | None) -> str:
        """An omitted model would mean the backbone: require a name."""
        if model is None:
            raise PedroError(
                f"model: this key is restricted to {', '.join(sorted(self._names))}; name one", param="model"
            )
        return self._allowed(model)


async def _refuse(name: str) -> AsyncGenerator[Delta, None]:
    raise model_not_found(name)
    yield  # an async generator, like the backend's
