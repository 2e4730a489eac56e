"""Browses the rows behind scores: right or wrong, beside the backbone and another version or method, by label."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from drawing import BLUE, show_chart
from sources import rows as data

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.training.paired_test import PairedTest
    from pedro.training.scored_rows import ScoredRow

COLUMNS: dict[str, Any] = {
    "prompt": st.column_config.TextColumn("Prompt", width="large"),
    "wanted": st.column_config.TextColumn("Wanted"),
    "answer": st.column_config.TextColumn("Answer"),
    "right": st.column_config.CheckboxColumn("Right", width="small"),
    "loss": st.column_config.NumberColumn("Loss", format="%.3f", width="small"),
    "backbone_answer": st.column_config.TextColumn("Backbone's answer"),
    "backbone_right": st.column_config.CheckboxColumn("Right", width="small"),
    "backbone_loss": None,
    "other_answer": st.column_config.TextColumn("The other's"),
    "other_right": st.column_config.CheckboxColumn("Right", width="small"),
}

Reader = Callable[[], "tuple[list[ScoredRow], str]"]

read_rows = st.cache_data(ttl=60, show_spinner="Reading the rows …", max_entries=20)(data.rows_of)


def browse(settings: Settings, job_id: str, where: str, others: dict[str, str] | None = None) -> None:
    """The rows of a job; `others` are versions to compare with, and their jobs."""
    rows, problem = read_rows(settings, job_id)
    if problem:
        st.warning(f"The rows behind the scores cannot be read: {problem}", icon=":material/broken_image:")
        return
    if not rows:
        st.caption(
            "No rows were kept of this job: it is of an earlier release, has not scored yet, or ranks preferences."
        )
        return
    browse_rows(
        rows, job_id, where, {ref: partial(read_rows, settings, other) for ref, other in (others or {}).items()}
    )


def browse_rows(rows: Sequence[ScoredRow], name: str, where: str, others: Mapping[str, Reader]) -> None:
    """Any rows; `name` is what the file is called that they can be downloaded as."""
    columns = st.columns([2, 2, 3, 2], vertical_alignment="bottom")
    other = columns[3].selectbox("Compare with", ["–", *others], key=f"rows_other_{where}")
    theirs: list[ScoredRow] = []
    if other in others:
        theirs, problem = others[other]()
        if problem or not theirs:
            st.caption(problem or f"No rows were kept of {other}.")
    compared = data.beside(rows, theirs)
    kinds = [*data.FILTERS, *([data.DIFFER] if theirs else [])]
    kind = columns[0].selectbox("Rows", kinds, key=f"rows_kind_{where}")
    labels = sorted({row.wanted for row in rows})
    few = len(labels) <= data.MOST_LABELS
    wanted = columns[1].selectbox("Wanted", ["all", *labels], key=f"rows_wanted_{where}") if few else "all"
    text = columns[2].text_input("Search", key=f"rows_text_{where}", placeholder="words", icon=":material/search:")
    found = data.chosen(compared, kind or data.ALL, text, "" if wanted in (None, "all") else str(wanted))
    tests(rows, compared, other if theirs else "")
    frame = pd.DataFrame([each.to_dict() for each in found], columns=data.columns(compared))
    right = sum(row.right for row in rows)
    st.caption(f"{len(found):,} of {len(rows):,} rows shown; {right:,} are right ({right / len(rows):.1%}).")
    st.dataframe(frame, hide_index=True, width="stretch", column_config=COLUMNS, placeholder="–", height=380)
    st.download_button(
        "These rows as CSV",
        partial(data.as_csv, found),
        f"{name}-rows.csv",
        "text/csv",
        icon=":material/download:",
        on_click="ignore",
        key=f"rows_csv_{where}",
    )
    matrix(rows)


def tests(rows: Sequence[ScoredRow], compared: Sequence[data.Compared], other: str) -> None:
    """McNemar against the backbone and against the other version."""
    lines = []
    if (tested := data.against_backbone(rows)) is not None:
        lines.append(f"Against the backbone: {said(tested)}")
    if other and (tested := data.against_other(compared)) is not None:
        lines.append(f"Against {other}: {said(tested)}")
    if lines:
        st.markdown("  \n".join(lines))


def said(tested: PairedTest) -> str:
    p = min(1.0, 2 * min(tested.p_better, tested.p_worse))
    size = "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
    return (
        f"{tested.score:.1%} beside {tested.champion_score:.1%} on {tested.rows:,} rows; right where the other is "
        f"wrong {tested.better:,} times, wrong where it is right {tested.worse:,} times (McNemar's exact test, {size})."
    )


def matrix(rows: Sequence[ScoredRow]) -> None:
    """The confusion matrix, where answers are labels."""
    cells = data.confusion(rows)
    if not cells:
        return
    with st.expander("Confusion matrix", icon=":material/grid_on:"):
        frame = pd.DataFrame(cells)
        base = alt.Chart(frame).encode(
            x=alt.X("answer:N", title="answered", axis=alt.Axis(labelLimit=140, labelAngle=-40)),
            y=alt.Y("wanted:N", title="wanted", axis=alt.Axis(labelLimit=180)),
            tooltip=[alt.Tooltip("wanted:N"), alt.Tooltip("answer:N"), alt.Tooltip("rows:Q")],
        )
        dark = float(frame["rows"].max()) / 2
        cell = base.mark_rect().encode(
            color=alt.Color("rows:Q", scale=alt.Scale(range=["#eef3f7", BLUE], type="sqrt"), legend=None)
        )
        text = base.mark_text(fontSize=11).encode(
            text=alt.Text("rows:Q"), color=alt.condition(f"datum.rows > {dark}", alt.value("white"), alt.value("black"))
        )
        show_chart((cell + text).properties(height=80 + 22 * frame["wanted"].nunique()))
