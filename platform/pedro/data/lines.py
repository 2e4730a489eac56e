"""The good rows of a file and its bad ones, all of one shape."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from pedro.data.files import Kind, open_file
from pedro.data.mistakes import LineError
from pedro.data.row_reader import file_kind, read_rows
from pedro.data.row_shapes import FIELDS, Fields, ParsedLine, RowShape, has_context, read_row
from pedro.errors import ConfigError, DataError


def scan(path: Path | str, fields: Fields | None = None) -> Iterator[ParsedLine | LineError]:
    """Each row of the file that is not blank, parsed, or the error that it is. `fields` names columns.

    The first good row sets the file's shape; a row of another shape is an error. Raises DataError if the file cannot
    be opened.
    """
    path = Path(path)
    shape: RowShape | None = None
    first = 0
    chat = False
    unit = kind(path, fields).unit
    for number, row in read_rows(path, _columns(fields)):
        if isinstance(row, LineError):
            yield row
            continue
        try:
            parsed = read_row(row, number, fields, chat)
            if shape is None and parsed.shape is RowShape.ALPACA and _has_context(path, fields):
                chat = True
                parsed = read_row(row, number, fields, chat)
        except LineError as error:
            yield error if unit == error.unit else LineError(number, error.field, error.reason, unit)
            continue
        if shape is None:
            shape, first = parsed.shape, number
        if parsed.shape is not shape:
            reason = f"this is {parsed.shape}, but {unit} {first} is {shape}; a file holds one shape"
            yield LineError(number, "shape", reason, unit)
            continue
        yield parsed


def kind(path: Path | str, fields: Fields | None = None) -> Kind:
    """What kind of file it is. Raises DataError if it cannot be read."""
    return file_kind(Path(path), _columns(fields))


def shape_of(path: Path | str, fields: Fields | None = None) -> RowShape:
    """The shape that the first good row sets. Raises DataError if no row is good."""
    errors: list[LineError] = []
    for item in scan(path, fields):
        if isinstance(item, ParsedLine):
            return item.shape
        errors.append(item)
        if len(errors) == 20:
            break
    raise bad_lines(path, errors, len(errors)) if errors else empty_file(path)


def parse_fields(text: str) -> dict[str, str]:
    """`prompt=question,completion=answer` as a mapping. Raises ConfigError."""
    pairs = [part.partition("=") for part in text.split(",")]
    if any(not equals for _, equals, _ in pairs):
        raise ConfigError(f"fields: {text!r}: expected prompt=COLUMN,completion=COLUMN", param="fields")
    return check_fields({field.strip(): column for field, _, column in pairs})


def check_fields(fields: Fields) -> dict[str, str]:
    """`fields` if it maps fields that rows may have to different columns; ConfigError if not."""
    for field, column in fields.items():
        if field not in FIELDS:
            raise ConfigError(f"fields: {field!r} is not a field of a row; known: {', '.join(FIELDS)}", param="fields")
        if not column or list(fields.values()).count(column) > 1:
            raise ConfigError(f"fields: {field}={column!r}: expected a column of its own", param="fields")
    return dict(fields)


def data_digest(path: Path | str) -> str:
    """ "sha256:..." of the file's bytes. Raises DataError if it cannot be opened."""
    with open_file(Path(path)) as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def empty_file(path: Path | str) -> DataError:
    return DataError(f"data: {str(path)!r} holds no examples; put one JSON object on each line", param="data")


def bad_lines(path: Path | str, errors: list[LineError], count: int, shown: int = 5) -> DataError:
    """One error that shows the first `shown` of `count` bad lines."""
    some = "; ".join(error.message for error in errors[:shown])
    rest = f"; and {count - shown} more" if count > shown else ""
    remedy = f"`pedro data check {path}` lists them"
    return DataError(f"data: {str(path)!r} has {count} bad line(s): {some}{rest}. {remedy}", param="data")


def _columns(fields: Fields | None) -> set[str]:
    return {*FIELDS, *(fields or {}).values()}


def _has_context(path: Path, fields: Fields | None) -> bool:
    """Whether any row of an Alpaca file has a system or a history, which makes conversations of all of them."""
    named = {column: field for field, column in (fields or {}).items()}
    for _, row in read_rows(path, _columns(fields)):
        if not isinstance(row, LineError) and has_context({named.get(key, key): row[key] for key in row}):
            return True
    return False
