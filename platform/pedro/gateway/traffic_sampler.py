"""Samples the metrics of gateway and engines at regular intervals and keeps a history.

Missing samples, because no engine answered or the gateway did not run, are gaps in the history, not zeros.
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
    from pedro.gateway.edge import GatewayMetrics

EVERY_S = 15.0  # as Prometheus scrapes
FIRST_S = 1.0  # between attempts until an engine answers: increases need a first sample
FRESH_S = 4.0  # an older sample is refreshed on request
BACKEND_TIMEOUT_S = 5.0
log = logging.getLogger("pedro.gateway")


class TrafficSampler:
    """Scrapes into one history. Used on the gateway's event loop."""

    def __init__(self, metrics: GatewayMetrics, backend: Callable[[], Backend], every_s: float = EVERY_S) -> None:
        self._metrics = metrics
        self._backend = backend
        self._every_s = every_s
        self._history = TrafficHistory()
        self._engine_seen = False
        self._reading = asyncio.Lock()

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            try:
                await self._sample()
            except Exception:
                log.exception("a sample of the metrics could not be stored")
            await asyncio.sleep(self._every_s if self._engine_seen else min(FIRST_S, self._every_s))

    async def text(self) -> str:
        """Current Prometheus text; without engine metrics while no engine answers."""
        return self._metrics.text() + await self._engines()

    async def open_text(self) -> str:
        """The same as OpenMetrics, which has exemplars."""
        return self._metrics.open_text() + open_metrics.of_text(await self._engines()) + open_metrics.END

    async def _engines(self) -> str:
        try:
            async with asyncio.timeout(BACKEND_TIMEOUT_S):
                text = await self._backend().metrics()
        except Exception as error:  # noqa: BLE001 (the gateway's own metrics are needed most without an engine)
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
            if now - (self._history.read_at or 0.0) <= FRESH_S / 2:  # another caller did meanwhile
                return
            text = await self.text()
            await asyncio.to_thread(lambda: self._history.add(now, parse_metrics(text)))
