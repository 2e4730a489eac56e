"""Reaches an engine replica in another process over a Unix socket, without Ray: a connection a call, pickled messages.

Both ends are this benchmark's own processes.
"""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import PedroError
from pedro.serving.protocol import ControlRequest, OutputBatch, ReplicaConnection, ReplicaLost, SubmitRequest, T

if TYPE_CHECKING:
    from asyncio import StreamReader, StreamWriter

LENGTH = 8  # bytes before a message that say how long it is


class SocketConnection:
    """Conforms to `pedro.serving.protocol.ReplicaConnection`."""

    def __init__(self, path: Path) -> None:
        self._path = path

    async def stream(self, stream_id: str) -> AsyncGenerator[OutputBatch, None]:
        """The outputs of the calls submitted under `stream_id`."""
        async with self._calling("stream", stream_id) as reader:
            while True:
                yield await _receive(reader)

    async def submit(self, stream_id: str, requests: list[SubmitRequest], cancelled: list[int]) -> None:
        """Start calls and end others."""
        async with self._calling("submit", stream_id, requests, cancelled) as reader:
            _checked(await _receive(reader))

    async def ask(self, request: ControlRequest[T]) -> T:
        """What the replica answers."""
        async with self._calling("ask", request) as reader:
            answer: T = _checked(await _receive(reader))
            return answer

    @asynccontextmanager
    async def _calling(self, *call: Any) -> AsyncIterator[StreamReader]:
        try:
            reader, writer = await asyncio.open_unix_connection(self._path)
            try:
                await _send(writer, call)
                yield reader
            finally:
                writer.close()
        except (OSError, asyncio.IncompleteReadError) as error:
            raise ReplicaLost(str(self._path)) from error


@asynccontextmanager
async def listening(replica: ReplicaConnection, path: Path) -> AsyncIterator[None]:
    """The replica's end, for the time of the `with`."""

    async def answer(reader: StreamReader, writer: StreamWriter) -> None:
        try:
            method, *arguments = await _receive(reader)
            if method == "stream":
                async with aclosing(replica.stream(*arguments)) as batches:
                    async for batch in batches:
                        await _send(writer, batch)
            else:
                await _send(writer, await _answer(getattr(replica, method)(*arguments)))
        except (OSError, asyncio.IncompleteReadError):
            pass  # whoever asked has left
        finally:
            writer.close()

    server = await asyncio.start_unix_server(answer, path)
    try:
        yield
    finally:
        server.close()


async def _answer(work: Any) -> Any:
    try:
        return await work
    except (PedroError, ReplicaLost) as error:
        return error


async def _send(writer: StreamWriter, message: Any) -> None:
    data = pickle.dumps(message)
    writer.write(len(data).to_bytes(LENGTH, "big") + data)
    await writer.drain()


async def _receive(reader: StreamReader) -> Any:
    length = int.from_bytes(await reader.readexactly(LENGTH), "big")
    return pickle.loads(await reader.readexactly(length))  # noqa: S301


def _checked(answer: Any) -> Any:
    if isinstance(answer, Exception):
        raise answer
    return answer
