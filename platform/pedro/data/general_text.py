"""General text that no method is tuned on, packaged, in windows of tokens: what a tuned model should still predict.

The first quarter of a window is read as a prompt, the rest is to be predicted. So what conditions the vectors of a
prompt-dependent method is the text before, as where a request of another kind reaches an adapter; and every method
predicts the same tokens after the same ones.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.data.prompt_format import encode_prompts, encode_text

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

FILE = Path(__file__).parents[1] / "assets" / "text" / "wikitext2" / "test.txt"
NAME = "WikiText-2 test"
WINDOW = 256  # tokens, BOS among them
MOST_TOKENS = 16_000  # to be predicted; the text has so many in any vocabulary


def text_digest() -> str:
    """Changes with the text and with how it is cut."""
    return hashlib.sha256(f"{WINDOW}\n".encode() + FILE.read_bytes()).hexdigest()


def windows(tokenizer: Tokenizer, tokens: int, longest: int) -> list[dict[str, Any]]:
    """Rows as `scoring` takes them, of which exactly `tokens` are to be predicted (all that there are, if fewer).

    The windows follow each other from the text's beginning, each with BOS in front where the tokenizer has one; none
    is longer than `longest`. The last is cut to the number of tokens.
    """
    front = encode_prompts(tokenizer, [""])[0]
    size = min(WINDOW, longest) - len(front)
    context = size // 4
    wanted = tokens + (-(-tokens // (size - context))) * context
    ids = _first_tokens(tokenizer, wanted)
    return [
        {"input_ids": [*front, *ids[start : start + size]], "prompt_len": len(front) + context}
        for start in range(0, len(ids), size)
        if len(ids) - start > context
    ]


def _first_tokens(tokenizer: Tokenizer, count: int) -> list[int]:
    """The first `count` tokens of the text, paragraph by paragraph."""
    ids: list[int] = []
    for paragraph in FILE.read_text(encoding="utf-8").splitlines(keepends=True):
        ids += encode_text(tokenizer, paragraph)
        if len(ids) >= count:
            break
    return ids[:count]
