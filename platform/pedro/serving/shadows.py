"""Asks shadows what champions were asked, after the answer has left, and counts how they differ. For one event loop.

Nobody sees a shadow's answer, and it is counted against no quota: it has no meter, and passes neither the gateway's
routes nor its ledger. In the engine it is work of its tenant's, whose share it cannot enlarge. One is asked at a time;
while a replica is at work it waits, but not for ever.
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

MOST_WAITING = 16  # of a tenant: what another asks costs it none
MOST_OF_ALL = 512
PATIENCE_S = 5.0
LOOK_S = 0.05
LIMIT_S = 120.0  # of one answer; longer is an error of the shadow's
FLUSH_EVERY_S = 5.0
MAX_SUMS = 1000  # pairs with answers that the store does not have yet
log = logging.getLogger("pedro.serving")
Pair = tuple[str, int, int]
"""Adapter, shadow, champion."""


class ChampionAnswer:
    """An answer as far as it has come: the tokens of each choice, and the seconds that were waited for them."""

    def __init__(self) -> None:
        self.tokens: defaultdict[int, list[int]] = defaultdict(list)
        self.seconds = 0.0
        self._since = time.monotonic()

    def add(self, delta: Delta) -> None:
        self.seconds += time.monotonic() - self._since
        self.tokens[delta.index] += delta.token_ids

    def go_on(self) -> None:
        """The next delta is waited for: what its reader did with the last one is not counted."""
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
        """Have the shadow asked what the champion was, in its turn."""
        own = sum(asked.champion.tenant == champion.tenant for asked in self._waiting)
        if own >= MOST_WAITING or len(self._waiting) >= MOST_OF_ALL:
            self._note(champion, shadow, ShadowCounts(skipped=1))
            return
        self._waiting.append(_Asked(call, champion, shadow, heard))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def drain(self) -> None:
        """Return once all that waits was asked, and the store has heard of it."""
        if self._worker is not None:
            await self._worker
        await self.flush()

    async def flush(self) -> None:
        """Have the store count what was noted; while it is away, the sums are kept."""
        batch, self._sums = self._sums, {}
        for (name, shadow, champion), counts in batch.items():
            try:
                await asyncio.to_thread(self._registry.store.add_shadow_answers, name, shadow, champion, counts)
            except PedroError as error:
                log.warning("answers of the shadow of %s were not counted and are kept: %s", name, error.message)
                self._add((name, shadow, champion), counts)

    def metrics(self) -> str:
        """Prometheus text."""
        name = "pedro_shadow_answers_total"
        help_text = "Requests that shadows were to be asked too, by what became of them."
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
            if stands is not None and stands[0].model_ref == asked.shadow.model_ref:  # it may have gone meanwhile
                self._note(asked.champion, asked.shadow, await self._compared(asked))

    async def _compared(self, asked: _Asked) -> ShadowCounts:
        """What one answer of a shadow counts as. Whatever it fails with stays here."""
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
            return ShadowCounts(skipped=1)  # none of the shadow's doing
        except ReplicaLost as error:  # never asked of another one: it may be why
            if not heard.tokens and not error.blameless:
                self._faults.quarantine(ref)
            return ShadowCounts(errors=1)
        except Exception as error:  # noqa: BLE001 (whoever was answered by the champion must not see it)
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
    """Whether a call that a champion answers is one of its shadow's share: chosen by chance, an answer in tokens, and
    asked by the name alone or as champion."""
    named = ModelRef.parse(call.model)
    if named.version is not None or named.alias not in (None, CHAMPION):
        return False
    if call.params.get("pooling") is not None or call.params.get("max_tokens") == 0:
        return False
    digest = hashlib.sha256(f"shadow {shadow.version}\n{call.request_id}".encode()).digest()
    return int.from_bytes(digest[:6], "big") / 2**48 < weight
