"""Shows how rows are masked: which tokens condition the vectors, and which the loss is taken over."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.data.example_text import prompt_and_answer
from pedro.data.lines import bad_lines, empty_file, scan
from pedro.data.mistakes import LineError
from pedro.data.prompt_format import PromptFormat, encode_completion, encode_prompt, format_for_shape

if TYPE_CHECKING:
    from pedro.data.row_shapes import Example, Fields
    from pedro.model_protocols import Tokenizer


@dataclass(frozen=True)
class MaskedRow:
    """One row as training sees it. `tokens` are texts, `supervised` says which of them the loss counts.

    A preference makes two, whose `side` is preferred and rejected.
    """

    line: int
    prompt: str
    completion: str
    prompt_len: int
    token_ids: tuple[int, ...]
    tokens: tuple[str, ...]
    supervised: tuple[bool, ...]
    side: str = ""

    @property
    def place(self) -> str:
        """Where it is from: its line, and which of two answers."""
        return f"line {self.line}, {self.side}" if self.side else f"line {self.line}"

    def text(self) -> str:
        """The row for a terminal: masked tokens plain, learnt ones in brackets."""
        marked = "".join(f"[{token}]" if on else token for token, on in zip(self.tokens, self.supervised, strict=True))
        learnt = len(self.tokens) - self.prompt_len
        head = f"{self.place}: {self.prompt_len} prompt tokens (masked), {learnt} answer tokens [learnt]"
        return f"{head}\n  {marked}"


def show_masks(
    path: Path | str,
    tokenizer: Tokenizer,
    n: int = 3,
    format: PromptFormat | None = None,
    max_length: int | None = None,
    fields: Fields | None = None,
) -> list[MaskedRow]:
    """The first `n` examples as training masks them, both sides of a preference.

    Raises DataError for a bad line or an empty file.
    """
    rows: list[MaskedRow] = []
    shown = 0
    for item in scan(path, fields):
        if isinstance(item, LineError):
            raise bad_lines(path, [item], 1)
        used = format or format_for_shape(item.shape, tokenizer)
        for example in item.examples:
            if example.rejected is None:
                rows.append(_masked(used, example, tokenizer, max_length))
            else:
                sides = {"preferred": example, "rejected": example.rejected}
                rows += [_masked(used, each, tokenizer, max_length, side) for side, each in sides.items()]
            shown += 1
            if shown == n:
                return rows
    if not rows:
        raise empty_file(path)
    return rows


def _masked(
    form: PromptFormat, example: Example, tokenizer: Tokenizer, max_length: int | None, side: str = ""
) -> MaskedRow:
    prompt, answer = prompt_and_answer(form, example, tokenizer)
    before = encode_prompt(tokenizer, prompt)
    ids = [*before, *encode_completion(tokenizer, answer)][:max_length]
    return MaskedRow(
        line=example.line,
        prompt=prompt,
        completion=answer,
        prompt_len=min(len(before), len(ids)),
        token_ids=tuple(ids),
        tokens=tuple(tokenizer.convert_ids_to_tokens(ids)),
        supervised=tuple(index >= len(before) for index in range(len(ids))),
        side=side,
    )
