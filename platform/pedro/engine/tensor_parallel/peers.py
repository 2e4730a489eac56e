"""The processes of the other ranks, seen from the first: it starts them, sends them calls and watches them.

If one exits or does not accept a message, all end: `lost` says why, and the rest are killed. They exit by themselves
if this process is gone.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from pedro.engine.tensor_parallel.messages import CALL, JOIN, MADE, READ, START, Orders, Parts
from pedro.errors import PedroError, UnavailableError

log = logging.getLogger(__name__)
MODULE = "pedro.engine.tensor_parallel.follower"
START_TIMEOUT_S = 1800.0  # for loading: a large backbone is read from disk
READ_TIMEOUT_S = 60.0  # for an adapter
NOTICE_S = 5.0  # within which an exited process is noticed
T = TypeVar("T")
SECRETS = ("PEDRO_", "AWS_", "MLFLOW_", "HF_TOKEN", "HUGGING_FACE_")  # prefixes of variables that may contain secrets


class Peer:
    """One process and its connection."""

    def __init__(self, rank: int, timeout_s: float) -> None:
        self.rank = rank
        ours, theirs = socket.socketpair()
        # A process that is stopped but not dead must not block senders.
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", int(timeout_s), 0))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-m", MODULE, str(theirs.fileno())],  # no imports from the working directory
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(),),
                env={**environment(os.environ), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
                start_new_session=True,  # an interrupt in the terminal must not reach it
            )
        self.connection = Connection(ours.detach())

    def end(self) -> None:
        """Kill it; it has no state to save."""
        self.process.kill()
        self.process.wait()


class Peers:
    """The ranks from 1 on. `on_lost` is called when one of them is lost, on any thread."""

    def __init__(self, count: int, timeout_s: float) -> None:
        self.lost: PedroError | None = None
        self.on_lost: Callable[[], None] = lambda: None
        self._timeout_s = timeout_s
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._answers: dict[tuple[int, Any], PedroError | None] = {}  # by rank and request
        self._abandoned: set[tuple[int, Any]] = set()  # requests whose answers are no longer awaited
        self._closing = False
        self._peers: list[Peer] = []
        try:
            for rank in range(1, count + 1):
                self._peers.append(Peer(rank, timeout_s))
        except OSError as error:
            self.close()
            raise UnavailableError(f"the processes of {count} more ranks could not be started: {error}") from error
        self._watcher = threading.Thread(target=self._watch, name="ranks", daemon=True)
        self._watcher.start()

    @property
    def pids(self) -> list[int]:
        """Process ids, by rank."""
        return [peer.process.pid for peer in self._peers]

    def start(self, orders: list[Orders]) -> None:
        """Send each rank its configuration and return at once; `started` waits."""
        for peer, order in zip(self._peers, orders, strict=True):
            self._send((peer,), START + pickle.dumps(order))

    def started(self) -> None:
        """Wait until all have loaded their parts. Raises the first error of any."""
        self._await(START, START_TIMEOUT_S, "loaded its part of the backbone")

    def join(self, own: Callable[[], None]) -> None:
        """Let all ranks join, this one through `own`, and wait until they have."""
        self.tell(CALL + Parts().dump((JOIN, (), {}, [])))
        own()
        self._await(JOIN, self._timeout_s, "met the others")

    def made(self) -> None:
        """Wait until all have created their runners. Raises the first error of any."""
        self._await(MADE, self._timeout_s, "made its runner")

    def tell(self, message: bytes) -> None:
        """Send to all. Raises the reason if one is lost."""
        self._send(self._peers, message)

    def read(self, number: int, directory: str, own: Callable[[], T]) -> T:
        """Let each rank read its part of an adapter, this one through `own`. Raises the first error of any."""
        self._send(self._peers, READ + pickle.dumps((number, directory)))
        try:
            return own()
        finally:
            self._await(number, READ_TIMEOUT_S, "read the adapter")

    def failed_here(self, error: Exception) -> PedroError:
        """A call failed on this rank: because another is gone, which the watcher is about to report, or by itself."""
        with self._changed:
            self._changed.wait_for(lambda: self.lost is not None, NOTICE_S)
        return self.fail(f"rank 0 failed: {type(error).__name__}: {error}")

    def fail(self, reason: str) -> PedroError:
        """The engine cannot continue: end the other ranks, which might wait forever."""
        with self._changed:
            if self.lost is None:
                self.lost = UnavailableError(f"the engine ended: {reason}", code="engine_error")
                if not self._closing:
                    log.error("tensor parallel: %s", reason)
            error = self.lost
            self._changed.notify_all()
        for peer in self._peers:
            peer.process.kill()
        self.on_lost()
        return error

    def close(self) -> None:
        """End the processes."""
        self._closing = True
        for peer in self._peers:
            peer.end()

    def _send(self, peers: Any, message: bytes) -> None:
        with self._sending:
            for peer in peers:
                if self.lost is not None:
                    raise self.lost.with_traceback(None)
                try:
                    peer.connection.send_bytes(message)
                except OSError as error:
                    raise self.fail(f"rank {peer.rank} takes no messages ({error or type(error).__name__})") from error

    def _await(self, what: Any, timeout_s: float, done: str) -> None:
        until = time.monotonic() + timeout_s
        keys = [(peer.rank, what) for peer in self._peers]
        with self._changed:
            while not all(key in self._answers for key in keys):
                if self.lost is not None:
                    raise self.lost.with_traceback(None)
                if not self._changed.wait(until - time.monotonic()):
                    self._abandoned.update(key for key in keys if key not in self._answers)
                    for key in keys:
                        self._answers.pop(key, None)
                    raise UnavailableError(f"a rank has not {done} in time; try again later")
            errors = [error for error in map(self._answers.pop, keys) if error is not None]
        if errors:
            raise errors[0]

    def _watch(self) -> None:
        """Receive their messages until one is gone."""
        of = {peer.connection: peer for peer in self._peers}
        while True:
            for connection in wait(list(of)):
                assert isinstance(connection, Connection)
                peer = of[connection]
                try:
                    what, error = connection.recv()
                except (EOFError, OSError):
                    with suppress(subprocess.TimeoutExpired):
                        peer.process.wait(10)
                    if not self._closing:
                        self.fail(f"rank {peer.rank} (process {peer.process.pid}) {_ending(peer.process.returncode)}")
                    return
                if what is None:
                    self.fail(f"rank {peer.rank} failed: {error}")
                    return
                with self._changed:
                    if (peer.rank, what) in self._abandoned:
                        self._abandoned.remove((peer.rank, what))
                    else:
                        self._answers[peer.rank, what] = error
                    self._changed.notify_all()


def environment(given: Mapping[str, str]) -> dict[str, str]:
    """The environment of a rank: without secrets, since it only reads local files."""
    return {name: value for name, value in given.items() if name == "PEDRO_HOME" or not name.startswith(SECRETS)}


def _ending(status: int | None) -> str:
    if status is None:
        return "is gone"
    return f"was ended by signal {-status}" if status < 0 else f"ended with status {status}"
