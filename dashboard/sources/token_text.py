"""Tokens of a vocabulary as the text that they stand for: blanks instead of Ġ or ▁, letters instead of their bytes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

BLANK_OF_BYTES, BLANK_OF_PIECES = "Ġ", "▁"


def token_texts(tokens: Sequence[str]) -> list[str]:
    """The tokens of one row. They are of bytes if any begins as a blank does there."""
    if any(token.startswith(BLANK_OF_BYTES) for token in tokens):
        return [_of_bytes(token) for token in tokens]
    return [token.replace(BLANK_OF_PIECES, " ") for token in tokens]


def _of_bytes(token: str) -> str:
    table = _bytes()
    if not all(sign in table for sign in token):  # a special token, say
        return token
    return bytes(table[sign] for sign in token).decode(errors="replace")


@cache
def _bytes() -> dict[str, int]:
    """The printable signs by which byte-level vocabularies write bytes, as GPT-2's has them."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + index): byte for index, byte in enumerate(others)}
