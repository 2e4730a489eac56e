"""Rows of our benchmark tasks as lm-eval's task files read them: what `custom_dataset` of `tasks/*.yaml` calls.

The data are the packaged rows, or those under PEDRO_TASK_DATA, as `pedro tasks` has them.
"""

from __future__ import annotations

import os
from typing import Any

from pedro.data.tasks import get_task, proportional


def load(
    task: str,
    wording: str = "full",
    limit: int | None = None,
    sample: int | None = None,
    packaged: bool = False,
    data: str | None = None,
    **_: Any,
) -> Any:
    """A `DatasetDict` of the task's splits: prompt, completion and `choices`, the row's own or the task's classes.

    `data` is a directory in place of PEDRO_TASK_DATA's; `packaged` takes the package's own rows whatever that says;
    `limit` a fair sample of a split, `sample` one in which each group has its share.
    """
    from datasets import Dataset, DatasetDict

    wanted = get_task(task, wording)
    data = None if packaged else data or os.environ.get("PEDRO_TASK_DATA")
    choices = list(dict.fromkeys(wanted.words.labels.values()))
    splits = {}
    for split in wanted.splits(data):
        rows = wanted.rows(split, data, limit)
        if sample is not None:
            rows = iter(proportional(rows, sample))
        splits[split] = Dataset.from_list(
            [
                {
                    "prompt": row.prompt,
                    "completion": row.completion,
                    "choices": list(row.extra.get("choices", ())) or choices,
                }
                for row in rows
            ]
        )
    return DatasetDict(splits)
