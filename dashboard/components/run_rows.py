"""The rows behind a comparison's scores: one run's, right or wrong, beside those of another method or seed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import streamlit as st

from components import shared_url
from components.row_browser import browse_rows
from sources import run_rows as data

if TYPE_CHECKING:
    from sources.compare import FilteredComparison

read_rows = st.cache_data(ttl=60, show_spinner="Reading the rows …", max_entries=20)(data.rows_of_run)


def rows_behind(selection: FilteredComparison, order: Sequence[str]) -> None:
    """A task, the first in `order` unless the reader picks another, and a run of those that are shown."""
    st.subheader("Rows behind the scores", anchor=False)
    folder = selection.comparison.folder
    kept = data.runs_with_rows(selection)
    if not kept:
        st.caption(
            "No rows were kept of these runs. `pedro compare` keeps them as it runs; those of a job stand on Runs."
        )
        return
    left, right = st.columns(2)
    tasks = [task for task in order if task in kept] or list(kept)
    with left:
        task = shared_url.choose(
            "Task", tasks, "rows_task", titles=selection.titles, what="Task", placeholder="Choose a task"
        )
    if task is None:
        return
    names = kept[task]
    name = right.selectbox("Run", list(names), key=f"rows_run_{task}") or next(iter(names))
    rows, problem = read_rows(folder, names[name], task)
    if problem:
        st.warning(problem, icon=":material/broken_image:")
        return
    others = {other: partial(read_rows, folder, run, task or tasks[0]) for other, run in names.items() if other != name}
    browse_rows(rows, names[name], f"compare_{task}", others)
    st.caption("Right: the task's own metric gives the answer all of its marks. Prompts are as the task words them.")
