"""Reads a JSONL file line by line, whatever is in it. Knows nothing of tokenizers or templates.

Memory stays bounded by one line: a longer one than `MAX_LINE_BYTES` is skipped on disk, never loaded. A bad line
is yielded as the error it is, so that a check can report all of them and a loader can stop at the first ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path

from pedro.data.shapes import LineError, ParsedLine, Shape, read_line
from pedro.errors import DataError

MAX_LINE_BYTES = 1 << 20
BOM = b"\xef\xbb\xbf"


def scan(path: Path | str) -> Iterator[ParsedLine | LineError]:
    """Each line of the file that is not blank, parsed, or the error that it is.

    The first good line sets the file's shape; a line of another shape is an error. Raises DataError if the file
    cannot be opened.
    """
    shape: Shape | None = None
    first = 0
    for number, line in _lines(Path(path)):
        if isinstance(line, LineError):
            yield line
            continue
        try:
            parsed = read_line(line, number)
        except LineError as error:
            yield error
            continue
        if shape is None:
            shape, first = parsed.shape, number
        if parsed.shape is not shape:
            reason = f"this is {parsed.shape}, but line {first} is {shape}; a file holds one shape"
            yield LineError(number, "shape", reason)
            continue
        yield parsed


def shape_of(path: Path | str) -> Shape:
    """The shape that the first good line sets. Raises DataError if no line is good."""
    errors: list[LineError] = []
    for item in scan(path):
        if isinstance(item, ParsedLine):
            return item.shape
        errors.append(item)
        if len(errors) == 20:
            break
    raise bad_lines(path, errors, len(errors)) if errors else empty_file(path)


def data_digest(path: Path | str) -> str:
    """ "sha256:..." of the file's bytes. Raises DataError if it cannot be opened."""
    with open_file(Path(path)) as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def open_file(path: Path) -> BufferedReader:
    """The file for reading. Raises DataError that names it."""
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"data: {str(path)!r} cannot be read: {error.strerror}; check the path", param="data") from None


def empty_file(path: Path | str) -> DataError:
    return DataError(f"data: {str(path)!r} holds no examples; put one JSON object on each line", param="data")


def bad_lines(path: Path | str, errors: list[LineError], count: int, shown: int = 5) -> DataError:
    """One error that shows the first `shown` of `count` bad lines."""
    some = "; ".join(error.message for error in errors[:shown])
    rest = f"; and {count - shown} more" if count > shown else ""
    remedy = f"`pedro data check {path}` lists them"
    return DataError(f"data: {str(path)!r} has {count} bad line(s): {some}{rest}. {remedy}", param="data")


def _lines(path: Path) -> Iterator[tuple[int, str | LineError]]:
    with open_file(path) as stream:
        number = 0
        while raw := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if number == 1 and raw.startswith(BOM):
                raw = raw[len(BOM) :]
            if len(raw) > MAX_LINE_BYTES and not raw.endswith(b"\n"):
                size = len(raw) + _skip_line(stream)
                yield number, LineError(number, "line", f"{size:,} bytes; a line holds {MAX_LINE_BYTES:,} at most")
                continue
            try:
                line = raw.decode()
            except UnicodeDecodeError as error:
                hint = "; this looks like UTF-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else ""
                reason = f"byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8{hint}; save it as UTF-8"
                yield number, LineError(number, "line", reason)
                continue
            if line.strip():
                yield number, line


def _skip_line(stream: BufferedReader) -> int:
    """Reads on to the end of the line; how many bytes that was."""
    skipped = 0
    while raw := stream.readline(MAX_LINE_BYTES):
        skipped += len(raw)
        if raw.endswith(b"\n"):
            break
    return skipped
