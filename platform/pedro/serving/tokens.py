"""The text and the bytes of a single token, as `logprobs` show them. Knows nothing of requests."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Looks up tokens of one tokenizer; each is worked out once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False).input_ids
        self._before = tokenizer.decode(self._anchor)
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def __call__(self, token_id: int) -> tuple[str, bytes | None]:
        """The token's text with its leading space, and its bytes where the text alone cannot tell them."""
        found = self._known.get(token_id)
        if found is None:
            found = self._known[token_id] = self._look(token_id)
        return found

    def _look(self, token_id: int) -> tuple[str, bytes | None]:
        piece = self._tokenizer.convert_ids_to_tokens(token_id)
        if piece is None:
            return "", None
        byte = _BYTE.fullmatch(piece)
        if byte:
            raw = bytes([int(byte[1], 16)])
            return raw.decode(errors="replace"), raw
        text = self._tokenizer.decode([*self._anchor, token_id])[len(self._before) :]
        if "\ufffd" not in text:
            return text, None
        table = _byte_of_character()
        return text, bytes(table[c] for c in piece) if all(c in table for c in piece) else None


@cache
def _byte_of_character() -> dict[str, int]:
    """Byte-level BPE's alphabet (GPT-2, `bytes_to_unicode`), read backwards."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}
