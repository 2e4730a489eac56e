"""How errors in a data file are reported: by line or row, field and reason."""

from __future__ import annotations

from typing import Any

from pedro.errors import DataError


class LineError(DataError):
    """One line of a file is wrong: `line` (from 1), `field` and `reason`. `unit` is what the file is counted in."""

    def __init__(self, line: int, field: str, reason: str, unit: str = "line") -> None:
        super().__init__(f"{unit} {line}: {field}: {reason}", param=field)
        self.line = line
        self.field = field
        self.reason = reason
        self.unit = unit

    def __reduce__(self) -> tuple[Any, ...]:
        return LineError, (self.line, self.field, self.reason, self.unit)


def escaped(text: str) -> str:
    """`text` without anything that a terminal acts on or cannot print: ESC, line ends, half surrogates."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def name_of(field: str) -> str:
    """A field's name as it may be printed, not longer than 40 characters."""
    shown = escaped(field[:41])
    return shown if len(shown) <= 40 else shown[:37] + "..."


def names_of(row: dict[str, Any]) -> str:
    """The first fields of a row."""
    return ", ".join(name_of(key) for key in list(row)[:8]) or "an empty object"


def kind_of(value: Any, show: bool = False, empty: bool = False) -> str:
    """What `value` is, in JSON's words; with `show` a short text is quoted, with `empty` an empty list is said."""
    if value is None:
        return "null or nothing"
    if isinstance(value, str):
        return f"{value[:40]!r}" if show else "text"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list | tuple):
        return "an empty list" if empty and not value else "a list"
    return "an object"


def blank(value: Any) -> bool:
    """Whether a field says nothing: null, or what exports write in its place."""
    return value is None or value in ([], {}) or (isinstance(value, str) and value.strip() in ("", "[]", "{}", "null"))


def text_of(value: Any, where: str, line: int, needed: bool = False) -> str:
    """`value` if it is text that can be written as UTF-8; with `needed`, not blank either. Raises LineError."""
    if not isinstance(value, str):
        hint = "; put it in quotes" if isinstance(value, int | float) else ""
        raise LineError(line, where, f"expected text, got {kind_of(value)}{hint}")
    if needed and not value.strip():
        raise LineError(line, where, "empty: the answer needs something to answer")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise LineError(line, where, "half of a UTF-16 surrogate pair (\\ud800-\\udfff) is not text") from None
    return value
