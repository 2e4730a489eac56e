"""A small real backend for the gateway's tests: deterministic tokens, several tenants, and a count of what it holds."""

from __future__ import annotations

import asyncio
import math
import struct
import threading
from collections.abc import AsyncGenerator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from pedro.errors import (
    ConflictError,
    NotFoundError,
    OverloadedError,
    PedroError,
    RateLimitError,
    UnavailableError,
    model_not_found,
)
from pedro.gateway.backend import (
    ALL_TENANTS,
    AdapterCard,
    AdapterResidence,
    Alternative,
    Delta,
    GenerateCall,
    ModelCard,
    TokenizeResult,
    TokenLogprob,
    VersionCard,
)

if TYPE_CHECKING:
    from pedro.store import Actor

BACKBONE = "words-1"
SECRET_TEXT = "internal-path-/srv/secret"  # must never reach a client


class WordBackend:
    """Repeats the words of the prompt for ever, one word a token; a word's id is its length.

    An embedding is 0.5 and the number of words; the prompt "long" is too long for one.
    Prompts that ask for trouble: "overload", "queue" (the tenant's own is full), "crash", "break" (an error of ours
    after two tokens), "refuse" (a PedroError after two tokens), "vanish" (the stream just ends after two tokens).
    """

    def __init__(self, token_s: float = 0.0) -> None:
        self.token_s = token_s
        self.first_token_s = 0.0
        self.is_ready, self.is_degraded = True, False
        self.allowed = math.inf  # how many tokens a call may give by now: what is held back can be seen as it runs
        self.running = 0
        self.freed = threading.Event()
        self.calls: list[GenerateCall] = []
        self.actors: list[Actor | None] = []
        self.engine_answers = True
        self.resident: dict[str, AdapterResidence] = {}
        versions = tuple(VersionCard(v, f"sha256:{v}", "2025-01-01T00:00:00Z", "pedro") for v in (2, 1))
        self.adapters = {
            "acme.support": AdapterCard("acme.support", {"champion": 1}, versions),
            "globex.faq": AdapterCard("globex.faq", {"champion": 2, "previous": 1}, versions),
        }

    async def list_models(self, tenant: str) -> list[ModelCard]:
        return [self._card(name) for name in (BACKBONE, *self._visible(tenant))]

    async def get_model(self, tenant: str, name: str) -> ModelCard:
        if name != BACKBONE and not self._has(tenant, name):
            raise model_not_found(name)
        return self._card(name)

    async def generate(self, call: GenerateCall) -> AsyncGenerator[Delta, None]:
        self.calls.append(call)
        await self.get_model(call.tenant, call.model)
        words = self._words(call)
        if words[0] == "overload":
            raise OverloadedError("The queue is full.")
        if words[0] == "queue":
            raise RateLimitError("3 of your requests are waiting and the limit is 3.")
        if words[0] == "crash":
            raise RuntimeError(SECRET_TEXT)
        self.running += 1
        try:
            await asyncio.sleep(self.first_token_s)
            if "pooling" in call.params:
                if words[0] == "long":
                    message = "the prompt has 65 tokens and exceeds the context of 64 tokens; shorten the prompt"
                    raise PedroError(message, param="prompt", code="context_length_exceeded")
                embedding = struct.pack("<2f", 0.5, len(words))
                yield Delta(0, "", (), "length", None, len(words), fingerprint="fp_1", embedding=embedding)
                return
            max_tokens = call.params.get("max_tokens", 8)
            if call.echo:
                for index in range(call.n):
                    delta = self._delta(call, index, words, first=True)
                    yield replace(delta, finish_reason=None if max_tokens else "length")
            for position in range(max_tokens):
                await asyncio.sleep(self.token_s)
                while position >= self.allowed:
                    await asyncio.sleep(0.002)
                if position == 2:
                    if words[0] == "break":
                        raise RuntimeError(SECRET_TEXT)
                    if words[0] == "refuse":
                        raise PedroError("The adapter went away.", code="adapter_gone")
                    if words[0] == "vanish":
                        return
                for index in range(call.n):
                    word = words[(position + index) % len(words)]
                    delta = self._delta(call, index, [word], generated=position + 1)
                    yield replace(delta, finish_reason="length" if position == max_tokens - 1 else None)
        finally:
            await asyncio.sleep(0.01)  # freeing takes a hop, and must not be cut short
            self.running -= 1
            self.freed.set()

    async def tokenize(
        self, tenant: str, model: str | None, prompt: str | tuple[Mapping[str, str], ...], add_special_tokens: bool
    ) -> TokenizeResult:
        await self.get_model(tenant, model or BACKBONE)
        if not isinstance(prompt, str):
            prompt = " ".join(f"{message['role']}: {message['content']}" for message in prompt)
        words = (["<s>"] if add_special_tokens else []) + prompt.split()
        return TokenizeResult(tuple(map(len, words)), 64, tuple(words))

    async def detokenize(self, tenant: str, model: str | None, ids: tuple[int, ...]) -> str:
        await self.get_model(tenant, model or BACKBONE)
        return " ".join("w" * token for token in ids)

    async def tokenizer_info(self) -> dict[str, Any]:
        return {"tokenizer_class": "Words", "eos_token": "</s>", "bos_token": "<s>", "pad_token": None}

    async def get_adapter(self, tenant: str, name: str) -> AdapterCard:
        return self._adapter(tenant, name)

    async def residents(self, tenant: str) -> list[AdapterResidence]:
        if not self.engine_answers:
            raise UnavailableError("No engine replica answers.")
        return [held for held in self.resident.values() if held.name in self._visible(tenant)]

    async def load_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return self._hold(tenant, ref, pinned=ref in self.resident and self.resident[ref].pinned)

    async def pin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return self._hold(tenant, ref, pinned=True)

    async def unpin_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        return self._hold(tenant, ref, pinned=False)

    async def unload_adapter(self, tenant: str, ref: str) -> list[AdapterResidence]:
        self._adapter(tenant, ref)
        self.resident.pop(ref, None)
        return []

    async def metrics(self) -> str:
        if not self.engine_answers:
            raise UnavailableError("No engine replica answers.")
        return "# TYPE pedro_engine_running gauge\npedro_engine_running 0.0\n"

    async def list_adapters(self, tenant: str) -> list[AdapterCard]:
        return [self.adapters[name] for name in self._visible(tenant)]

    async def promote(
        self, tenant: str, name: str, version: int, *, expected: int | None = None, actor: Actor | None = None
    ) -> AdapterCard:
        card = self._versioned(tenant, name, version)
        if expected not in (None, card.aliases["champion"]):
            raise ConflictError("The champion is another one by now.")
        self.actors.append(actor)
        aliases = {"champion": version, "previous": card.aliases["champion"]}
        self.adapters[name] = replace(card, aliases=aliases)
        return self.adapters[name]

    async def set_canary(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        card = self._versioned(tenant, name, version)
        self.actors.append(actor)
        self.adapters[name] = replace(card, canary={"version": version, "weight": weight} if weight else None)
        return self.adapters[name]

    async def set_shadow(
        self, tenant: str, name: str, version: int, weight: float, *, actor: Actor | None = None
    ) -> AdapterCard:
        card = self._versioned(tenant, name, version)
        self.actors.append(actor)
        self.adapters[name] = replace(card, shadow={"version": version, "weight": weight} if weight else None)
        return self.adapters[name]

    async def delete_version(
        self, tenant: str, name: str, version: int, *, unused: bool = False, actor: Actor | None = None
    ) -> None:
        card = self._versioned(tenant, name, version)
        if version == card.aliases["champion"] or (unused and version in card.aliases.values()):
            named = next(alias for alias, number in card.aliases.items() if number == version)
            raise ConflictError(f"'{name}:{version}' is the {named}.")
        self.actors.append(actor)
        self.adapters[name] = replace(
            card, versions=tuple(known for known in card.versions if known.version != version)
        )

    async def rollback(self, tenant: str, name: str, *, actor: Actor | None = None) -> AdapterCard:
        card = self._adapter(tenant, name)
        self.actors.append(actor)
        if "previous" not in card.aliases:
            raise ConflictError(f"'{name}' has no previous version.")
        aliases = {"champion": card.aliases["previous"], "previous": card.aliases["champion"]}
        self.adapters[name] = replace(card, aliases=aliases)
        return self.adapters[name]

    async def ready(self) -> bool:
        return self.is_ready

    async def degraded(self) -> bool:
        return self.is_degraded

    def _versioned(self, tenant: str, name: str, version: int) -> AdapterCard:
        card = self._adapter(tenant, name)
        if version not in {known.version for known in card.versions}:
            raise NotFoundError(f"'{name}' has no version {version}.", param="version")
        return card

    def _hold(self, tenant: str, ref: str, *, pinned: bool) -> list[AdapterResidence]:
        version = self._adapter(tenant, ref).aliases["champion"]
        digest = f"sha256:{version}"
        self.resident[ref] = AdapterResidence(ref, version, digest, "replica-1", "ready", 1000, pinned, 0)
        return [self.resident[ref]]

    def _visible(self, tenant: str) -> list[str]:
        return [name for name in self.adapters if tenant in (ALL_TENANTS, name.partition(".")[0])]

    def _adapter(self, tenant: str, name: str) -> AdapterCard:
        if name not in self._visible(tenant):
            raise model_not_found(name)
        return self.adapters[name]

    def _has(self, tenant: str, name: str) -> bool:
        adapter, _, version = name.partition(":")
        if adapter not in self._visible(tenant):
            return False
        return not version or version in {str(known.version) for known in self.adapters[adapter].versions}

    def _card(self, name: str) -> ModelCard:
        owner, version = "pedro", None
        if name != BACKBONE:
            adapter, _, number = name.partition(":")
            owner, version = adapter.partition(".")[0], int(number or self.adapters[adapter].aliases["champion"])
        return ModelCard(name, 1_700_000_000, owner, BACKBONE, version, max_model_len=64)

    def _words(self, call: GenerateCall) -> list[str]:
        if call.messages is not None:
            return " ".join(message["content"] for message in call.messages).split()
        if isinstance(call.prompt, str):
            return call.prompt.split()
        return ["w" * token for token in call.prompt or ()]

    def _delta(
        self, call: GenerateCall, index: int, words: list[str], *, generated: int = 0, first: bool = False
    ) -> Delta:
        logprobs = None
        if "logprobs" in call.params:
            top = (Alternative("best ", -0.25), Alternative("never ", float("-inf")))[: call.params["logprobs"]]
            logprobs = tuple(
                TokenLogprob(f"{word} ", None if first and at == 0 else -0.5, top) for at, word in enumerate(words)
            )
        return Delta(
            index=index,
            text="".join(f"{word} " for word in words),
            token_ids=tuple(len(word) for word in words),
            logprobs=logprobs,
            prompt_tokens=len(self._words(call)),
            completion_tokens=generated,
            fingerprint="fp_1",
        )
