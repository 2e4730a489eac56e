"""Turns the tokens of one answer into text as they arrive.

Text is emitted only when it is final: never an incomplete UTF-8 character, and never the possible beginning of a stop
text. Stop texts are found across token boundaries.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

if TYPE_CHECKING:
    from pedro.model_protocols import TokenDecoder

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # enough context for a tokenizer to place spaces
MAX_HELD_TOKENS = 8  # more than any character has: held tokens beyond this cannot begin one
UNFINISHED_TOKENS = 3  # a UTF-8 character has at most four bytes, a token at least one


class Detokenizer:
    """The text of one answer, incrementally; decoded after the tail of the prompt, so that spaces come out right.

    Without a prompt the answer is decoded on its own, as it was if it was tokenised apart from its prompt. Stop texts
    are heeded after `min_tokens` tokens: they must end in a later token's text, but may begin earlier.
    """

    __slots__ = ("_context", "_decode", "_held", "_new_stream", "_passed", "_pending", "_step", "_stop", "_unstoppable")

    def __init__(
        self, tokenizer: TokenDecoder, prompt_ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0
    ) -> None:
        self._decode, self._new_stream = _decoding(tokenizer)
        self._context, self._pending = self._whole_characters(list(prompt_ids[-CONTEXT_TOKENS:]))
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        self._passed = 0  # of these, characters of the first `min_tokens`: no stop text ends there
        self._unstoppable = min_tokens  # tokens left until stop texts count
        self._step = self._new_stream(self._context)
        for token_id in self._pending:
            self._step(token_id)

    def add(self, token_id: int) -> tuple[str, bool]:
        """Add a token. Returns the text that became final and whether a stop text was reached (which is cut off)."""
        text = self._take(token_id)
        if not self._stop:
            return text, False
        stoppable = self._unstoppable <= 0
        self._unstoppable -= 1
        return self._release(text, stoppable)

    def flush(self) -> str:
        """The text still held back, when no more tokens follow."""
        rest, self._pending = self._text_of(self._pending), []
        text, _ = self._release(rest, self._unstoppable < 0) if self._stop else (rest, False)
        text, self._held = text + self._held, ""
        return text

    def _take(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._step(token_id)
        except Exception:  # noqa: BLE001 - raises a bare Exception, when a token changes the text of earlier ones
            text = self._text_of(self._pending)
            self._step = self._new_stream(self._pending)
        if text is not None:
            self._context, self._pending = self._pending, []
            return text
        return "" if len(self._pending) < MAX_HELD_TOKENS else self._give_up_waiting()

    def _give_up_waiting(self) -> str:
        """The text of the pending tokens, without the last ones if they may still become a character."""
        sure, unfinished = self._pending[:-UNFINISHED_TOKENS], self._pending[-UNFINISHED_TOKENS:]
        text, self._pending = self._text_of(sure), []
        self._step = self._new_stream(self._context)
        return text + "".join(map(self._take, unfinished))

    def _text_of(self, ids: list[int]) -> str:
        """The text that `ids` add after the context."""
        return self._decode([*self._context, *ids])[len(self._decode(self._context)) :] if ids else ""

    def _whole_characters(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """`ids` without the last ones if these leave a character unfinished."""
        for cut in range(len(ids), max(-1, len(ids) - UNFINISHED_TOKENS - 1), -1):
            if not self._decode(ids[:cut]).endswith(REPLACEMENT):
                return ids[:cut], ids[cut:]
        return [], []

    def _release(self, text: str, stoppable: bool) -> tuple[str, bool]:
        text = self._held + text
        passed = self._passed if stoppable else len(text)
        hits = [at for at in (text.find(stop, max(0, passed - len(stop) + 1)) for stop in self._stop) if at >= 0]
        if hits and stoppable:
            self._held = ""
            return text[: min(hits)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held, self._passed = text[len(text) - keep :], max(0, passed - (len(text) - keep))
        return text[: len(text) - keep], False


class _PlainStream:
    """A replacement for DecodeStream, for tokenizers without a Rust backend."""

    def __init__(self, decode: Callable[[list[int]], str], ids: list[int]) -> None:
        self._decode = decode
        self._ids = list(ids)
        self._read = len(ids)  # tokens up to here are context, already emitted

    def step(self, token_id: int) -> str | None:
        """The text completed by `token_id`, or None."""
        self._ids.append(token_id)
        before, after = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return None
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return after[len(before) :]


def _decoding(
    tokenizer: TokenDecoder,
) -> tuple[Callable[[list[int]], str], Callable[[list[int]], Callable[[int], str | None]]]:
    """How to decode tokens at once, and how to begin a stream after given tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return (
            partial(backend.decode, skip_special_tokens=True),
            lambda ids: partial(DecodeStream(ids=ids, skip_special_tokens=True).step, backend),
        )
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decode, lambda ids: _PlainStream(decode, ids).step


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
