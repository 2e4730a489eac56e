"""Reads the rows of a file one by one, whatever is in it.

Memory stays bounded by one row: a longer one than `MAX_LINE_BYTES` is skipped on disk, never loaded. A bad row is
yielded as the error it is, so that a check can report all of them and a loader can stop at the first ones.
"""

from __future__ import annotations

import csv
import re
import zlib
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from functools import partial
from io import BufferedReader
from pathlib import Path
from typing import Any

from pedro.data.files import BOM, Kind, delimiter, kind_of_file, open_data, pyarrow
from pedro.data.mistakes import LineError, escaped, name_of
from pedro.data.row_shapes import parse_object
from pedro.errors import DataError

MAX_LINE_BYTES = 1 << 20
CHUNK = 1 << 16
FEW = 10  # parquet rows read at once: a small file may repeat a huge text
UNREADABLE = (ValueError, OverflowError, KeyError)  # of pyarrow, for values; KeyError for a zone that there is not
OUTSIDE, INSIDE = re.compile(rb'["\[\]{},]'), re.compile(rb'["\\]')  # what matters outside and inside a JSON string
Row = dict[str, Any]


def read_rows(path: Path, columns: Collection[str] = ()) -> Iterator[tuple[int, Row | LineError]]:
    """Each row that is not blank with its number, or the error that it is. Raises DataError if the file cannot be
    read. `columns` are names by which a table is recognised that does not end in .csv."""
    with open_data(path) as stream:
        kind = _kind(path, stream, columns)
        try:
            for number, row in _rows(path, stream, kind):
                yield number, _in_unit(row, kind.unit)
        except (EOFError, OSError, zlib.error) as error:
            raise DataError(
                f"data: {str(path)!r} cannot be decompressed: {error}; save it again", param="data"
            ) from None


def file_kind(path: Path, columns: Collection[str] = ()) -> Kind:
    """What kind of file it is. Raises DataError if it cannot be read."""
    with open_data(path) as stream:
        return _kind(path, stream, columns)


def _kind(path: Path, stream: BufferedReader, columns: Collection[str]) -> Kind:
    try:
        return kind_of_file(path, stream, columns)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"data: {str(path)!r} cannot be decompressed: {error}; save it again", param="data") from None


def _rows(path: Path, stream: BufferedReader, kind: Kind) -> Iterator[tuple[int, Row | LineError]]:
    if kind is Kind.PARQUET:
        yield from _parquet(path)
    elif kind is Kind.TABLE:
        yield from _table(path, stream)
    elif kind is Kind.SPREAD:
        yield 1, LineError(1, "line", "a JSON object over many lines; `jq -c . FILE > NEW` puts each on one line")
    else:
        pieces = _lines(stream) if kind is Kind.LINES else _elements(stream, kind is Kind.WRAPPED)
        for number, raw in pieces:
            if isinstance(raw, LineError):
                yield number, raw
                continue
            try:
                text = _decoded(raw, number)
                if text.strip():
                    yield number, parse_object(text, number)
            except LineError as error:
                yield number, error


def _lines(stream: BufferedReader) -> Iterator[tuple[int, bytes | LineError]]:
    number = 0
    while raw := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if number == 1:
            raw = raw.removeprefix(BOM)
        if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
            hint = "; its lines end in CR alone: `tr '\\r' '\\n' < FILE > NEW`" if raw.count(b"\r") > 1 else ""
            yield number, _too_long(number, len(raw) + _skip_line(stream), hint)
        else:
            yield number, raw


def _skip_line(stream: BufferedReader) -> int:
    """Reads on to the end of the line; how many bytes that was."""
    skipped = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        skipped += len(raw)
        if raw.endswith(b"\n"):
            break
    return skipped


def _elements(stream: BufferedReader, wrapped: bool) -> Iterator[tuple[int, bytes | LineError]]:
    """The elements of a JSON array as they stand in the file, cut at the commas between them."""
    opening = b""
    while not opening.endswith(b"["):  # the kind is known: it is not far
        opening += stream.read(1)
    piece, size, number = bytearray(), 0, 1
    depth, inside, skip = 0, False, 0
    while chunk := stream.read(CHUNK):
        start, at = 0, skip
        skip = 0
        while match := (INSIDE if inside else OUTSIDE).search(chunk, at):
            at, char = match.end(), match.group()
            if char == b"\\":
                at += 1
                skip = max(0, at - len(chunk))
            elif char == b'"':
                inside = not inside
            elif char in b"[{":
                depth += 1
            elif depth and char in b"]}":
                depth -= 1
            elif not depth:  # a comma between elements, or the end of the array
                part = chunk[start : at - 1]
                size += len(part)
                if size > MAX_LINE_BYTES:
                    yield number, _too_long(number, size)
                elif char == b"," or (piece + part).strip():
                    yield number, bytes(piece + part) if (piece + part).strip() else b"null"
                if char != b",":
                    yield from _after(number, chunk[at:] + stream.read(CHUNK), wrapped)
                    return
                piece, size, start, number = bytearray(), 0, at, number + 1
        if size + len(chunk) - start <= MAX_LINE_BYTES:
            piece += chunk[start:]
        size += len(chunk) - start
    yield number, LineError(number, "line", "the file ends before the array does: it is cut short; save it again")


