"""Sends champions' requests to their shadows, after the answer was sent, and counts differences. For one event loop.

A shadow's answer is discarded and counts against no quota: it has no meter, and bypasses the gateway's routes and
ledger. In the engine it is part of its tenant's work and does not increase that tenant's share. One request is sent at
a time; while replicas are busy it waits, up to a limit.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import Counter, defaultdict, deque
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pedro.errors import OverloadedError, PedroError, UnavailableError
from pedro.refs import ModelRef
from pedro.registry import CHAMPION
from pedro.serving.failover import SET_ASIDE_S
from pedro.serving.protocol import ReplicaLost
from pedro.store import ShadowCounts

if TYPE_CHECKING:
    from pedro.gateway.backend import Delta, GenerateCall
    from pedro.registry import Registry, Version
    from pedro.serving.failover import VersionFaults
    from pedro.serving.resolver import ModelResolver
    from pedro.serving.router import ReplicaSet

MOST_WAITING = 16  # per tenant, independent of others
MOST_OF_ALL = 512
PATIENCE_S = 5.0
LOOK_S = 0.05
LIMIT_S = 120.0  # per answer; longer ones count as errors
FLUSH_EVERY_S = 5.0
MAX_SUMS = 1000  # pairs with unreported answers
log = logging.getLogger("pedro.serving")
Pair = tuple[str, int, int]
"""Adapter, shadow, champion."""


class ChampionAnswer:
    """A growing answer: the tokens of each choice, and the seconds spent waiting for them."""

    def __init__(self) -> None:
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.seconds = 0.0
        self._since = time.monotonic()

    def add(self, delta: Delta) -> None:
        self.seconds += time.monotonic() - self._since
        self.tokens[delta.index] += delta.token_ids

    def go_on(self) -> None:
        """Start timing the next delta, to exclude the time its reader spent on the last one."""
        self._since = time.monotonic()


@dataclass(frozen=True)
class _Asked:
    call: GenerateCall
    champion: Version
    shadow: Version
    heard: ChampionAnswer


class Shadows:
    """The shadows of one gateway's champions."""

    def __init__(
        self, registry: Registry, resolver: ModelResolver, replicas: ReplicaSet, faults: VersionFaults
    ) -> None:
        self._registry, self._resolver = registry, resolver
        self._replicas, self._faults = replicas, faults
        self._waiting: deque[_Asked] = deque()
        self._sums: dict[Pair, ShadowCounts] = {}
        self._outcomes: Counter[str] = Counter()
        self._worker: asyncio.Task[None] | None = None
        self._flushing: asyncio.Task[None] | None = None

    def ask_too(self, call: GenerateCall, champion: Version, shadow: Version, heard: ChampionAnswer) -> None:
        """Queue the champion's request for its shadow."""
        own = sum(asked.champion.tenant == champion.tenant for asked in self._waiting)
        if own >= MOST_WAITING or len(self._waiting) >= MOST_OF_ALL:
            self._note(champion, shadow, ShadowCounts(skipped=1))
            return
        self._waiting.append(_Asked(call, champion, shadow, heard))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def drain(self) -> None:
        """Wait until all queued requests are done and reported."""
        if self._worker is not None:
            await self._worker
        await self.flush()

    async def flush(self) -> None:
        """Report the sums to the store; while it is away, they are kept."""
        batch, self._sums = self._sums, {}
        for (name, shadow, champion), counts in batch.items():
            try:
                await asyncio.to_thread(self._registry.store.add_shadow_answers, name, shadow, champion, counts)
            except PedroError as error:
                log.warning("answers of the shadow of %s could not be reported and are kept: %s", name, error.message)
                self._add((name, shadow, champion), counts)

    def metrics(self) -> str:
        """Prometheus text."""
        name = "pedro_shadow_answers_total"
        help_text = "Requests copied to shadows, by outcome."
        lines = [f"# HELP {name} {help_text}", f"# TYPE {name} counter"]
        lines += [f'{name}{{outcome="{outcome}"}} {count}' for outcome, count in sorted(self._outcomes.items())]
        return "\n".join(lines) + "\n"

    async def _work(self) -> None:
        while self._waiting:
            asked = self._waiting.popleft()
            until = time.monotonic() + PATIENCE_S
            while self._replicas.load and time.monotonic() < until:
                await asyncio.sleep(LOOK_S)
            stands = self._resolver.shadow_of(asked.champion)
            if stands is not None and stands[0].model_ref == asked.shadow.model_ref:  # else removed meanwhile
                self._note(asked.champion, asked.shadow, await self._compared(asked))

    async def _compared(self, asked: _Asked) -> ShadowCounts:
        """The counts of one answer of a shadow. Handles any failure."""
        ref, heard = asked.shadow.model_ref, ChampionAnswer()
        if self._faults.current(ref) is not None:
            return ShadowCounts(errors=1)
        limit_s = min(asked.call.timeout_s or LIMIT_S, LIMIT_S)
        call = replace(asked.call, request_id=f"{asked.call.request_id}~shadow", meter=None, timeout_s=limit_s)
        try:
            async with asyncio.timeout(limit_s), aclosing(self._replicas.generate(call, ref)) as batches:
                async for batch in batches:
                    for delta in batch:
                        heard.add(delta)
                        heard.go_on()
        except (OverloadedError, UnavailableError) as error:
            if error.code in SET_ASIDE_S:
                self._faults.add(ref, error)
                return ShadowCounts(errors=1)
            return ShadowCounts(skipped=1)  # not the shadow's fault
        except ReplicaLost as error:  # not retried elsewhere: the shadow may be the cause
            if not heard.tokens and not error.blameless:
                self._faults.quarantine(ref)
            return ShadowCounts(errors=1)
        except Exception as error:  # noqa: BLE001 (must not affect the champion's client)
            log.warning("%s failed as a shadow: %s", asked.shadow.ref, error)
            if isinstance(error, PedroError) and error.code in SET_ASIDE_S:
                self._faults.add(ref, error)
            return ShadowCounts(errors=1)
        same = heard.tokens == asked.heard.tokens
        return ShadowCounts(
            same=int(same), different=int(not same), seconds=heard.seconds, champion_seconds=asked.heard.seconds
        )

    def _note(self, champion: Version, shadow: Version, counts: ShadowCounts) -> None:
        self._outcomes.update({name: getattr(counts, name) for name in ("same", "different", "errors", "skipped")})
        self._add((champion.name, shadow.version, champion.version), counts)
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_later())

    async def _flush_later(self) -> None:
        while self._sums:
            await asyncio.sleep(FLUSH_EVERY_S)
            await self.flush()

    def _add(self, pair: Pair, counts: ShadowCounts) -> None:
        if pair in self._sums or len(self._sums) < MAX_SUMS:
            self._sums[pair] = self._sums.get(pair, ShadowCounts()) + counts


def is_asked_too(call: GenerateCall, shadow: Version, weight: float) -> bool:
    """Whether a champion's call is copied to its shadow: selected at random, a generation, and addressed by the bare
    name or as champion."""
    named = ModelRef.parse(call.model)
    if named.version is not None or named.alias not in (None, CHAMPION):
        return False
    if call.params.get("pooling") is not None or call.params.get("max_tokens") == 0:
        return False
    digest = hashlib.sha256(f"shadow {shadow.version}\n{call.request_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < weight
