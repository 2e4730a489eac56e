"""The gateway's backend: resolves names here and generates tokens on an engine replica."""

from __future__ import annotations

import asyncio
import calendar
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pedro.errors import (
    AdapterError,
    ConflictError,
    NotFoundError,
    PedroError,
    ScopeError,
    UnavailableError,
    model_not_found,
)
from pedro.gateway.backend import (
    ALL_TENANTS,
    AdapterCard,
    AdapterResidence,
    Delta,
    GenerateCall,
    ModelCard,
    TokenizeResult,
)
from pedro.gateway.edge import of_gateway
from pedro.refs import ModelRef
from pedro.registry import CHAMPION, PREVIOUS, Registry, Version
from pedro.serving.canary_watch import CanaryWatch
from pedro.serving.cards import adapter_card
from pedro.serving.failover import SET_ASIDE_S, Retries, VersionFaults
from pedro.serving.metrics import merged
from pedro.serving.protocol import (
    ControlRequest,
    DescribeTokenizer,
    Detokenize,
    ListResidents,
    LoadAdapter,
    ReadMetrics,
    Tokenize,
    UnloadAdapter,
    UnpinAdapter,
)
from pedro.serving.resolver import ModelResolver, Share, visible
from pedro.serving.shadows import ChampionAnswer, Shadows, is_asked_too
from pedro.store import WHATEVER

if TYPE_CHECKING:
    from pedro.serving.router import ReplicaSet
    from pedro.sizes import SizeGauges
    from pedro.store import Actor, RegisteredAdapter

log = logging.getLogger("pedro.serving")


