"""The system turn as the only part of a prompt that conditions an adapter: `conditioning: system`.

A prompt's head is what a format writes for a system turn whatever the user says, tools included where it puts them
there. It ends with tokens that are the same for every system turn. They are found once for a format and a tokenizer;
training, PEFT's generate() and the engine then look for them alone. So no prompt may have another head than these
tokens say: rows and conversations are checked here, by the template itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pedro.adapter_kinds.heads import head_length
from pedro.data import templates
from pedro.data.prompt_format import PromptFormat, Run, encode_prompts
from pedro.data.template_worker import TemplateBoundsError
from pedro.errors import DataError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

    Messages = Sequence[Mapping[str, Any]]

SYSTEM, PROMPT = "system", "prompt"  # what conditions: the system turn, or all of the prompt
KEPT_HEADS = 64
_SYSTEMS = ("Be brief.", "You are a clerk", "x = (7)", "Two lines\nof text\n")  # that end unlike each other
_USERS = ("the cat", "7", "What is it?", "(a)", "\n- b")  # that begin unlike each other


def find_head_end(form: PromptFormat, tokenizer: Tokenizer, run: Run = templates.render) -> tuple[int, ...]:
    """The token ids with which the format ends every system turn, up to the last special one if one is among them:
    what a user says may be joined to others. Raises DataError where it has none.
    """
    heads = []
    for text in _SYSTEMS:
        system = {"role": "system", "content": text}
        try:
            prompts = [form.prompt((system, {"role": "user", "content": said}), tokenizer, run) for said in _USERS]
        except TemplateBoundsError:
            raise
        except DataError as error:
            raise _no_head(form, f"refuses a system and a user turn ({error.message})") from None
        heads.append(_beginning(encode_prompts(tokenizer, prompts)))
    end = _beginning([head[::-1] for head in heads])[::-1]
    if min(map(len, heads)) <= len(end):
        raise _no_head(form, "leaves the system turn out or writes it behind the user's")
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    last = max((place for place, token in enumerate(end, start=1) if token in special), default=len(end))
    if not end:
        raise _no_head(form, "writes nothing behind a system turn")
    return tuple(end[:last])


def asked(messages: Messages) -> tuple[Messages, Messages]:
    """Two conversations that have only their system turn in common with `messages` and with each other. Raises
    DataError where there is no system turn."""
    if not messages or messages[0]["role"] != "system":
        raise DataError(
            "messages: the adapter is conditioned on the system turn (conditioning: system), and there is none; "
            "begin with one",
            param="messages",
        )
    first, second = ((messages[0], {"role": "user", "content": said}) for said in _USERS[:2])
    return first, second


def head_of(form: PromptFormat, prompts: Sequence[list[int]]) -> list[int]:
    """The head that two prompts as `asked` have in common. Raises DataError where it ends somewhere else than its
    tokens say: its text spells what ends it, or joins it."""
    shared, end = _beginning(prompts), form.head_end
    stops = range(len(shared), len(end) - 1, -1)
    stop = next((stop for stop in stops if tuple(shared[stop - len(end) : stop]) == end), 0)
    if not stop or head_length(end, shared) != stop:
        raise DataError(
            f"messages: the system turn holds or hides what ends it in the {form.id} prompt format, so that it could "
            "not be told where it ends; word it otherwise",
            param="messages",
        )
    return shared[:stop]


def check_head(form: PromptFormat, head: list[int], prompt_ids: list[int]) -> None:
    """Raise DataError unless the prompt begins with this head."""
    if prompt_ids[: len(head)] != head:
        raise DataError(
            f"messages: the {form.id} prompt format does not begin this prompt with its system turn as it does before "
            "any user's turn, so it cannot condition the adapter; let a user's turn follow it",
            param="messages",
        )


class Heads:
    """Checks prompts of one format; the heads of the system turns that were used last are kept."""

    def __init__(self, form: PromptFormat, tokenizer: Tokenizer) -> None:
        self._form, self._tokenizer = form, tokenizer
        self._head = lru_cache(KEPT_HEADS)(self._make)

    def check(self, messages: Messages, tools: Sequence[Any], prompt_ids: list[int]) -> None:
        """Raise DataError where the prompt of these messages has no head, or another than it seems."""
        asked(messages)
        check_head(self._form, self._head(json.dumps([messages[0], list(tools)])), prompt_ids)

    def _make(self, told: str) -> list[int]:
        system, tools = json.loads(told)
        prompts = [self._form.prompt(turns, self._tokenizer, tools=tools) for turns in asked([system])]
        return head_of(self._form, encode_prompts(self._tokenizer, prompts))


def _beginning(rows: Iterable[list[int]]) -> list[int]:
    """What all rows begin with."""
    rows = list(rows)
    first, last = min(rows), max(rows)  # in the order of their tokens: whatever these share, all between them do
    same = (place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other)
    return first[: next(same, len(first))]


def _no_head(form: PromptFormat, why: str) -> DataError:
    return DataError(
        f"method.conditioning: the {form.id} prompt format {why}, so {SYSTEM} cannot condition on it; take rows of "
        f"conversations, a backbone with another chat template, or {PROMPT}",
        param="method.conditioning",
    )
