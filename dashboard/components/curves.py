"""Learning curves of a comparison: smoothed, on a log axis, with a legend that picks out methods."""

from __future__ import annotations

from typing import TYPE_CHECKING

import altair as alt
import streamlit as st

from drawing import colours, dashes, show_chart

if TYPE_CHECKING:
    import pandas as pd


def draw(frame: pd.DataFrame, methods: list[str], *, log: bool, smoothing: float) -> None:
    """`frame` has method, step, value, low and high. A click on the legend picks a method out, with shift several."""
    picked = alt.selection_point(fields=["method"], bind="legend")
    frame = frame.sort_values(["method", "step"])
    smooth = frame.assign(value=smoothed(frame, smoothing))
    base = alt.Chart(smooth).encode(
        x=alt.X("step:Q", axis=alt.Axis(tickMinStep=1, grid=False)),
        color=colours("method", methods),
    )
    positive = log and bool((frame[["value", "low"]] > 0).all(axis=None))
    scale = alt.Scale(type="log", nice=False, padding=8) if positive else alt.Scale(zero=False)
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(format=".3~g", tickCount=6))
    strong = alt.condition(picked, alt.value(1.0), alt.value(0.08))
    lines = base.mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=22)).encode(
        y=y,
        opacity=strong,
        strokeDash=dashes("method", methods),
        tooltip=[
            alt.Tooltip("method:N"),
            alt.Tooltip("step:Q"),
            *(alt.Tooltip(f"{name}:Q", format=".4f") for name in ("value", "low", "high")),
        ],
    )
    bands = base.mark_area().encode(
        y=alt.Y("low:Q", scale=scale),
        y2=alt.Y2("high:Q"),
        opacity=alt.condition(picked, alt.value(0.12), alt.value(0.02)),
    )
    show_chart((bands + lines.add_params(picked)).properties(height=340))
    if log and not positive:
        st.caption("Not on a log axis: a value is zero or less.")


def smoothed(frame: pd.DataFrame, smoothing: float) -> pd.Series:
    """Each method's exponential moving average, without a bias at its beginning; 0 leaves it as it is."""
    if not smoothing:
        return frame["value"]
    return frame.groupby("method", sort=False)["value"].transform(
        lambda values: values.ewm(alpha=1 - smoothing, adjust=True).mean()
    )
