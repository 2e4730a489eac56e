"""A background loop of a gateway: looks for work every few seconds, and at once when woken."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any

from pedro.errors import PedroError

log = logging.getLogger("pedro.gateway")


class PollLoop:
    """Calls `look` repeatedly; an error is logged once, as `trouble`, until a call succeeds."""

    def __init__(self, look: Callable[[], Awaitable[None]], every_s: float, trouble: str) -> None:
        self._look, self._every_s, self._trouble = look, every_s, trouble
        self._woken = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the loop."""
        self._running = asyncio.create_task(self._run())

    def wake(self) -> None:
        """Wake up: there is work."""
        self._woken.set()

    async def end(self, work: Iterable[asyncio.Task[Any]] = ()) -> None:
        """Cancel the loop and its current call, and wait for both."""
        tasks = [*work, *([self._running] if self._running else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        told = False
        while True:
            self._woken.clear()
            try:
                await self._look()
                told = False
            except Exception as error:  # any error: try again
                if not told:
                    log.warning("%s: %s", self._trouble, error, exc_info=not isinstance(error, PedroError))
                told = True
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._every_s):
                    await self._woken.wait()
