"""Rows of our benchmark tasks as lm-eval's task files read them: what `custom_dataset` of `tasks/*.yaml` calls.

The data are the packaged rows, or those under PEDRO_TASK_DATA, as `pedro tasks` has them.
"""

from __future__ import annotations

import os
from typing import Any

from pedro.data.tasks import get_task


def load(task: str, wording: str = "full", limit: int | None = None, packaged: bool = False, **_: Any) -> Any:
    """A `DatasetDict` of the task's splits: prompt, completion and `choices`, the words for its classes if it has any.

    `packaged` takes the package's own rows whatever PEDRO_TASK_DATA says; `limit` a fair sample of a split.
    """
    from datasets import Dataset, DatasetDict

    wanted = get_task(task, wording)
    data = None if packaged else os.environ.get("PEDRO_TASK_DATA")
    choices = list(dict.fromkeys(wanted.words.labels.values()))
    splits = {}
    for split in wanted.splits(data):
        rows = wanted.rows(split, data, limit)
        splits[split] = Dataset.from_list(
            [{"prompt": row.prompt, "completion": row.completion, "choices": choices} for row in rows]
        )
    return DatasetDict(splits)
