"""The process of a rank other than the first: `python -m` this module, with the number of a socket.

It makes the calls of the first rank's runner, in order, on its own part of the model; what comes out is the same on
all, and of use on the first alone. It ends where the first is gone.
"""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.engine.tensor_parallel.messages import CALL, JOIN, MADE, READ, START, Orders, load
from pedro.errors import AdapterError, PedroError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)


class Follower:
    """Takes messages on the main thread; calls are made on another, and adapters are read on a third."""

    def __init__(self, connection: Connection, orders: Orders) -> None:
        from pedro.engine.tensor_parallel.loading import load_shard, whole_architecture
        from pedro.process import set_torch_threads

        set_torch_threads(orders.threads)
        self._connection, self._orders = connection, orders
        self._model: PreTrainedModel = load_shard(orders.backbone, orders.dtype, orders.device, orders.shard)
        self._architecture = whole_architecture(orders.backbone)
        self._parts: dict[int, Any] = {}
        self._reading: set[int] = set()  # numbers of adapters that are still wanted
        self._changing = threading.Lock()  # of these two
        self._runner: Any = None
        self._calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._loaders = ThreadPoolExecutor(1)
        self._saying = threading.Lock()
        threading.Thread(target=self._follow, name="calls", daemon=True).start()

    def take(self, message: bytes) -> None:
        """Queue what the first rank says."""
        if message[:1] == READ:
            number, directory = load(message[1:], {})
            with self._changing:
                self._reading.add(number)
            self._loaders.submit(self._read, number, directory)
        else:
            assert message[:1] == CALL, f"a message of no kind: {message[:1]!r}"
            self._calls.put(message[1:])

    def say(self, what: Any, error: Any = None) -> None:
        """Tell the first rank that something is done."""
        with self._saying:
            self._connection.send((what, error))

    def _follow(self) -> None:
        try:
            while True:
                name, arguments, options, gone = load(self._calls.get(), self._parts)
                with self._changing:
                    for number in gone:
                        self._reading.discard(number)
                        self._parts.pop(number, None)
                self._call(name, arguments, options)
        except BaseException as error:
            log.exception("rank %d failed", self._orders.shard.rank)
            self.say(None, f"{type(error).__name__}: {error}")
            os._exit(1)

    def _call(self, name: str, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        if name == JOIN:
            from pedro.engine.tensor_parallel.collectives import Group
            from pedro.engine.tensor_parallel.loading import join

            orders = self._orders
            self._group = Group(orders.shard, next(self._model.parameters()).device, orders.meeting, orders.timeout_s)
            join(self._model, self._group)
            self.say(JOIN)
        elif name == MADE:
            from pedro.engine.tensor_parallel.runner import ShardRunner

            try:
                self._runner = ShardRunner(self._model, self._group, *arguments, **options)
                self.say(MADE)
            except PedroError as error:  # the first rank's, too
                self.say(MADE, error)
        elif name == "keep_rows":
            slot, number = arguments
            self._parts[number] = self._runner.slot_rows(slot)
        else:
            getattr(self._runner, name)(*arguments, **options)

    def _read(self, number: int, directory: str) -> None:
        from pedro.engine.tensor_parallel.runner import read_part

        orders = self._orders
        try:
            part = read_part(
                Path(directory), self._architecture, orders.backbone.digest, self._model.device, orders.shard
            )
            with self._changing:
                if number in self._reading:  # else the first rank waits for it no more
                    self._parts[number] = part
            self.say(number)
        except PedroError as error:
            self.say(number, error)
        except Exception as error:  # as the first rank's own loaders: it costs this adapter alone
            log.exception("an adapter could not be read")
            self.say(number, AdapterError(f"adapter: it could not be read ({type(error).__name__})"))
        finally:
            with self._changing:
                self._reading.discard(number)


def main() -> None:
    """Take orders, and then calls until the first rank is gone."""
    logging.basicConfig(format="%(levelname)s rank %(name)s: %(message)s")
    connection = Connection(int(sys.argv[1]))
    try:
        message = connection.recv_bytes()
        assert message[:1] == START, "orders come first"
        from pedro.backbone import quiet

        quiet()
        try:
            follower = Follower(connection, load(message[1:], {}))
        except PedroError as error:
            connection.send((START, error))
            connection.recv_bytes()  # the end
            return
        follower.say(START)
        while True:
            follower.take(connection.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)  # other threads may wait for ranks that are gone


if __name__ == "__main__":
    main()
