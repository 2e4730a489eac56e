"""Draws the check of a data file: figures, errors by line, the commonest answers, rows as they are masked."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from drawing import number
from pedro.data.check import GOOD_ROW, MAX_ERRORS
from pedro.data.files import Kind
from pedro.data.mistakes import escaped
from sources.token_text import token_texts

if TYPE_CHECKING:
    from pedro.data.check import DataReport
    from pedro.data.masks import MaskedRow
    from sources.training import Checked

MASKED = "opacity: 0.6"
LEARNT = "background: rgba(0, 114, 178, 0.22); border-bottom: 2px solid #0072B2; border-radius: 2px"
MOST_TOKENS = 400  # of a row that is shown; a longer one is cut


def draw(checked: Checked, name: str) -> None:
    """All of it; whether the file can be trained on comes first."""
    report = checked.report
    if report is None:
        st.error(checked.problem, icon=":material/error:")
        return
    if report.usable:
        st.success(f"`{name}` can be trained on.", icon=":material/check_circle:")
    else:
        bad = f"{report.error_count:,} of its {report.rows:,} {Kind(report.kind).unit}s cannot be read"
        said = bad if report.error_count else "no example of it can be trained on"
        st.error(f"`{name}` cannot be trained on: {said}.", icon=":material/error:")
    figures(report)
    if report.errors:
        errors(report)
    notes = [checked.unmeasured, *remarks(report)]
    if any(notes):
        st.markdown("\n".join(f"- {note}" for note in notes if note))
    left, right = st.columns([2, 3], gap="large") if checked.masks else (st.container(), None)
    with left:
        answers(report)
    if right:
        with right:
            masks(checked.masks)


def figures(report: DataReport) -> None:
    """Rows and lengths."""
    columns = st.columns(4)
    number(columns[0], "Rows", f"{report.rows:,}", f"{report.examples:,} examples, {report.shape or 'unknown shape'}")
    number(columns[1], "Read as", report.kind, f"prompt format {report.format or 'unknown'}")
    for column, title, lengths in (
        (columns[2], "Prompt tokens", report.prompt_tokens),
        (columns[3], "Answer tokens", report.completion_tokens),
    ):
        if lengths is None:
            number(column, title, "–", "not counted")
        else:
            spread = f"median; 95 % have at most {lengths.p95:,}, the longest {lengths.max:,}"
            number(column, title, f"{lengths.median:,}", spread)


def errors(report: DataReport) -> None:
    """A line a mistake."""
    unit = Kind(report.kind).unit
    rows = [
        {"line": each["line"], "field": escaped(each["field"]), "reason": escaped(each["reason"])}
        for each in report.errors
    ]
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        width="stretch",
        height=min(38 + 35 * len(rows), 280),
        column_config={
            "line": st.column_config.NumberColumn(unit.capitalize(), width=70, format="localized"),
            "field": st.column_config.TextColumn("Field", width=110),
            "reason": st.column_config.TextColumn("What is wrong", width="large"),
        },
    )
    if report.error_count > len(rows):
        st.caption(f"The first {MAX_ERRORS} of {report.error_count:,}.")
    if not report.examples:
        st.caption("A good row:")
        st.code(GOOD_ROW, language="json")


def remarks(report: DataReport) -> list[str]:
    """What is odd and does not stop training, as lines of Markdown."""
    found = []
    if report.truncated:
        found.append(f"{report.truncated:,} answers lose their end at {report.max_length:,} tokens.")
    if report.dropped:
        found.append(f"{report.dropped:,} examples are dropped: their prompts leave no room for an answer.")
    if report.duplicates:
        found.append(f"{report.duplicates:,} examples repeat an earlier prompt and answer.")
    if report.empty_answers:
        found.append(f"{report.empty_answers:,} answers are blank.")
    if report.leaked:
        found.append(f"{report.leaked:,} prompts are in the validation file, too.")
    if report.validation_errors:
        found.append(f"The validation file has {report.validation_errors:,} bad lines; check it as the training file.")
    if report.numbers:
        found.append(f"{report.numbers:,} answers are integers, learnt as their digits.")
    if report.ignored:
        listed = ", ".join(f"`{escaped(name).replace('`', '')}` ({count:,})" for name, count in report.ignored.items())
        found.append(f"Not learnt from: {listed}.")
    return found


def answers(report: DataReport) -> None:
    """The commonest ones: of labels, how they are spread."""
    if not report.answers:
        return
    st.markdown("**Most common answers**")
    st.dataframe(
        pd.DataFrame([{"answer": text, "rows": count} for text, count in report.answers]),
        hide_index=True,
        width="stretch",
        column_config={
            "answer": st.column_config.TextColumn("Answer"),
            "rows": st.column_config.NumberColumn("Examples", format="localized", width=90),
        },
    )


def masks(rows: tuple[MaskedRow, ...]) -> None:
    """Prompt tokens plain, those that the loss is taken over marked."""
    st.markdown("**What is learnt** of the first rows")
    st.html("".join(map(masked, rows)))
    st.caption("Marked tokens are learnt; the others condition the adapter and are not.")


def masked(row: MaskedRow) -> str:
    """One row as HTML; its text is a tenant's and is escaped."""
    texts = token_texts(row.tokens[:MOST_TOKENS])
    pieces = [
        f'<span style="{LEARNT if learnt else MASKED}">{escape(escaped(text))}</span>'
        for text, learnt in zip(texts, row.supervised, strict=False)
    ]
    more = f" … and {len(row.tokens) - MOST_TOKENS:,} tokens" if len(row.tokens) > MOST_TOKENS else ""
    return (
        f'<p style="margin: 0 0 0.6rem; overflow-wrap: anywhere; white-space: pre-wrap; line-height: 1.7">'
        f"<small>{escape(row.place)}</small><br>{''.join(pieces)}{more}</p>"
    )