def _after(number: int, rest: bytes, wrapped: bool) -> Iterator[tuple[int, LineError]]:
    left = rest.strip()
    if left and not (wrapped and left == b"}"):
        where = 'beside "data"' if wrapped and left.startswith(b",") else "after the array's end"
        reason = (
            f"there is more {where}; a file is one array (`jq -c '.data[]' FILE > NEW`), or one object on each line"
        )
        yield number, LineError(number, "line", reason)


def _table(path: Path, stream: BufferedReader) -> Iterator[tuple[int, Row | LineError]]:
    """The rows of CSV or TSV under the names of its header; an empty cell is null. A row's number is its first line."""
    lines = _text_lines(stream)
    header = next(lines, "")
    parted = delimiter(path, header)
    csv.field_size_limit(MAX_LINE_BYTES)
    names = next(csv.reader([header], delimiter=parted), [])
    if twice := [name for name in names if names.count(name) > 1]:
        yield 1, LineError(1, name_of(twice[0]), "names two columns of the header; rename one")
        return
    reader = csv.reader(lines, delimiter=parted, strict=True)
    number = 2
    try:
        for cells in reader:
            if cells and len(cells) != len(names):
                reason = f"{len(cells)} cells where the header has {len(names)}; put text with {parted!r} into quotes"
                yield number, LineError(number, "line", reason)
            elif any(cells):
                yield number, {name: cell or None for name, cell in zip(names, cells, strict=True)}
            number = reader.line_num + 2
    except LineError as error:
        yield number, error
    except csv.Error as error:
        yield number, LineError(number, "line", f"not CSV: {error}; the rest of the file was not read")


def _text_lines(stream: BufferedReader) -> Iterator[str]:
    for number, raw in _lines(stream):
        if isinstance(raw, LineError):
            raise raw
        yield _decoded(raw, number)


def _parquet(path: Path) -> Iterator[tuple[int, Row | LineError]]:
    arrow = pyarrow(path, "parquet")
    number = 0
    try:
        file = arrow.parquet.ParquetFile(path, pre_buffer=False, buffer_size=CHUNK)
        for batch in file.iter_batches(batch_size=FEW):
            for row in _whole(batch) or _one_by_one(batch):
                number += 1
                yield number, row if isinstance(row, dict) else row(number)
    except (arrow.ArrowException, *UNREADABLE) as error:  # the latter of names in its schema
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"data: {str(path)!r} is not a readable Parquet file: {reason}; save it again", param="data"
        ) from None


def _whole(batch: Any) -> list[Row]:
    """The rows of a batch; none where it is too large, or where one cannot be read."""
    if batch.nbytes <= MAX_LINE_BYTES:
        with suppress(*UNREADABLE):
            rows: list[Row] = batch.to_pylist()
            return rows
    return []


def _one_by_one(batch: Any) -> Iterator[Row | Callable[[int], LineError]]:
    """The rows of a batch; in place of one that cannot be used, what makes the error of its number."""
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        if row.nbytes > MAX_LINE_BYTES:
            yield partial(_too_long, size=row.nbytes)
        elif read := _whole(row):
            yield read[0]
        else:
            yield partial(_unreadable, row=row)


def _unreadable(number: int, row: Any) -> LineError:
    """Of a row with a value that Parquet can hold and Python cannot: a day beyond the year 9999, text in no UTF-8."""
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            column.to_pylist()
        except UNREADABLE as error:
            why = escaped(" ".join(str(error).split()))[:100]
            return LineError(
                number, name_of(name), f"its value cannot be read ({why}); save it as text, or leave it out"
            )
    return LineError(number, "row", "it cannot be read; save the file again")


def _decoded(raw: bytes, number: int) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        hint = "; this looks like UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
        reason = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8{hint}; save it as UTF-8"
        raise LineError(number, "line", reason) from None


def _too_long(number: int, size: int, hint: str = "") -> LineError:
    return LineError(number, "line", f"{size:,} bytes; a line holds {MAX_LINE_BYTES:,} at most{hint}")


def _in_unit(row: Row | LineError, unit: str) -> Row | LineError:
    if isinstance(row, LineError) and row.unit != unit:
        return LineError(row.line, unit if row.field == "line" else row.field, row.reason, unit)
    return row