class ServeBackend:
    """Conforms to `pedro.gateway.backend.Backend`."""

    def __init__(
        self,
        model_name: str,
        max_model_len: int,
        resolver: ModelResolver,
        registry: Registry,
        replicas: ReplicaSet,
        timeout_s: float = 600.0,
        sizes: SizeGauges | None = None,
        gateway: str = "",
    ) -> None:
        """`gateway`: its name, as a label of its own metrics, if there are several."""
        self._gateway = gateway
        self._model_name = model_name
        self.max_model_len = max_model_len
        self._resolver = resolver
        self._registry = registry
        self._replicas = replicas
        self._timeout_s = timeout_s
        self._sizes = sizes
        self._faults = VersionFaults()
        self._retries = Retries(replicas, self._faults)
        self._canaries = CanaryWatch(registry, resolver)
        self._shadows = Shadows(registry, resolver, replicas, self._faults)
        self._started = int(time.time())

    async def list_models(self, tenant: str) -> list[ModelCard]:
        """The backbone, then the champions of the tenant."""
        return [self._backbone_card(), *(self._card(v.name, v) for v in await self._resolver.champions(tenant))]

    async def get_model(self, tenant: str, name: str) -> ModelCard:
        """The card of one name; otherwise the uniform 404."""
        if name == self._model_name:
            return self._backbone_card()
        return self._card(name, await self._resolver.resolve(tenant, name))

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        """Deltas of the call as the replica sends them, batched by time slices.

        If a name resolves to a version that cannot be served, the last version that answered under this name answers
        instead; versions requested by number are never replaced. Raises DeadlineError once the call's time is over.
        """
        self._check_size(call.prompt)
        if "seed" not in call.params:
            call = replace(call, params={**call.params, "seed": secrets.randbits(63)})
        until = time.monotonic() + min(call.timeout_s or self._timeout_s, self._timeout_s)
        split: list[int] = []  # the canary, if the request was split between it and the champion

        def share(canary: int) -> float:
            split.append(canary)
            return share_of(call, canary)

        version = await self._version(call.tenant, call.model, share)
        if call.meter is not None:
            call.meter.model = self._model_name if version is None else version.name
        if version is None:
            async with aclosing(self._retries.generate(call, None, until)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        answered = False
        ref = version.model_ref
        shadow = self._resolver.shadow_of(version)
        heard = ChampionAnswer() if shadow is not None and is_asked_too(call, *shadow) else None
        fault = self._faults.current(ref)
        if fault is None:
            try:
                async with aclosing(self._retries.generate(call, ref, until)) as deltas:
                    async for delta in deltas:
                        if not answered:
                            answered = True
                            self._faults.served(call.model, version, ref)
                        if heard is not None:
                            heard.add(delta)
                        yield delta
                        if heard is not None:
                            heard.go_on()
                if shadow is not None and heard is not None:
                    self._shadows.ask_too(call, version, shadow[0], heard)
                if split:
                    self._canaries.note(version, None)
                return
            except Exception as error:
                if split:
                    self._canaries.note(version, error)
                if not isinstance(error, PedroError) or answered or error.code not in SET_ASIDE_S:
                    raise
                self._faults.add(ref, error)
                fault = error
        elif split:
            self._canaries.note(version, fault)
        other = await self._stand_in(call, version)
        if other is None:
            raise fault.with_traceback(None)
        call = replace(call, request_id=f"{call.request_id}~other")
        async with aclosing(self._retries.generate(call, other.model_ref, until)) as deltas:
            async for delta in deltas:
                yield delta

    async def _stand_in(self, call: GenerateCall, version: Version) -> Version | None:
        """The version that replaces one that cannot be served: the last that answered, or the previous champion."""
        named = ModelRef.parse(call.model)
        if named.version is not None:
            return None
        good = self._faults.last_good(call.model)
        wanted = [] if good is None else [good.model_ref.without_digest]
        if named.alias in (None, CHAMPION):
            wanted += [replace(named, alias=CHAMPION), replace(named, alias=PREVIOUS)]  # of a canary, the champion
        for ref in wanted:
            with suppress(PedroError):
                candidate = await self._resolver.resolve(call.tenant, str(ref))
                if candidate.version != version.version and self._faults.current(candidate.model_ref) is None:
                    log.warning(
                        "%s is answered by %s, because %s cannot be served", call.model, candidate.ref, version.ref
                    )
                    return candidate
        return None

    def _check_size(self, prompt: str | tuple[int, ...] | None) -> None:
        """Refuse calls here that no replica could accept."""
        if isinstance(prompt, tuple) and len(prompt) > self.max_model_len:
            raise PedroError(
                f"the prompt has {len(prompt):,} tokens, and the context is {self.max_model_len:,} tokens; shorten it",
                param="prompt",
                code="context_length_exceeded",
            )

    async def list_adapters(self, tenant: str) -> list[AdapterCard]:
        """Every adapter with its versions."""
        whose = None if tenant == ALL_TENANTS else tenant
        found = await asyncio.to_thread(self._registry.all_versions, whose)
        adapters = await asyncio.to_thread(self._registry.store.list_adapters, whose)
        return await asyncio.to_thread(
            lambda: [self._adapter_card(name, versions, adapters.get(name)) for name, versions in found.items()]
        )

    async def promote(
        self, tenant: str, name: str, version: int, *, expected: int | None = None, actor: Actor | None = None
    ) -> AdapterCard:
        """Move the champion; every server of this registry follows within its watch interval."""
        self._own(tenant, name)
        await self._check_servable(name, version)
        wanted = WHATEVER if expected is None else expected
        await asyncio.to_thread(self._registry.promote, name, version, expected=wanted, actor=actor)
        await self._resolver.refresh()
        return await self._adapter(name)

    async def rollback(self, tenant: str, name: str, *, actor: Actor | None = None) -> AdapterCard:
        """Swap champion and previous."""
        self._own(tenant, name)
        expected = await self._check_servable(name, PREVIOUS)
        await asyncio.to_thread(self._registry.rollback, name, expected=expected, actor=actor)
        await self._resolver.refresh()
        return await self._adapter(name)

    async def set_canary(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        """Give a version a share of the champion's requests, or end it."""
        self._own(tenant, name)
        if weight:
            await self._check_servable(name, version)
        await asyncio.to_thread(self._registry.canary, name, version, weight, actor=actor)
        await self._resolver.refresh()
        return await self._adapter(name)

    async def set_shadow(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        """Send a version copies of a share of the champion's requests, or end it."""
        self._own(tenant, name)
        if weight:
            await self._check_servable(name, version)
        await asyncio.to_thread(self._registry.shadow, name, version, weight, actor=actor)
        await self._resolver.refresh()
        return await self._adapter(name)

    async def delete_version(
        self, tenant: str, name: str, version: int, *, unused: bool = False, actor: Actor | None = None
    ) -> None:
        """Delete one version; refused for the champion, or for any version with an alias, canary or shadow."""
        self._own(tenant, name)
        if unused:
            await asyncio.to_thread(self._registry.retire, name, version, actor=actor)
        else:
            await asyncio.to_thread(self._registry.delete, name, version, actor=actor)
        await self._resolver.refresh()

    async def get_adapter(self, tenant: str, name: str) -> AdapterCard:
        """One adapter with its versions; otherwise the uniform 404."""
        try:
            card = await self._adapter(name) if visible(name, tenant) else None
        except NotFoundError:  # not an adapter's name
            card = None
        if card is None or not card.versions:
            raise model_not_found(name)
        return card

    async def tokenize(
        self, tenant: str, model: str | None, prompt: str | tuple[Mapping[str, str], ...], add_special_tokens: bool
    ) -> TokenizeResult:
        """The ids of a text, or of messages as the model was trained to read them."""
        ref = await self._ref(tenant, model)
        return await self._replicas.ask(Tokenize(prompt, add_special_tokens, ref))

    async def detokenize(self, tenant: str, model: str | None, ids: tuple[int, ...]) -> str:
        """The text of the ids."""
        await self._ref(tenant, model)
        return await self._replicas.ask(Detokenize(ids))

    async def tokenizer_info(self) -> dict[str, Any]:
        """The backbone's tokenizer_config."""
        return await self._replicas.ask(DescribeTokenizer())

    async def residents(self, tenant: str) -> list[AdapterResidence]:
        """Every adapter version of `tenant` on a replica now."""
        residences = await self._ask_all(ListResidents())
        return [at for at in residences if visible(at.name, tenant)]

    async def load_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Make a version resident on every replica."""
        return await self._load(tenant, ref, pin=False)

    async def pin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Load it and prevent its eviction; replicas started later have no pins."""
        return await self._load(tenant, ref, pin=True)

    async def unpin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Let it be evicted again."""
        return await self._ask_all(UnpinAdapter(await self._version_ref(tenant, ref)))

    async def unload_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        """Free its memory, pinned or not."""
        return await self._ask_all(UnloadAdapter(await self._version_ref(tenant, ref)))

    async def metrics(self) -> str:
        """Prometheus text of every engine replica, and sizes of the home."""
        sizes = [] if self._sizes is None else [self._sizes.text()]
        own = [of_gateway(text, self._gateway) for text in (self._faults.metrics(), self._shadows.metrics())]
        return merged([*await self._replicas.ask_all(ReadMetrics()), *own, *sizes])

    async def ready(self) -> bool:
        """Whether the catalogue is loaded and a replica can take a call."""
        return self._resolver.loaded and self._replicas.ready

    async def degraded(self) -> bool:
        """Whether the catalogue was not refreshed recently."""
        return not self._resolver.fresh

    async def _ref(self, tenant: str, model: str | None) -> ModelRef | None:
        """The exact version of `model`, with its digest; None for the backbone."""
        version = await self._version(tenant, model)
        return None if version is None else version.model_ref

    async def _version(self, tenant: str, model: str | None, share: Share | None = None) -> Version | None:
        """The version of `model`; None for the backbone."""
        return None if model in (None, self._model_name) else await self._resolver.resolve(tenant, str(model), share)

    async def _version_ref(self, tenant: str, model: str) -> ModelRef:
        ref = await self._ref(tenant, model)
        if ref is None:
            raise ScopeError(f"'{model}' is the backbone, which is always loaded")
        return ref

    async def _load(self, tenant: str, ref: str, *, pin: bool) -> list[AdapterResidence]:
        residences = await self._ask_all(LoadAdapter(await self._version_ref(tenant, ref), pin))
        if not residences:
            raise UnavailableError("no engine replica answers; try again later", code="no_replica")
        return residences

    async def _ask_all(self, request: ControlRequest[list[AdapterResidence]]) -> list[AdapterResidence]:
        return [at for of_replica in await self._replicas.ask_all(request) for at in of_replica]

    async def _check_servable(self, name: str, which: int | str) -> int | None:
        """Let a replica load a version before it is champion, canary or shadow. Its number; None if there is none.

        Raises ConflictError if it cannot be served. If no replica answers, it is not checked: it must be possible to
        replace a champion that crashes them.
        """
        try:
            version = await asyncio.to_thread(self._registry.get, name, which)
        except NotFoundError:
            return None  # the registry reports what is missing
        try:
            await self._replicas.ask(LoadAdapter(version.model_ref))
        except AdapterError as error:
            raise ConflictError(
                f"{error.message.removeprefix('model: ')}; it does not become champion, canary or shadow",
                param="version",
            ) from error
        except UnavailableError as error:
            if error.code not in ("no_replica", "replica_lost"):
                raise
            log.warning("could not check whether %s can be served: %s", version.ref, error.message)
        return version.version

    def _own(self, tenant: str, name: str) -> None:
        if name == self._model_name:
            raise ScopeError(f"'{name}' is the backbone, which has no versions")
        if not visible(name, tenant):
            raise model_not_found(name)

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
        return await asyncio.to_thread(
            lambda: self._adapter_card(name, self._registry.versions(name), self._registry.store.get_adapter(name))
        )

    def _adapter_card(self, name: str, versions: list[Version], adapter: RegisteredAdapter | None) -> AdapterCard:
        """On a thread: reads the shadow's counts."""
        has_shadow = adapter is not None and adapter.standing.shadow is not None
        counted = self._registry.store.shadow_answers(name) if has_shadow else None
        return adapter_card(name, versions, adapter, self._faults.reason, counted)


def share_of(call: GenerateCall, canary: int) -> float:
    """A call's position in the canary split, from 0 to 1: the same for all requests of a user, else random per request,
    with all of its prompts. Each canary starts with different users."""
    whom = call.user or call.request_id.rpartition("-")[0]
    digest = hashlib.sha256(f"{call.model.partition('@')[0]}\n{canary}\n{whom}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48
