"""Messages of the first rank to the others: calls, whose arguments may be objects of which each rank has a part.

Adapters and saved vectors are never sent: a number stands for them, by which every rank finds its own part, until the
first rank drops the object. Messages only pass between the processes of one engine.
"""

from __future__ import annotations

import io
import itertools
import pickle
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pedro.adapter_kinds import Adapter

if TYPE_CHECKING:
    from pedro.backbone import Backbone
    from pedro.engine.tensor_parallel.shards import Shard

START, CALL, READ = b"s", b"c", b"r"
"""The first byte of a message: begin; make a call, in order; read an adapter, concurrently with calls."""
JOIN, MADE = "join", "make"  # the first calls, whose completion the others report


@dataclass(frozen=True)
class Orders:
    """The configuration of a rank. `meeting`: the rendezvous file of the ranks."""

    backbone: Backbone
    dtype: str
    device: str
    shard: Shard
    meeting: str
    threads: int
    timeout_s: float


class KeptRows(dict[Any, Any]):
    """Saved vectors of a slot (`SlotRows`), compared by identity."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


class Parts:
    """The numbers of objects of which each rank has a part. Thread-safe."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self._lock = threading.Lock()
        self._gone: deque[int] = deque()

    def reserve(self) -> int:
        """An unused number."""
        return next(self._next)

    def name(self, thing: Any, number: int) -> None:
        """Let `number` stand for `thing` until `thing` is garbage-collected here."""
        with self._lock:
            self._numbers[thing] = number
        weakref.finalize(thing, self.let_go, number).atexit = False

    def let_go(self, number: int) -> None:
        """Remove this number."""
        self._gone.append(number)

    def take_gone(self) -> list[int]:
        """Numbers whose objects were dropped since the last call."""
        return [self._gone.popleft() for _ in range(len(self._gone))]

    def dump(self, message: Any) -> bytes:
        """The message as bytes, with numbers in place of numbered objects."""
        stream = io.BytesIO()
        _Pickler(stream, self._number_of).dump(message)
        return stream.getvalue()

    def _number_of(self, thing: Any) -> int | None:
        if not isinstance(thing, Adapter | KeptRows):
            return None
        with self._lock:
            return self._numbers[thing]


def load(message: bytes, parts: dict[int, Any]) -> Any:
    """The message, with this rank's own parts in place of numbers."""
    return _Unpickler(io.BytesIO(message), parts).load()


class _Pickler(pickle.Pickler):
    def __init__(self, stream: io.BytesIO, number_of: Callable[[Any], int | None]) -> None:
        super().__init__(stream, pickle.HIGHEST_PROTOCOL)
        self._number_of = number_of

    def persistent_id(self, obj: Any) -> int | None:
        return self._number_of(obj)


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, parts: dict[int, Any]) -> None:
        super().__init__(stream)
        self._parts = parts

    def persistent_load(self, pid: Any) -> Any:
        return self._parts[pid]
