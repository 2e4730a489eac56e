"""Reads the gateway's and the engines' own figures at regular intervals and keeps them for a while.

What was not read, because no engine answered or the gateway did not run, is no zero: the history has no figure there.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from pedro.gateway import open_metrics
from pedro.traffic.history import TrafficHistory
from pedro.traffic.scrape import parse_metrics

if TYPE_CHECKING:
    from pedro.gateway.backend import Backend
    from pedro.gateway.observability import GatewayMetrics

EVERY_S = 15.0  # as Prometheus scrapes
FIRST_S = 1.0  # between attempts until an engine has answered: what came before it is in no increase
FRESH_S = 4.0  # an older reading is repeated for whoever looks
BACKEND_TIMEOUT_S = 5.0
log = logging.getLogger("pedro.gateway")


class TrafficSampler:
    """Scrapes into one history. To be asked on the gateway's event loop."""

    def __init__(self, metrics: GatewayMetrics, backend: Callable[[], Backend], every_s: float = EVERY_S) -> None:
        self._metrics = metrics
        self._backend = backend
        self._every_s = every_s
        self._history = TrafficHistory()
        self._engine_seen = False
        self._reading = asyncio.Lock()

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            try:
                await self._sample()
            except Exception:
                log.exception("the figures could not be kept")
            await asyncio.sleep(self._every_s if self._engine_seen else min(FIRST_S, self._every_s))

    async def text(self) -> str:
        """Prometheus's text as of now; without an engine's figures while none answers."""
        return self._metrics.text() + await self._engines()

    async def open_text(self) -> str:
        """The same as OpenMetrics, which has exemplars."""
        return self._metrics.open_text() + open_metrics.of_text(await self._engines()) + open_metrics.END

    async def _engines(self) -> str:
        try:
            async with asyncio.timeout(BACKEND_TIMEOUT_S):
                text = await self._backend().metrics()
        except Exception as error:  # noqa: BLE001 (the gateway's own figures matter most when the engine is away)
            log.log(logging.WARNING if self._engine_seen else logging.DEBUG, "no metrics of the engine: %r", error)
            return ""
        self._engine_seen = True
        return text

    async def window(self, seconds: float, after: float) -> bytes:
        """The last `seconds`, up to now, as JSON."""
        if time.time() - (self._history.read_at or 0.0) > FRESH_S:
            await self._sample()
        return await asyncio.to_thread(lambda: self._history.window(time.time(), seconds, after).to_json())

    async def _sample(self) -> None:
        async with self._reading:
            now = time.time()
            if now - (self._history.read_at or 0.0) <= FRESH_S / 2:  # another one did while this one waited
                return
            text = await self.text()
            await asyncio.to_thread(lambda: self._history.add(now, parse_metrics(text)))
