"""Keeps a server's port while nothing listens on it: clients wait until the server is back instead of being refused.

Ray starts a proxy that died again, and `pedro serve` a head; for some seconds nothing listens then. In these, and only
in these, this listens beside whoever comes next (SO_REUSEPORT, as Ray Serve's proxies have it), and passes each
connection on once the server answers, whose proxy it tells the client's address (`passed_connections.py`). Who leaves
meanwhile has asked nothing, and who has waited for too long is told to come again. It understands nothing of what is
asked.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

from pedro.gateway.connections import ConnectionLimits
from pedro.gateway.not_yet import NOT_SERVED
from pedro.gateway.passed_connections import MOST_HELD, counted_as, line_for, plain, shared_key

LOOK_S, LET_IN_S = 0.1, 0.02
PATIENCE_S = 300.0  # a head and its server are back within a minute or two; clients wait ten
MOST_FROM_ONE = MOST_HELD // 4  # so that no client alone takes all places
PIECE = 2**14
MOST_SAID = 2**16  # bytes buffered per connection before they can be forwarded
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTENS = "0A"  # the state in these tables
ABSENT = (
    b"HTTP/1.1 503 Service Unavailable\r\ncontent-type: application/json\r\nretry-after: 5\r\nconnection: close\r\n"
    b"content-length: %d\r\n\r\n%s" % (len(NOT_SERVED), NOT_SERVED)
)


class Door:
    """One port. `wanted` says whether a server should be there, `ready` whether it answers; that may block. Does
    nothing on systems without tables of listening sockets."""

    def __init__(self, host: str, port: int, wanted: Callable[[], bool], ready: Callable[[], bool]) -> None:
        self._host, self._port, self._wanted, self._ready = host, port, wanted, ready
        self._over = threading.Event()
        self._held: Counter[str] = Counter()  # connections by client
        self._holds = False  # this itself listens
        self._most = min(ConnectionLimits.from_env().connections_per_client or MOST_HELD, MOST_FROM_ONE)
        self._key = shared_key()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    def start(self) -> None:
        """Start watching, on a thread."""
        if TABLES[0].is_file():
            self._thread.start()

    def close(self) -> None:
        """Close waiting and forwarded connections."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        while not self._over.is_set():
            if self._wanted() and not listeners(self._port):
                with suppress(OSError):  # another process was faster, or uses it exclusively
                    await self._hold()
            await asyncio.sleep(LOOK_S)

    async def _hold(self) -> None:
        """Listen until another process does, then forward the waiting connections."""
        door, back = self._listen(), asyncio.Event()
        mine = os.fstat(door.fileno()).st_ino

        async def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._wait(reader, writer, back)

        self._holds = True  # before it listens
        with ExitStack() as closing:
            closing.callback(setattr, self, "_holds", False)
            server = await asyncio.start_server(come, sock=door, limit=PIECE, backlog=MOST_HELD)
            closing.callback(server.close)
            while self._wanted() and not listeners(self._port) - {mine} and not self._over.is_set():
                await asyncio.sleep(LOOK_S)
            await asyncio.sleep(LET_IN_S)  # who came while the table was read would be reset
        while not self._over.is_set() and listeners(self._port) and not await asyncio.to_thread(self._ready):
            await asyncio.sleep(LOOK_S)
        back.set()

    def _listen(self) -> socket.socket:
        door = socket.socket(socket.AF_INET6 if ":" in self._host else socket.AF_INET, socket.SOCK_STREAM)
        try:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            door.bind((self._host, self._port))
        except OSError:
            door.close()
            raise
        return door

    async def _wait(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, back: asyncio.Event) -> None:
        """One connection: it waits, then bytes go both ways until either side ends."""
        from_ = plain(writer.get_extra_info("peername")[0])
        client = counted_as(from_)
        if self._held.total() >= MOST_HELD or self._held[client] >= self._most:
            writer.close()
            return
        self._held[client] += 1
        other: asyncio.StreamWriter | None = None
        try:
            said = await _until(back, reader)
            if said is None:  # the client is gone: do not forward its request
                return
            if not back.is_set():
                writer.write(ABSENT)
                await writer.drain()
                return
            # From and to the address that was asked for: so the proxy knows a line to come, and where none does, a
            # stranger's connection does not look like a local one.
            address = writer.get_extra_info("sockname")[0]
            answers, other = await self._connect(address, reader)
            other.write(said if self._key is None else line_for(from_, self._key) + said)
            ways = [asyncio.create_task(_pass(reader, other)), asyncio.create_task(_pass(answers, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:  # the server is gone again: ask the client to retry
            pass
        finally:
            self._held[client] -= 1
            if not self._held[client]:
                del self._held[client]
            writer.close()
            if other is not None:
                other.close()

    async def _connect(
        self, address: str, client: asyncio.StreamReader
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the server, which may be away again: nothing was asked of it yet, so that is waited for.

        Raises OSError after `PATIENCE_S`, and once the client has left.
        """
        until = asyncio.get_running_loop().time() + PATIENCE_S
        while True:
            with suppress(OSError):
                if not self._holds:  # else it would come back here, as one of this host
                    answers, other = await asyncio.open_connection(
                        address, self._port, limit=PIECE, local_addr=(address, 0)
                    )
                    met_itself = self._holds or other.get_extra_info("sockname")[1] == self._port
                    if not (met_itself or client.at_eof()):
                        return answers, other
                    other.transport.abort()
            over = self._over.is_set() or not self._wanted() or client.at_eof()
            if over or asyncio.get_running_loop().time() > until:
                raise ConnectionResetError
            await asyncio.sleep(LOOK_S)


async def _until(back: asyncio.Event, reader: asyncio.StreamReader) -> bytes | None:
    """The bytes a client sends until the server is back or a timeout; None if it has disconnected."""
    said = bytearray()
    hearing, waiting = asyncio.create_task(_hear(reader, said)), asyncio.create_task(back.wait())
    try:
        await asyncio.wait((hearing, waiting), timeout=PATIENCE_S, return_when=asyncio.FIRST_COMPLETED)
        return None if hearing.done() else bytes(said)
    finally:
        hearing.cancel(), waiting.cancel()
        await asyncio.gather(hearing, waiting, return_exceptions=True)


async def _hear(reader: asyncio.StreamReader, said: bytearray) -> None:
    """Return when the client disconnects. The rest of a long request stays unread until it can be forwarded."""
    while len(said) < MOST_SAID:
        piece = await reader.read(PIECE)
        if not piece:
            return
        said += piece
    await asyncio.Event().wait()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()


def listeners(port: int) -> set[int]:
    """The sockets of this host that listen on a port, by inode."""
    found = set()
    for table in TABLES:
        with suppress(OSError), table.open() as lines:
            next(lines, None)
            for words in map(str.split, lines):
                if words[3] != LISTENS:
                    break  # those that listen come first
                if int(words[1].rpartition(":")[2], 16) == port:
                    found.add(int(words[9]))
    return found
