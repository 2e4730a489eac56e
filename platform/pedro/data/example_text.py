"""One example becomes the texts of its prompt and its answer, by a prompt format.

A plain answer is its own text. One that calls tools is written by the template: what it adds to the prompt that asks
for it. Whatever an example holds must be in these texts: a template that leaves something out is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from pedro.data import templates
from pedro.data.special_tokens import Prompt
from pedro.data.template_worker import TemplateBoundsError
from pedro.errors import DataError

if TYPE_CHECKING:
    from pedro.data.prompt_format import PromptFormat, Run
    from pedro.data.row_shapes import Example
    from pedro.data.tool_calls import Message, Tool
    from pedro.model_protocols import Tokenizer

    Turns = Sequence[Message]
    Poorer = tuple[Turns, Sequence[Tool]]

ANSWER = "Q7J-0b1e6f-Q7J"  # an answer that no template spells, to see how one is ended


def prompt_and_answer(form: PromptFormat, example: Example, tokenizer: Tokenizer) -> tuple[Prompt, str]:
    """Raises DataError where the format refuses the example, or would leave something of it out."""
    if example.plain:
        return form.prompt(example.messages, tokenizer), example.completion
    prompt = form.prompt(example.messages, tokenizer, tools=example.tools)
    if example.answer is None:
        check_carried(form, example.messages, example.tools)
        return prompt, example.completion
    conversation = (*example.messages, example.answer)
    whole = form.prompt(conversation, tokenizer, tools=example.tools, answer_follows=False)
    if not whole.startswith(prompt):
        raise DataError(
            f"messages: the {form.id} prompt format writes an answer that calls tools not behind its prompt; "
            "it cannot be learnt with it",
            param="messages",
        )
    check_carried(form, conversation, example.tools, answer_follows=False)
    start, stop = len(prompt), len(whole.removesuffix(_ending(form, example)))
    return prompt, Prompt.cut(whole[start:stop], [cut - start for cut in whole.cuts if start < cut < stop])


def outline(form: PromptFormat, example: Example) -> tuple[str, str]:
    """Texts that tell examples apart, for a check that knows no backbone."""
    prompt = form.render(example.messages)
    if example.plain:
        return prompt, example.completion
    told = [example.tools, [message.get("tool_calls") for message in example.messages]]
    calls = example.answer.get("tool_calls") if example.answer else None
    return prompt + _json(told), example.completion + (_json(calls) if calls else "")


def check_carried(
    form: PromptFormat, turns: Turns, tools: Sequence[Tool], answer_follows: bool = True, run: Run = templates.render
) -> None:
    """Raise DataError, naming it, for the first thing that could be missing and the text would be the same."""
    whole = form.render(turns, run, tools, answer_follows)
    for what, (fewer, told) in _poorer(turns, tools):
        try:
            same = form.render(fewer, run, told, answer_follows) == whole
        except TemplateBoundsError:
            raise
        except DataError:  # it looks at it, at least
            continue
        if same:
            raise DataError(
                f"messages: the {form.id} prompt format leaves out {what}; take a backbone whose chat template writes "
                "that, or leave it out",
                param="messages",
            )


def _ending(form: PromptFormat, example: Example) -> str:
    """What the template writes behind an answer: its end of a turn, in whose place the tokenizer's EOS comes."""
    answered = (*example.messages, {"role": "assistant", "content": ANSWER})
    try:
        return form.render(answered, tools=example.tools, answer_follows=False).rpartition(ANSWER)[2]
    except DataError:  # it wants something else after what was said
        return ""


def _poorer(turns: Turns, tools: Sequence[Tool]) -> Iterator[tuple[str, Poorer]]:
    """The same with one thing less, each time another one that is there."""
    if tools:
        yield "tools", (turns, ())

    def changed(change: Callable[[Message], dict[str, Any]]) -> Poorer | None:
        made = [{**turn, **change(turn)} for turn in turns]
        return (made, tools) if made != list(turns) else None

    for what, change in _CHANGES.items():
        if poorer := changed(change):
            yield what, poorer


def _no_arguments(turn: Message) -> dict[str, Any]:
    calls = [{**call, "function": {**call["function"], "arguments": {}}} for call in turn.get("tool_calls", ())]
    return {"tool_calls": calls} if calls else {}


def _first_call(turn: Message) -> dict[str, Any]:
    return {"tool_calls": turn["tool_calls"][:1]} if "tool_calls" in turn else {}


def _no_calls(turn: Message) -> dict[str, Any]:
    return {"tool_calls": []} if "tool_calls" in turn else {}


def _no_text_beside_calls(turn: Message) -> dict[str, Any]:
    return {"content": ""} if "tool_calls" in turn else {}


def _no_result(turn: Message) -> dict[str, Any]:
    return {"content": f"{turn['content']}{ANSWER}"} if turn["role"] == "tool" else {}


def _no_name(turn: Message) -> dict[str, Any]:
    return {"name": ""} if "name" in turn and turn["role"] != "tool" else {}


_CHANGES: dict[str, Callable[[Message], dict[str, Any]]] = {
    "tool_calls": _no_calls,
    "all calls of a turn but the first": _first_call,
    "the arguments of calls": _no_arguments,
    "the text beside calls": _no_text_beside_calls,
    "results of tools": _no_result,
    "names of those who speak": _no_name,
}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
