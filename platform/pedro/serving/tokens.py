"""A tokenizer's single tokens, as text and bytes, and its settings."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "model_max_length")
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenTexts:
    """Looks up tokens of one tokenizer; cached."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._anchor = tokenizer("a", add_special_tokens=False).input_ids
        self._before = tokenizer.decode(self._anchor)
        self._known: dict[int, tuple[str, bytes | None]] = {}

    def __call__(self, token_id: int) -> tuple[str, bytes | None]:
        """The token's text with its leading space, and its bytes if the text does not determine them."""
        text = self._known.get(token_id)
        if text is None:
            text = self._known[token_id] = self._look(token_id)
        return text

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
    """The inverse of byte-level BPE's alphabet (GPT-2, `bytes_to_unicode`)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


def tokenizer_info(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a client needs to tokenise like this tokenizer, as JSON: the form of vLLM's `/tokenizer_info`."""
    info = {name: tokenizer.init_kwargs[name] for name in _SETTINGS if name in tokenizer.init_kwargs}
    info["tokenizer_class"] = type(tokenizer).__name__
    for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
        info[name] = getattr(tokenizer, name, None)
    if getattr(tokenizer, "chat_template", None):
        info["chat_template"] = tokenizer.chat_template
    return info
