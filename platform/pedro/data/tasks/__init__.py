"""The benchmark tasks, by name. One file a task: its words, its parser, its metric's name, where its rows come from.

task.py    what a task is, rows           sources.py  files and the hub -> records
parsers.py a generated text -> its answer
"""

from __future__ import annotations

import difflib

from pedro.data.tasks import (
    alpaca,
    bbh,
    boolq,
    copa,
    gsm8k,
    intents,
    mmlu,
    mt_bench,
    qnli,
    record,
    rte,
    snips_context,
    squad,
    sst2,
    text2sql,
)
from pedro.data.tasks.task import BARE, TEMPLATE, Task, TaskRow, Wording, proportional
from pedro.errors import ConfigError

__all__ = ["BARE", "TASKS", "TEMPLATE", "Task", "TaskRow", "Wording", "get_task", "proportional"]

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        sst2.TASK,
        rte.TASK,
        qnli.TASK,
        boolq.TASK,
        copa.TASK,
        record.TASK,
        squad.TASK,
        alpaca.TASK,
        mmlu.TASK,
        bbh.TASK,
        mt_bench.TASK,
        gsm8k.TASK,
        text2sql.WIKISQL_TASK,
        text2sql.ADVISING_TASK,
        intents.SNIPS_TASK,
        intents.CLINC_TASK,
        intents.BANKING_TASK,
        intents.BANKING_ALL_TASK,
        snips_context.TALK_FIRST_TASK,
        snips_context.COMMAND_FIRST_TASK,
    )
}


def get_task(name: str, wording: str = TEMPLATE, shots: int = 0) -> Task:
    """The task called `name`, in one of its wordings, with `shots` worked examples before each prompt.

    Raises ConfigError that lists the tasks, or the wordings that this one has.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ConfigError(f"task: there is no {name!r}; {hint}choose one of: {', '.join(TASKS)}", param="task")
    return TASKS[name].configured(wording, shots)
