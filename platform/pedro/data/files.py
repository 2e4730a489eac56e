"""Opens a data file, compressed or not, and says what kind of file it is.

Content decides, not the ending; only tables of text (CSV, TSV), which anything may look like, go by their ending or
by a header that names known columns.
"""

from __future__ import annotations

import gzip
import io
import re
import stat
from collections.abc import Collection
from enum import StrEnum
from io import BufferedReader
from pathlib import Path
from typing import Any

from pedro.errors import DataError

BOM = b"\xef\xbb\xbf"
HEAD_BYTES = 1 << 16
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
REFUSED = {
    b"PK\x03\x04": "a zip archive (or an Excel workbook); unpack it and give the file inside",
    b"PK\x05\x06": "an empty zip archive; give the file itself",
    b"BZh": "packed with bzip2; `bunzip2` it first",
    b"\xfd7zXZ": "packed with xz; `unxz` it first",
    b"7z\xbc\xaf": "a 7z archive; unpack it and give the file inside",
    b"ARROW1": "an Arrow file; save it as parquet or JSONL",
}
ARRAY = re.compile(rb"\s*\[")
WRAPPED = re.compile(rb'\s*\{\s*"data"\s*:\s*\[')
SPREAD = re.compile(rb'\s*\{[ \t]*\r?\n\s*"')
TABLES = {".csv": ",", ".tsv": "\t"}


class Kind(StrEnum):
    """How rows stand in a file."""

    LINES = "JSON lines"
    ARRAY = "JSON array"
    WRAPPED = 'JSON array under "data"'
    SPREAD = "JSON objects over many lines"
    TABLE = "CSV"
    PARQUET = "parquet"

    @property
    def unit(self) -> str:
        """What its rows are counted in."""
        return "line" if self in (Kind.LINES, Kind.TABLE, Kind.SPREAD) else "row"


def open_file(path: Path) -> BufferedReader:
    """A regular file's bytes. Raises DataError that names it."""
    try:
        mode = path.stat().st_mode  # before it is opened: a pipe without a writer would hang
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise DataError(f"data: {str(path)!r} is a device or a pipe; give a regular file", param="data")
        return BufferedReader(io.FileIO(path), HEAD_BYTES)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"data: {str(path)!r} cannot be read: {reason}; check the path", param="data") from None


def open_data(path: Path) -> BufferedReader:
    """The file's content, unpacked where it is gzip or zstd. Raises DataError for other archives, by name."""
    stream = open_file(path)
    head = stream.peek(HEAD_BYTES)
    for magic, what in REFUSED.items():
        if head.startswith(magic):
            stream.close()
            raise DataError(f"data: {str(path)!r} is {what}", param="data")
    if head.startswith(GZIP):
        return BufferedReader(gzip.GzipFile(fileobj=stream), HEAD_BYTES)
    if head.startswith(ZSTD):
        arrow = pyarrow(path, "zstd")
        return BufferedReader(_Unpacked(arrow.CompressedInputStream(stream, "zstd")), HEAD_BYTES)
    return stream


def kind_of_file(path: Path, stream: BufferedReader, columns: Collection[str] = ()) -> Kind:
    """What an open file is. `columns` are names that a table's header may hold. Raises DataError for mixed kinds."""
    head = stream.peek(HEAD_BYTES).removeprefix(BOM)
    if head.startswith(b"PAR1"):
        if isinstance(stream.raw, gzip.GzipFile | _Unpacked):
            raise DataError(
                f"data: {str(path)!r} is a compressed Parquet file; Parquet compresses by itself, decompress it",
                param="data",
            )
        return Kind.PARQUET
    if ending(path)[0] == ".parquet":
        raise DataError(f"data: {str(path)!r} ends in .parquet but is not a Parquet file; save it again", param="data")
    if ending(path)[0] in TABLES or _is_header(head, columns):
        return Kind.TABLE
    for kind, pattern in ((Kind.ARRAY, ARRAY), (Kind.WRAPPED, WRAPPED), (Kind.SPREAD, SPREAD)):
        if pattern.match(head):
            return kind
    return Kind.LINES


def ending(path: Path | str) -> tuple[str, str]:
    """A file's ending and that of its packing, both empty where they say nothing: (".csv", ".gz")."""
    name, packing = str(path).lower(), ""
    for packed in (".gz", ".zst"):
        if name.endswith(packed):
            name, packing = name.removesuffix(packed), packed
    suffix = Path(name).suffix
    return suffix if suffix in (*TABLES, ".parquet", ".json") else "", packing


def delimiter(path: Path, header: str) -> str:
    """What parts the columns: the tab of a .tsv, or what the header holds most of."""
    return TABLES.get(ending(path)[0], "") if ending(path)[0] == ".tsv" else max(",;\t", key=header.count)


def pyarrow(path: Path, what: str) -> Any:
    """pyarrow, or DataError that says how to come by it."""
    try:
        import pyarrow.parquet
    except ImportError:
        raise DataError(
            f"data: {str(path)!r} is {what}, which needs pyarrow; `pip install 'pedro-platform[train]'`, or give JSONL",
            param="data",
        ) from None
    return pyarrow


def _is_header(head: bytes, columns: Collection[str]) -> bool:
    line = head.splitlines()[0].decode(errors="replace") if head.splitlines() else ""
    if line.lstrip()[:1] in ("{", "["):  # JSON, whose text may list what columns are called
        return False
    cells = {cell.strip().strip('"') for cell in re.split("[,;\t]", line)}
    return len(cells & set(columns)) > 1


class _Unpacked(io.RawIOBase):
    """What Python's buffered reader needs around an Arrow stream."""

    def __init__(self, source: Any) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._source.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
