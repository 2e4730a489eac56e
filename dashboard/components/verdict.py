"""What a comparison says, first: who leads, what nothing separates; then every method with its interval, as scores or
as differences to a chosen baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from drawing import BLUE, GREY, INK, ORANGE, show_chart
from pedro.comparison.result_model import JUDGE
from pedro.comparison.verdict import against, by_information, task_titles, verdicts
from sources import compare as data

if TYPE_CHECKING:
    from pedro.comparison.result_model import Table
    from sources.compare import FilteredComparison

MOST_SENTENCES = 4  # that stand without being asked for
PANELS = 3  # beside each other
SCORES, DIFFERENCES = "Scores", "Differences"
ROW_PX = 24


def verdict(selection: FilteredComparison) -> Table:
    """The sentences and the plot of one table, which is returned."""
    tables = {data.table_name(table): table for table in selection.tables}
    if len(tables) > 1:
        name = st.selectbox("Backbone and budget", list(tables), key="table", bind="query-params")
        table = tables[name or next(iter(tables))]
    else:
        table = selection.tables[0]
    titles = task_titles(table, selection.titles)
    sentences(table, titles)
    plot(table, titles)
    return table


def sentences(table: Table, titles: Mapping[str, str]) -> None:
    said = verdicts(table)
    lines = [data.literal(each.sentence(titles[each.task])) for each in said]
    if not lines:
        return
    st.markdown(f"#### {lines[0]}")
    st.markdown("\n".join(f"- {line}" for line in lines[1:MOST_SENTENCES]))
    if len(lines) > MOST_SENTENCES:
        with st.expander(f"The other {len(lines) - MOST_SENTENCES} tasks", icon=":material/list:"):
            st.markdown("\n".join(f"- {line}" for line in lines[MOST_SENTENCES:]))
    pairs = max(each.comparisons for each in said)
    if pairs:
        st.caption(
            "In points, with 95 % intervals of the differences on the same test rows. Two methods are separated only "
            "if that interval excludes zero and p < 0.05 after Holm's correction"
            + (f" for the {pairs:,} pairs of a task." if pairs > 1 else ".")
        )


def plot(table: Table, titles: Mapping[str, str]) -> None:
    """A panel for each task, the most informative first."""
    left, middle = st.columns([1, 2], vertical_alignment="bottom")
    shown = left.segmented_control(
        "Show", [SCORES, DIFFERENCES], default=SCORES, required=True, key="show", bind="query-params"
    )
    if shown == DIFFERENCES and len(table.rows) > 1:
        start = table.rows.index(table.baseline) if table.baseline in table.rows else 0
        baseline = middle.selectbox("Baseline", table.rows, index=start, key="baseline", bind="query-params")
        rows = difference_rows(table, baseline or table.rows[start])
        note = (
            f"Minus {data.literal(baseline or '')}, in points, with 95 % intervals. Filled: separated from it, after "
            f"Holm's correction for the {len(rows):,} differences shown."
        )
    else:
        rows = score_rows(table)
        note = (
            "Medians over seeds with 95 % intervals; small bars are single seeds. Filled blue: highest. Hollow: no "
            "better than chance, the dashed line where it is near."
        )
    tasks = [task for task in by_information(table) if any(row["task"] == task for row in rows)]
    if not tasks:
        st.caption("No method has an interval here.")
        return
    for start in range(0, len(tasks), PANELS):
        for column, task in zip(st.columns(PANELS, gap="small"), tasks[start : start + PANELS], strict=False):
            mine = [row for row in rows if row["task"] == task]
            with column:
                st.markdown(f"**{data.literal(titles[task])}**")
                show_chart(panel(mine, list(table.rows), zero=shown == DIFFERENCES))
    st.caption(note)


def score_rows(table: Table) -> list[dict[str, Any]]:
    """A row a method and task: the value, its interval, what single seeds gave; in points, or a judge's marks."""
    rows = []
    for (label, task), entry in table.entries.items():
        if entry.value is None:
            continue
        scale = 1.0 if entry.metric == JUDGE else 100.0
        rows.append(
            {
                "task": task,
                "method": label,
                "value": scale * entry.value,
                "low": None if entry.low is None else scale * entry.low,
                "high": None if entry.high is None else scale * entry.high,
                "look": "hollow" if entry.at_chance else "best" if entry.mark == "best" else "plain",
                "seeds": [scale * value for _, value in entry.values] if len(entry.values) > 1 else [],
                "chance": None if entry.majority is None else scale * entry.majority,
                "note": f"{entry.seeds} seeds" if entry.seeds != 1 else "one seed",
            }
        )
    return rows


