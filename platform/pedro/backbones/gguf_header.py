"""Reads what a GGUF file says of itself, and refuses what does not fit its own size. Standard library only.

Such files come from strangers: every count and length is held against the bytes that are left before anything is read
of it, so a made-up header takes neither time nor memory. Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from pedro.errors import BackboneError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 4_096  # metadata keys
MAX_TENSORS = 65_536
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 65_535
MAX_STRING_BYTES = 2_000_000  # a chat template, a licence's text
MAX_ITEMS = 2**23  # of an array: a vocabulary, its merges
MAX_ARRAY_BYTES = 500_000_000
STRING, ARRAY = 8, 9
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
ALIGNMENT = 32


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of the file; `shape` has its fastest dimension last, as torch has it."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


@dataclass(frozen=True)
class GGUFHeader:
    """What the file says before its tensors. Arrays of the metadata are given as their lengths."""

    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]
    data_bytes: int
    """What is left for the tensors."""

    @property
    def architecture(self) -> str:
        return str(self.metadata.get("general.architecture", ""))

    @property
    def parameters(self) -> int:
        return sum(math.prod(tensor.shape) for tensor in self.tensors)


def read_header(path: Path) -> GGUFHeader:
    """The header of a GGUF file. Raises BackboneError for one that is damaged, cut short or out of bounds."""
    try:
        with path.open("rb") as stream:
            return _Reader(stream, path.stat().st_size, path.name).header()
    except (struct.error, UnicodeDecodeError) as error:
        raise BackboneError(
            f"backbone: {path.name!r} is damaged ({error}); download it again", param="backbone"
        ) from error


class _Reader:
    def __init__(self, stream: BinaryIO, size: int, name: str) -> None:
        self._stream, self._size, self._name = stream, size, name

    def header(self) -> GGUFHeader:
        if self._take(4) != MAGIC:
            raise self._refused("is no GGUF file (it does not begin with GGUF)")
        version = self._number("<I")
        if version not in VERSIONS:
            raise self._refused(f"is GGUF version {version}, of which only {' and '.join(map(str, VERSIONS))} are read")
        tensors, entries = self._number("<Q"), self._number("<Q")
        self._bound("tensors", tensors, MAX_TENSORS, 24)
        self._bound("metadata entries", entries, MAX_ENTRIES, 13)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string(MAX_NAME_BYTES)
            metadata[key] = self._value(key, self._number("<I"))
        infos = tuple(self._tensor() for _ in range(tensors))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or not 1 <= alignment <= 2**16 or alignment & (alignment - 1):
            raise self._refused(f"has general.alignment {alignment!r:.40}; expected a power of two")
        start = -(-self._stream.tell() // alignment) * alignment
        return GGUFHeader(metadata, infos, max(0, self._size - start))

    def _tensor(self) -> TensorInfo:
        name = self._string(MAX_NAME_BYTES)
        dimensions = self._number("<I")
        if not 1 <= dimensions <= MAX_DIMENSIONS:
            raise self._refused(f"has {name!r:.80} with {dimensions} dimensions; at most {MAX_DIMENSIONS} are read")
        shape = tuple(reversed(struct.unpack(f"<{dimensions}Q", self._take(8 * dimensions))))
        return TensorInfo(name, shape, self._number("<I"), self._number("<Q"))

    def _value(self, key: str, kind: int) -> Any:
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind == STRING:
            return self._string(MAX_STRING_BYTES)
        if kind != ARRAY:
            raise self._refused(f"has {key!r:.80} of the unknown type {kind}")
        item, count = self._number("<I"), self._number("<Q")
        width = struct.calcsize(SCALARS[item]) if item in SCALARS else 8
        if item not in SCALARS and item != STRING:
            raise self._refused(f"has {key!r:.80}, a list of the unknown type {item}")
        self._bound(f"items of {key!r:.80}", count, MAX_ITEMS, width)
        if item in SCALARS:
            self._skip(count * width)
            return count
        begun = self._stream.tell()
        for _ in range(count):
            self._skip(self._length(MAX_STRING_BYTES))
            if self._stream.tell() - begun > MAX_ARRAY_BYTES:
                raise self._refused(f"has more than {MAX_ARRAY_BYTES:,} bytes in {key!r:.80}")
        return count

    def _string(self, most: int) -> str:
        return self._take(self._length(most)).decode("utf-8")

    def _length(self, most: int) -> int:
        length: int = self._number("<Q")
        if length > most:
            raise self._refused(f"has a text of {length:,} bytes where at most {most:,} are read")
        return length

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _bound(self, what: str, count: int, most: int, least_bytes: int) -> None:
        """Refuse more of something than is read of any file, or than the bytes that are left could hold."""
        if count > most:
            raise self._refused(f"says it has {count:,} {what}; at most {most:,} are read")
        if count * least_bytes > self._size - self._stream.tell():
            raise self._short()

    def _take(self, count: int) -> bytes:
        taken = self._stream.read(count)
        if len(taken) < count:
            raise self._short()
        return taken

    def _skip(self, count: int) -> None:
        if self._stream.seek(count, 1) > self._size:
            raise self._short()

    def _short(self) -> BackboneError:
        return self._refused(f"is cut short: its header goes beyond its {self._size:,} bytes")

    def _refused(self, why: str) -> BackboneError:
        return BackboneError(
            f"backbone: {self._name!r} {why}; download it again, or take another file", param="backbone"
        )
