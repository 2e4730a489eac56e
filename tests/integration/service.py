"""A Service of Kubernetes: one port, each connection to one of the pods that are ready. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import itertools
import threading
from contextlib import suppress

PIECE = 2**14


class Service:
    """`backends` are ports of pods that are ready; what is connected already stays where it is when they change."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.backends: list[int] = []
        self.connected = 0  # connections that were led to a pod
        self.refused = 0  # those that came while none was ready
        self._turn = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="service", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(30)

    def close(self) -> None:
        """Let every connection go."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._come, "127.0.0.1", self.port, limit=PIECE)

    async def _come(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        ready = list(self.backends)
        if not ready:
            self.refused += 1
            writer.transport.abort()  # as a Service without endpoints: there is nobody
            return
        try:
            port = ready[next(self._turn) % len(ready)]
            answers, asks = await asyncio.open_connection("127.0.0.1", port, limit=PIECE)
        except OSError:
            writer.transport.abort()
            return
        self.connected += 1
        ways = [asyncio.create_task(_pass(reader, asks)), asyncio.create_task(_pass(answers, writer))]
        await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        for way in ways:
            way.cancel()
        await asyncio.gather(*ways, return_exceptions=True)
        for end in (asks, writer):
            with suppress(OSError):
                end.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()
