"""Pagination as in OpenAI's lists: parses the query and formats a page."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeVar

from pedro.errors import PedroError

DEFAULT_LIMIT, MAX_LIMIT = 20, 100
Row = TypeVar("Row")


def known_parameters(given: Iterable[tuple[str, str]], known: Collection[str]) -> dict[str, str]:
    """The query by name; the last value wins. Raises PedroError for an unknown name."""
    found = dict(given)
    for name in sorted(found.keys() - set(known)):
        message = f"Unrecognized request argument supplied: {name[:80]}; known: {', '.join(known)}"
        raise PedroError(message, param=name[:80], code="unknown_parameter")
    return found


def page_limit(text: str | None, default: int = DEFAULT_LIMIT, most: int = MAX_LIMIT) -> int:
    """Rows per page. Raises PedroError if out of range or not a number."""
    if text is None:
        return default
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= most:
        raise wrong_value("limit", f"expected 1 to {most}", text)
    return int(text)


def page(found: Sequence[Row], limit: int, shown: Callable[[Row], dict[str, Any]]) -> dict[str, Any]:
    """The response of a list, given one row more than a page, which shows whether there are more."""
    data = [shown(row) for row in found[:limit]]
    return {
        "object": "list",
        "data": data,
        "has_more": len(found) > limit,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
    }


def wrong_value(field: str, expected: str, got: str) -> PedroError:
    """The error for a parameter of the query."""
    return PedroError(f"{field}: {expected}, got {got[:80]!r}", param=field, code="invalid_value")
