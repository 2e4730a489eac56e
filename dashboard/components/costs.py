"""Plots what methods cost: any two metrics against each other, with their Pareto front."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from drawing import BLUE, GREY, INK
from sources import pareto
from sources.pareto import METRICS

if TYPE_CHECKING:
    from sources.compare import FilteredComparison

USUAL = ("score", "parameters", "seconds")


def costs(selection: FilteredComparison) -> None:
    st.subheader("What it costs", anchor=False)
    points = pareto.points_of(selection)
    measured = [name for name in METRICS if any(name in point.values for point in points)]
    if len(measured) < 2 or len(points) < 2:
        st.caption("Appears when two methods have finished runs.")
        return
    titles = {name: METRICS[name].title for name in measured}
    usual = [name for name in USUAL if name in measured]
    left, middle, right = st.columns([1, 1, 2])
    x = left.selectbox(
        "Across",
        measured,
        index=min(1, len(measured) - 1),
        format_func=titles.__getitem__,
        key="x",
        bind="query-params",
    )
    y = middle.selectbox("Up", measured, format_func=titles.__getitem__, key="y", bind="query-params")
    over = right.multiselect(
        "Unbeaten over", measured, default=usual, format_func=titles.__getitem__, key="over", bind="query-params"
    )
    x, y = x or measured[0], y or measured[0]
    chosen = over or [x, y]
    good = pareto.undominated(points, chosen)
    shown = [(point, mark) for point, mark in zip(points, good, strict=True) if x in point.values and y in point.values]
    if not shown:
        st.caption("No method has both.")
        return
    rows = [_point(point, x, y, mark) for point, mark in shown]
    line = [_point(point, x, y, True) for point in pareto.front([point for point, _ in shown], x, y)]
    _draw_front(pd.DataFrame(rows), pd.DataFrame(line), x, y)
    beaten = [row["method"] for row in rows if not row["unbeaten"]]
    listed = ", ".join(titles[name] for name in chosen)
    st.caption(
        f"Filled: no other method is at least as good in all of {listed}, and better in one. Beaten in that sense: "
        f"{', '.join(beaten) or 'none'}. The line is the front of the two that are drawn. Costs are medians over runs."
    )
    with st.expander("As numbers", icon=":material/table:"):
        frame = pd.DataFrame(
            {
                "method": point.name,
                "unbeaten": mark,
                **{titles[name]: point.values.get(name, float("nan")) / METRICS[name].unit for name in measured},
            }
            for point, mark in zip(points, good, strict=True)
        )
        st.dataframe(frame, hide_index=True, width="stretch", column_config=_formats(measured))


def _draw_front(frame: pd.DataFrame, line: pd.DataFrame, x: str, y: str) -> None:
    axes = {name: _axis(name, field) for name, field in ((x, "x"), (y, "y"))}
    tooltip = [
        alt.Tooltip("method:N"),
        alt.Tooltip("x:Q", title=METRICS[x].title, format=METRICS[x].format),
        alt.Tooltip("y:Q", title=METRICS[y].title, format=METRICS[y].format),
        alt.Tooltip("unbeaten:N"),
    ]
    across = alt.X("x:Q", **axes[x])
    up = alt.Y("y:Q", **_axis(y, "y"))
    drawn = (
        alt.Chart(line).mark_line(color=BLUE, strokeDash=[5, 4], strokeWidth=1.5, opacity=0.8).encode(x=across, y=up)
    )
    base = alt.Chart(frame).encode(x=across, y=up, tooltip=tooltip)
    dots = base.mark_point(size=110, strokeWidth=2, opacity=1).encode(
        color=alt.condition("datum.unbeaten", alt.value(BLUE), alt.value(GREY)),
        fill=alt.condition("datum.unbeaten", alt.value(BLUE), alt.value("transparent")),
        shape=alt.condition("datum.unbeaten", alt.value("circle"), alt.value("square")),
    )
    rises = METRICS[x].more_is_better != METRICS[y].more_is_better  # the front; names stand on its free side
    names = base.mark_text(align="left", dx=8, dy=12 if rises else -9, fontSize=12, color=INK).encode(text="method:N")
    st.altair_chart((drawn + dots + names).properties(height=380), width="stretch")


def _point(point: pareto.Point, x: str, y: str, unbeaten: bool) -> dict[str, Any]:
    return {
        "method": point.name,
        "x": point.values[x] / METRICS[x].unit,
        "y": point.values[y] / METRICS[y].unit,
        "unbeaten": unbeaten,
    }


def _axis(name: str, field: str) -> dict[str, Any]:
    metric = METRICS[name]
    scale = alt.Scale(type="log", nice=False, padding=30) if metric.log else alt.Scale(zero=False, padding=20)
    axis = alt.Axis(format="~s" if metric.log else metric.format, grid=field == "y", tickCount=6)
    return {"title": metric.title, "scale": scale, "axis": axis}


def _formats(names: list[str]) -> dict[str, Any]:
    whole = {METRICS[name].title: st.column_config.NumberColumn(format="localized") for name in names}
    return {**whole, METRICS["score"].title: st.column_config.NumberColumn(format="%.1f")}
