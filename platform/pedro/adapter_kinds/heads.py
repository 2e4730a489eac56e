"""Where a prompt's head ends: the part that conditions vectors, up to and with tokens that end it."""

from __future__ import annotations

from collections.abc import Sequence


def head_length(end: tuple[int, ...], prompt_ids: Sequence[int]) -> int:
    """The tokens of a prompt up to where `end` first ends; all where it does not occur."""
    stops = range(len(end), len(prompt_ids) + 1)
    return next((stop for stop in stops if tuple(prompt_ids[stop - len(end) : stop]) == end), len(prompt_ids))
