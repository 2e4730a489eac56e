"""What the first rank tells the others: calls to make, whose arguments may be things that each has a part of.

An adapter and the vectors that a slot had are never sent: a number stands for them, by which every rank finds its own
part, until the first rank needs the thing no longer. The bytes pass between processes of one engine alone.
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
"""The first byte of a message: begin; make a call, in order with the others; read an adapter, beside them."""
JOIN, MADE = "join", "make"  # the first calls, of which the others say when they are done


@dataclass(frozen=True)
class Orders:
    """What a rank is to be. `meeting`: a file by which the ranks find each other."""

    backbone: Backbone
    dtype: str
    device: str
    shard: Shard
    meeting: str
    threads: int
    timeout_s: float


class KeptRows(dict[Any, Any]):
    """The vectors of a slot that outlive it (`SlotRows`); each is itself and equal to no other."""

    __hash__ = object.__hash__  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        return self is other


class Parts:
    """The numbers of things that each rank has a part of. For any thread."""

    def __init__(self) -> None:
        self._numbers: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
        self._next = itertools.count()
        self._lock = threading.Lock()
        self._gone: deque[int] = deque()

    def reserve(self) -> int:
        """A number that no thing has yet."""
        return next(self._next)

    def name(self, thing: Any, number: int) -> None:
        """From now on `number` stands for `thing`, for as long as this process needs it."""
        with self._lock:
            self._numbers[thing] = number
        weakref.finalize(thing, self.let_go, number).atexit = False

    def let_go(self, number: int) -> None:
        """Nothing is called so any longer."""
        self._gone.append(number)

    def take_gone(self) -> list[int]:
        """The numbers whose things were let go of since the last call."""
        return [self._gone.popleft() for _ in range(len(self._gone))]

    def dump(self, message: Any) -> bytes:
        """The message as bytes; what has a number stands there as that."""
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