def difference_rows(table: Table, baseline: str) -> list[dict[str, Any]]:
    """A row a method and task: its difference to the baseline, and whether that separates them."""
    rows = []
    for each in against(table, baseline):
        scale = 1.0 if table.entries[each.label, each.task].metric == JUDGE else 100.0
        gain = each.difference
        rows.append(
            {
                "task": each.task,
                "method": each.label,
                "value": scale * gain.value,
                "low": scale * gain.low,
                "high": scale * gain.high,
                "look": "plain" if not each.separates else "best" if gain.value > 0 else "worse",
                "seeds": [],
                "chance": None,
                "note": f"p = {each.p:.3f} after the correction"
                if each.p >= 0.001
                else "p < 0.001 after the correction",
            }
        )
    return rows


def panel(rows: list[dict[str, Any]], order: list[str], *, zero: bool) -> Any:
    """Dots with their intervals, a line a method."""
    frame = pd.DataFrame([{key: row[key] for key in row if key != "seeds"} for row in rows])
    methods = [name for name in order if name in set(frame["method"])]
    colours = {"best": BLUE, "plain": GREY if zero else INK, "hollow": INK, "worse": ORANGE}
    y = alt.Y("method:N", sort=methods, title=None, axis=alt.Axis(labelLimit=150, grid=True))
    looks = alt.Scale(domain=list(colours), range=list(colours.values()))
    colour = alt.Color("look:N", scale=looks, legend=None)
    fill = alt.Fill(
        "look:N",
        legend=None,
        scale=alt.Scale(
            domain=list(colours),
            range=[BLUE, "transparent" if zero else INK, "transparent", ORANGE],
        ),
    )
    tooltip = [
        alt.Tooltip("method:N"),
        *(alt.Tooltip(f"{name}:Q", format="+.2f" if zero else ".2f") for name in ("value", "low", "high")),
        alt.Tooltip("note:N", title=" "),
    ]
    x = alt.X("value:Q", title="points" if zero else None, scale=alt.Scale(zero=False, padding=12))
    base = alt.Chart(frame).encode(y=y, tooltip=tooltip)
    layers = [
        base.mark_rule(strokeWidth=2).encode(x=alt.X("low:Q", title=None), x2=alt.X2("high:Q"), color=colour),
        base.mark_point(size=75, strokeWidth=2, opacity=1).encode(x=x, color=colour, fill=fill),
    ]
    ticks = pd.DataFrame([{"method": row["method"], "value": value} for row in rows for value in row["seeds"]])
    if len(ticks):
        layers.insert(0, alt.Chart(ticks).mark_tick(thickness=1.5, size=11, color=GREY).encode(x=alt.X("value:Q"), y=y))
    lines = [0.0] if zero else near_chance(rows)
    if lines:
        at = pd.DataFrame({"at": lines})
        layers.insert(0, alt.Chart(at).mark_rule(color=INK, strokeDash=[4, 4]).encode(x=alt.X("at:Q")))
    return alt.layer(*layers).properties(height=40 + ROW_PX * len(methods))


def near_chance(rows: list[dict[str, Any]]) -> list[float]:
    """Where chance lies, unless that is so far below that the axis would be spent on the way to it."""
    lows = [row["value"] if row["low"] is None else row["low"] for row in rows]
    highs = [row["value"] if row["high"] is None else row["high"] for row in rows]
    chances = [row["chance"] for row in rows if row["chance"] is not None]
    least = min(lows) - (max(highs) - min(lows))
    return [max(chances)] if chances and max(chances) >= least else []
