"""Turns of tenants: a tenant's calls wait for one another, never in front of another tenant's. On one event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Turns:
    """Of what one place does for calls, in the order of asking."""

    def __init__(self) -> None:
        self._tenants: dict[str, _Queue] = {}

    @asynccontextmanager
    async def of(self, tenant: str) -> AsyncIterator[None]:
        """While inside, no other call of the tenant is."""
        queue = self._tenants.setdefault(tenant, _Queue())
        queue.waiting += 1
        try:
            async with queue.lock:
                yield
        finally:
            queue.waiting -= 1
            if not queue.waiting:
                del self._tenants[tenant]

    async def next(self, tenant: str) -> None:
        """Returns when the call may go on: one of each tenant in a pass of the event loop, which sees who came since.

        What it waits for afterwards holds up none of its tenant's other calls.
        """
        async with self.of(tenant):
            await asyncio.sleep(0)


class _Queue:
    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.waiting = 0
