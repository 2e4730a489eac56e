"""Turns tokens into text as they come. Knows nothing of sampling or batches.

Text is given out only when it is certain: never half a UTF-8 character, and never the beginning of what may
become a stop text. A stop text is found wherever the token borders fall.
"""

from __future__ import annotations

REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # enough of what stands before for a tokenizer to place spaces
MAX_HELD_TOKENS = 8  # more than any character takes: what is held then is not the beginning of one
MAX_CHARACTER_TOKENS = 4  # a UTF-8 character has at most four bytes, a token at least one


class Detokenizer:
    """The text of one answer, incrementally; the tail of the prompt stands before it so that spaces come out right."""

    def __init__(self, tokenizer, prompt_ids: list[int], stop: tuple[str, ...] = ()) -> None:
        self._tokenizer = tokenizer
        self._ids = list(prompt_ids[-CONTEXT_TOKENS:])
        self._start = 0  # tokens from here to `_read` are context, already given out
        self._read = len(self._ids)
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop text

    def add(self, token_id: int) -> tuple[str, bool]:
        """Take a token. Returns the text that became certain and whether a stop text was reached (it is cut off)."""
        self._ids.append(token_id)
        return self._release(self._decode_new())

    def flush(self) -> str:
        """The text still held back, when no token follows."""
        rest = self._decode(self._start, len(self._ids))[len(self._decode(self._start, self._read)) :]
        self._start = self._read = len(self._ids)
        text, _ = self._release(rest)
        text, self._held = text + self._held, ""
        return text

    def _decode(self, start: int, stop: int) -> str:
        ids = self._ids[start:stop]
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_new(self) -> str:
        before = self._decode(self._start, self._read)
        stop = len(self._ids)
        after = self._decode(self._start, stop)
        if after.endswith(REPLACEMENT):
            if stop - self._read < MAX_HELD_TOKENS:
                return ""
            stop, after = self._certain_part(stop)
        if len(after) <= len(before):
            return ""
        self._start, self._read = self._read, stop
        return after[len(before) :]

    def _certain_part(self, stop: int) -> tuple[int, str]:
        """The longest part that ends in a whole character; if there is none, all that cannot become one."""
        for end in range(stop - 1, self._read, -1):
            text = self._decode(self._start, end)
            if not text.endswith(REPLACEMENT):
                return end, text
        end = stop - MAX_CHARACTER_TOKENS + 1
        return end, self._decode(self._start, end)

    def _release(self, text: str) -> tuple[str, bool]:
        if not self._stop:
            return text, False
        text = self._held + text
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
