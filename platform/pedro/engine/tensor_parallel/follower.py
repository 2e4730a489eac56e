"""The process of a rank other than the first: `python -m` this module, with the file descriptor of a socket.

It repeats the calls of the first rank's runner, in order, on its own part of the model; results are equal on all ranks
and only used on the first. It exits when the first is gone.
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
    """Receives messages on the main thread, makes calls on a second and reads adapters on a third."""

    def __init__(self, connection: Connection, orders: Orders) -> None:
        from pedro.engine.tensor_parallel.loading import load_shard, whole_architecture
        from pedro.process import set_torch_threads

        set_torch_threads(orders.threads)
        self._connection, self._orders = connection, orders
        self._model: PreTrainedModel = load_shard(orders.backbone, orders.dtype, orders.device, orders.shard)
        self._architecture = whole_architecture(orders.backbone)
        self._parts: dict[int, Any] = {}
        self._reading: set[int] = set()  # numbers of adapters still to be read
        self._changing = threading.Lock()  # guards these two
        self._runner: Any = None
        self._calls: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._loaders = ThreadPoolExecutor(1)
        self._saying = threading.Lock()
        threading.Thread(target=self._follow, name="calls", daemon=True).start()

    def take(self, message: bytes) -> None:
        """Queue a message of the first rank."""
        if message[:1] == READ:
            number, directory = load(message[1:], {})
            with self._changing:
                self._reading.add(number)
            self._loaders.submit(self._read, number, directory)
        else:
            assert message[:1] == CALL, f"a message of unknown kind: {message[:1]!r}"
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
            except PedroError as error:  # raised on the first rank, too
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
                if number in self._reading:  # else the first rank no longer waits for it
                    self._parts[number] = part
            self.say(number)
        except PedroError as error:
            self.say(number, error)
        except Exception as error:  # as in the first rank's loaders: fails this adapter only
            log.exception("an adapter could not be read")
            self.say(number, AdapterError(f"adapter: it could not be read ({type(error).__name__})"))
        finally:
            with self._changing:
                self._reading.discard(number)


def main() -> None:
    """Receive the configuration, then calls until the first rank is gone."""
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
        os._exit(0)  # other threads may be waiting for ranks that are gone


if __name__ == "__main__":
    main()
