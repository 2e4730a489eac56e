"""Reports to the store how canaries and their champions answer, summed over an interval. For one event loop.

Only requests assigned by the canary split are counted, so that both sides get comparable requests.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from pedro.errors import PedroError
from pedro.serving.failover import SET_ASIDE_S
from pedro.store import AnswerCounts

if TYPE_CHECKING:
    from pedro.registry import Registry, Version
    from pedro.serving.resolver import ModelResolver

FLUSH_EVERY_S = 5.0
MAX_SUMS = 10_000  # versions with unreported answers
log = logging.getLogger("pedro.serving")


class CanaryWatch:
    """Reports an answer within `flush_every_s`; while the store is away, the sums are kept."""

    def __init__(self, registry: Registry, resolver: ModelResolver, flush_every_s: float = FLUSH_EVERY_S) -> None:
        self._registry = registry
        self._resolver = resolver
        self._flush_every_s = flush_every_s
        self._sums: dict[str, dict[int, AnswerCounts]] = {}
        self._flushing: asyncio.Task[None] | None = None

    def note(self, version: Version, error: Exception | None) -> None:
        """Count an answer or error of `version`; errors caused by the client do not count."""
        if error is not None and not ours(error):
            return
        self._add(version.name, version.version, AnswerCounts(answers=1, errors=int(error is not None)))
        if self._flushing is None or self._flushing.done():
            self._flushing = asyncio.create_task(self._flush_later())

    async def flush(self) -> None:
        """Report the sums to the store; a withdrawn canary takes effect here at once."""
        batch, self._sums = self._sums, {}
        for name, counts in batch.items():
            try:
                _, withdrawn = await asyncio.to_thread(self._count, name, counts)
                if withdrawn:
                    log.warning("%s: its canary answers worse than its champion and was withdrawn", name)
                    await self._resolver.refresh()
            except PedroError as error:
                log.warning("answers of %s could not be reported and are kept: %s", name, error.message)
                for version, more in counts.items():
                    self._add(name, version, more)

    def _count(self, name: str, counts: dict[int, AnswerCounts]) -> tuple[bool, bool]:
        return self._registry.store.add_answers(name, counts)

    async def _flush_later(self) -> None:
        while self._sums:
            await asyncio.sleep(self._flush_every_s)
            await self.flush()

    def _add(self, name: str, version: int, counts: AnswerCounts) -> None:
        if name not in self._sums and len(self._sums) >= MAX_SUMS:
            return
        of_name = self._sums.setdefault(name, {})
        of_name[version] = of_name.get(version, AnswerCounts()) + counts


def ours(error: Exception) -> bool:
    """Whether an error was caused by the version or the platform, not by the client."""
    return not isinstance(error, PedroError) or error.status >= 500 or error.code in SET_ASIDE_S
