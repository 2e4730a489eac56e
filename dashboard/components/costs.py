"""Plots what methods cost: any two metrics against each other, with their Pareto front."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

from drawing import BLUE, GREY, INK, show_chart
from sources import pareto
from sources.pareto import METRICS

if TYPE_CHECKING:
    from sources.compare import FilteredComparison

USUAL = ("score", "parameters")  # both are measured without noise of the machine
LABELS = 0.36  # of the chart's width, kept free for the names
LABEL_PX = 17


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
    spans = pareto.score_spans(selection)
    rows = [_point(point, x, y, mark, spans) for point, mark in shown]
    line = [_point(point, x, y, True, spans) for point in pareto.front([point for point, _ in shown], x, y)]
    _draw_front(pd.DataFrame(rows), pd.DataFrame(line), x, y)
    beaten = [row["method"] for row in rows if not row["unbeaten"]]
    listed = ", ".join(titles[name] for name in chosen)
    st.caption(
        f"Filled: on the Pareto front of {listed} (no other method is at least as good on all of them and better "
        f"on one). Hollow: {', '.join(beaten) or 'none'}. The line is the front of the two axes. Costs are "
        "medians over runs."
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
    height = max(380, LABEL_PX * (len(frame) + 2))
    across_axis, up_axis = _Axis.of(frame, x, "x", LABELS), _Axis.of(frame, y, "y", 0.0)
    frame = placed(frame, across_axis, up_axis, height)
    across, up = alt.X("x:Q", **across_axis.encoding), alt.Y("y:Q", **up_axis.encoding)
    tooltip = [
        alt.Tooltip("method:N"),
        alt.Tooltip("x:Q", title=METRICS[x].title, format=METRICS[x].format),
        alt.Tooltip("y:Q", title=METRICS[y].title, format=METRICS[y].format),
        alt.Tooltip("unbeaten:N", title="on the front"),
    ]
    step: Any = "step-before" if METRICS[x].more_is_better else "step-after"  # what can be had at a price, and no worse
    front = alt.Chart(line).mark_line(color=BLUE, strokeDash=[5, 4], strokeWidth=1.5, opacity=0.8, interpolate=step)
    base = alt.Chart(frame)
    layers: list[alt.Chart] = [front.encode(x=across, y=up)]
    for at, field in ((x, "x"), (y, "y")):
        if at == "score" and frame["low"].notna().any():
            span = base.mark_rule(strokeWidth=1.3, opacity=0.55, color=INK)
            layers.append(
                span.encode(x=across, y=alt.Y("low:Q", **up_axis.encoding), y2=alt.Y2("high:Q"))
                if field == "y"
                else span.encode(x=alt.X("low:Q", **across_axis.encoding), x2=alt.X2("high:Q"), y=up)
            )
    layers.append(
        base.mark_rule(strokeWidth=0.7, opacity=0.5, color=INK).encode(
            x=across, y=up, x2=alt.X2("label_x:Q"), y2=alt.Y2("label_y:Q")
        )
    )
    layers.append(
        base.mark_point(size=110, strokeWidth=2, opacity=1).encode(
            x=across,
            y=up,
            tooltip=tooltip,
            color=alt.condition("datum.unbeaten", alt.value(BLUE), alt.value(GREY)),
            fill=alt.condition("datum.unbeaten", alt.value(BLUE), alt.value("transparent")),
            shape=alt.condition("datum.unbeaten", alt.value("circle"), alt.value("square")),
        )
    )
    layers.append(
        base.mark_text(align="left", baseline="middle", dx=4, fontSize=12, color=INK).encode(
            x=alt.X("label_x:Q", **across_axis.encoding),
            y=alt.Y("label_y:Q", **up_axis.encoding),
            text=alt.Text("method:N"),
            tooltip=tooltip,
        )
    )
    show_chart(alt.layer(*layers).properties(height=height))


class _Axis(NamedTuple):
    """An axis whose ends are known, so that places on it can be computed."""

    low: float
    high: float
    log: bool
    encoding: dict[str, Any]

    @classmethod
    def of(cls, frame: pd.DataFrame, name: str, field: str, free: float) -> _Axis:
        """Of a column's values, with a share of it kept free at its end."""
        metric = METRICS[name]
        fields = [field, *(["low", "high"] if name == "score" else [])]
        values = frame[fields].to_numpy(dtype=float).ravel()
        values = values[np.isfinite(values)]
        log = metric.log and bool((values > 0).all())
        ends = np.log10([values.min(), values.max()]) if log else np.array([values.min(), values.max()])
        span = float(ends[1] - ends[0]) or max(abs(float(ends[0])), 1.0) * 0.2
        low, used = float(ends[0]) - 0.06 * span, 1.12 * span
        high = low + used / (1 - free)
        domain = [10**low, 10**high] if log else [low, high]
        scale = alt.Scale(type="log" if log else "linear", nice=False, zero=False, domain=domain)
        axis = alt.Axis(format="~s" if log else metric.format, grid=field == "y", tickCount=6)
        return cls(low, high, log, {"title": metric.title, "scale": scale, "axis": axis})

    def share(self, value: float) -> float:
        """Where a value lies, from 0 to 1."""
        return ((math.log10(value) if self.log else value) - self.low) / (self.high - self.low)

    def value(self, share: float) -> float:
        """What lies there."""
        at = self.low + share * (self.high - self.low)
        return 10**at if self.log else at


def placed(frame: pd.DataFrame, across: _Axis, up: _Axis, height: int) -> pd.DataFrame:
    """With a place for each name, in a column beside the points: as near to its point's height as the others allow.

    No two are nearer than a line of text, whatever the width of the page.
    """
    gap = LABEL_PX / height
    wanted = sorted(((up.share(row["y"]), index) for index, row in frame.iterrows()), key=lambda pair: pair[0])
    spots: list[float] = []
    for share, _ in wanted:
        spots.append(max(share, spots[-1] + gap if spots else gap / 2))
    ceiling = 1 - gap / 2
    for at in range(len(spots) - 1, -1, -1):
        spots[at] = min(spots[at], ceiling)
        ceiling = spots[at] - gap
    places = {index: up.value(spot) for (_, index), spot in zip(wanted, spots, strict=True)}
    return frame.assign(label_x=across.value(1 - LABELS + 0.03), label_y=[places[index] for index in frame.index])


def _point(
    point: pareto.Point, x: str, y: str, unbeaten: bool, spans: Mapping[pareto.Place, tuple[float, float]]
) -> dict[str, Any]:
    unit = METRICS["score"].unit
    low, high = spans.get(pareto.place(point), (math.nan, math.nan))
    return {
        "method": point.name,
        "x": point.values[x] / METRICS[x].unit,
        "y": point.values[y] / METRICS[y].unit,
        "low": low / unit,
        "high": high / unit,
        "unbeaten": unbeaten,
    }


def _formats(names: list[str]) -> dict[str, Any]:
    whole = {METRICS[name].title: st.column_config.NumberColumn(format="localized") for name in names}
    return {**whole, METRICS["score"].title: st.column_config.NumberColumn(format="%.1f")}
