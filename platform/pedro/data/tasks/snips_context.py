"""SNIPS among other talk: the same commands in prompts of up to 128 words more, before them or after them.

For methods that read the prompt through few tokens (PEDRO pools one): how much of a long prompt gets through. A row's
length is its group, so one training is scored at every length. The other talk is CLINC150's, which the package
carries; a hash of the command says how many words of it, and which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from pedro.data.demo import demo_tenant
from pedro.data.tasks import intents

if TYPE_CHECKING:
    from pedro.data.tasks.sources import Record
    from pedro.data.tasks.task import Task, TaskRow, Wording

WORDS = (0, 16, 32, 64, 128)
BARE, TEMPLATE = intents.SNIPS_TASK.wordings["full"], intents.SNIPS_TASK.wordings["template"]


def _row(record: Record, words: Wording, shots: str, combine: Callable[[str, str], str]) -> TaskRow | None:
    row = intents.make_from_hub(record, BARE, "")
    if row is None:
        return None
    count, talk = other_talk(row.prompt)
    text = combine(row.prompt, talk) if talk else row.prompt
    return replace(row, prompt=words.prompt({"text": text}, shots), group=f"{count} words")


def make_before(record: Record, words: Wording, shots: str) -> TaskRow | None:
    """The command comes last."""
    return _row(record, words, shots, lambda command, talk: f"{talk}\n{command}")


def make_after(record: Record, words: Wording, shots: str) -> TaskRow | None:
    """The command comes first: the last token must know what was said long before it."""
    return _row(record, words, shots, lambda command, talk: f"{command}\n{talk}")


def other_talk(command: str) -> tuple[int, str]:
    """How many words, and which: always the same for a command."""
    number = int.from_bytes(hashlib.blake2b(command.encode(), digest_size=8, key=b"other talk").digest())
    count = WORDS[number % len(WORDS)]
    talk = _talk()
    start = number // len(WORDS) % (len(talk) - count)
    return count, " ".join(talk[start : start + count])


@cache
def _talk() -> tuple[str, ...]:
    source = demo_tenant("globex").train
    return tuple(word for record in intents.read_clinc(source) for word in record["text"].split())


TALK_FIRST_TASK = replace(
    intents.SNIPS_TASK,
    name="snips_talk_first",
    folder="snips",
    title="SNIPS behind up to 128 words of other talk",
    wordings={"full": BARE, "template": TEMPLATE},
    make=make_before,
)
COMMAND_FIRST_TASK: Task = replace(
    TALK_FIRST_TASK,
    name="snips_command_first",
    title="SNIPS before up to 128 words of other talk",
    make=make_after,
)
