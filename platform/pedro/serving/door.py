"""Keeps a server's port while nobody listens on it: who connects waits until the server is back, and is not refused.

Ray starts a proxy that died again, and `pedro serve` a head; for some seconds nothing listens then. In these, and only
in these, this listens beside whoever comes next (SO_REUSEPORT, as Ray Serve's proxies have it), and passes each
connection on once the server answers. It reads nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

LOOK_S = 0.1
MOST_HELD = 1024
PIECE = 2**14  # bytes that are read of a connection before they can be passed on
TABLES = (Path("/proc/net/tcp"), Path("/proc/net/tcp6"))
LISTENS = "0A"  # the state in these tables


class Door:
    """One port. `wanted` says whether a server belongs there, `ready` whether it answers; that may block. Nothing is
    done where the system has no tables of who listens."""

    def __init__(self, host: str, port: int, wanted: Callable[[], bool], ready: Callable[[], bool]) -> None:
        self._host, self._port, self._wanted, self._ready = host, port, wanted, ready
        self._over = threading.Event()
        self._held = 0
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)

    def start(self) -> None:
        """Watch from now on, on a thread."""
        if TABLES[0].is_file():
            self._thread.start()

    def close(self) -> None:
        """Whoever waits is let go, and so are connections that were passed on."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        asyncio.run(self._watch())

    async def _watch(self) -> None:
        while not self._over.is_set():
            if self._wanted() and not listeners(self._port):
                with suppress(OSError):  # somebody was faster, or holds it alone
                    await self._hold()
            await asyncio.sleep(LOOK_S)

    async def _hold(self) -> None:
        """Listen until another one does, then let in who has come."""
        door, back = self._listen(), asyncio.Event()
        mine = os.fstat(door.fileno()).st_ino

        async def come(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self._wait(reader, writer, back)

        server = await asyncio.start_server(come, sock=door, limit=PIECE, backlog=MOST_HELD)
        try:
            while self._wanted() and not listeners(self._port) - {mine} and not self._over.is_set():
                await asyncio.sleep(LOOK_S)
        finally:
            server.close()
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
        if self._held >= MOST_HELD:
            writer.close()
            return
        self._held += 1
        other: asyncio.StreamWriter | None = None
        try:
            await back.wait()
            # From and to the address that was asked for: a stranger's connection must not look like a local one.
            address = writer.get_extra_info("sockname")[0]
            answers, other = await asyncio.open_connection(address, self._port, limit=PIECE, local_addr=(address, 0))
            ways = [asyncio.create_task(_pass(reader, other)), asyncio.create_task(_pass(answers, writer))]
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
        except OSError:  # the server is gone again: this client is told so, and asks once more
            pass
        finally:
            self._held -= 1
            writer.close()
            if other is not None:
                other.close()


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while piece := await reader.read(PIECE):
            writer.write(piece)
            await writer.drain()


def listeners(port: int) -> set[int]:
    """The sockets of this host that listen on a port, by their inodes."""
    found = set()
    for table in TABLES:
        with suppress(OSError):
            for line in table.read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTENS and int(words[1].rpartition(":")[2], 16) == port:
                    found.add(int(words[9]))
    return found
