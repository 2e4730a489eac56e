"""Sweeps: progress, the best trial, parallel coordinates, parameter importance, the map of (m, n)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

import connection
from components import shared_url
from drawing import BLUE, GREY, INK, ORANGE, SKY, VERMILION, background_colour, number, show_chart
from pedro.training.sweep.records import TrialState
from pedro.training.sweep.report import metric
from sources import sweeps as data

if TYPE_CHECKING:
    from pedro.config import Settings

REFRESH_S = 10
SHADES = [BLUE, SKY, ORANGE]  # from the least loss to the largest, on the light and on the dark page
STEPS = [TrialState.RUNNING, TrialState.FINISHED, TrialState.STOPPED, TrialState.FAILED, TrialState.LOST]

read_all = st.cache_resource(max_entries=100, ttl=REFRESH_S, show_spinner="Reading the sweeps …")(data.read_sweeps)
read_one = st.cache_resource(max_entries=100, ttl=REFRESH_S / 2, show_spinner="Reading the trials …")(data.read_sweep)


def page() -> None:
    settings = connection.settings()
    st.title("Sweeps", anchor=False)
    sweeps, problem = read_all(settings)
    if problem:
        st.warning(f"The sweeps cannot be read.\n\n```\n{problem}\n```", icon=":material/broken_image:")
    if not sweeps:
        st.info(
            "No sweep yet. `pedro sweep jobs/configs/nano_sweep_orders.yaml --wait` runs one in minutes.",
            icon=":material/tune:",
        )
        start_one()
        return
    names = {sweep.id: f"{sweep.model} · {sweep.name} · {sweep.id}" for sweep in sweeps}
    chosen = shared_url.choose("Sweep", list(names), "sweep", titles=names, what="Sweep", placeholder="Choose a sweep")
    if chosen:
        show(settings, chosen)
    start_one()


def start_one() -> None:
    st.page_link("views/train.py", label="Start a sweep on your own file", icon=":material/model_training:")


@st.fragment(run_every=REFRESH_S)
def show(settings: Settings, sweep_id: str) -> None:
    sweep = read_one(settings, sweep_id)
    if sweep.problems:
        listed = "\n".join(sweep.problems)
        st.warning(
            f"These files cannot be read and are left out:\n\n```\n{listed}\n```", icon=":material/broken_image:"
        )
    if not sweep.trials:
        st.caption("No trial has started yet.")
        return
    heading(sweep)
    coordinates(sweep)
    left, right = st.columns(2, gap="large")
    with left:
        importance(sweep)
    with right:
        if not orders(sweep):
            losses(sweep)
    trials(sweep)


def heading(sweep: data.Sweep) -> None:
    counts = sweep.counts()
    columns = st.columns(4)
    states = ", ".join(f"{counts[state]} {state}" for state in map(str, STEPS) if state in counts)
    number(columns[0], "Trials", f"{len(sweep.trials):,}", states)
    best = sweep.best
    if best is None or best.loss is None:
        number(columns[1], "Best validation loss", "–", "no trial has finished yet")
        return
    number(columns[1], "Best validation loss", f"{best.loss:.4f}", f"trial {best.number}")
    accuracy = metric(best, data.ACCURACY)
    backbone = metric(best, "backbone_accuracy")
    beside = "" if backbone is None else f"the backbone alone {backbone:.1%}"
    number(columns[2], "Its accuracy", "–" if accuracy is None else f"{accuracy:.1%}", beside)
    size = f"{best.outcome.trainable_parameters:,}" if best.outcome else "–"
    number(columns[3], "Its parameters", size, "trained")
    st.markdown(
        "Best trial: " + " · ".join(f"`{key}` = **{data.format_value(v)}**" for key, v in best.parameters.items())
    )


def coordinates(sweep: data.Sweep) -> None:
    points, ticks = data.parallel(sweep)
    st.subheader("All trials", anchor=False)
    if not points:
        st.caption("No trial has a validation loss yet.")
        return
    axes = list(dict.fromkeys(point["axis"] for point in points))
    frame, marks = pd.DataFrame(points), pd.DataFrame(ticks)
    x = alt.X("axis:N", sort=axes, title=None, axis=alt.Axis(labelAngle=0, labelLimit=200, orient="top", grid=True))
    y = alt.Y("height:Q", axis=None, scale=alt.Scale(domain=[-0.04, 1.04]))
    tooltip = [*map(alt.Tooltip, ("trial:N", "state:N", "axis:N", "value:N")), alt.Tooltip("loss:Q", format=".4f")]
    base = alt.Chart(frame).encode(x=x, y=y, detail=alt.Detail("trial:N"), tooltip=tooltip)
    done = base.transform_filter("datum.state === 'finished'")
    others = base.transform_filter("datum.state !== 'finished'").mark_line(
        color=GREY, strokeWidth=1, strokeDash=[3, 3], opacity=0.7
    )
    lines = done.mark_line(strokeWidth=1.8, opacity=0.85, point=alt.OverlayMarkDef(size=24)).encode(
        color=alt.Color(
            "loss:Q",
            scale=alt.Scale(range=SHADES, interpolate="rgb"),
            legend=alt.Legend(title="validation loss", orient="bottom", type="gradient", gradientLength=220),
        )
    )
    best = base.transform_filter("datum.best").mark_line(color=VERMILION, strokeWidth=4)
    labels = alt.Chart(marks).encode(x=alt.X("axis:N", sort=axes), y=alt.Y("height:Q"), text=alt.Text("tick:N"))
    style: dict[str, Any] = {"align": "right", "dx": -7, "fontSize": 11}
    halo = labels.mark_text(
        **style, stroke=background_colour(), strokeWidth=4, strokeJoin="round", color=background_colour()
    )
    text = labels.mark_text(**style, color=INK)
    show_chart((others + lines + best + halo + text).properties(height=460))
    st.caption(
        "One line per trial. Finished trials are coloured by validation loss (blue is better); the best is thick and "
        "red, stopped and running ones are dashed. Failed and lost trials are left out."
    )


def importance(sweep: data.Sweep) -> None:
    st.subheader("What each parameter explains", anchor=False)
    importances = data.importances(sweep)
    known = [one for one in importances if one.share is not None]
    if not known:
        st.caption("Appears when enough trials have finished, with more than one value of a parameter among them.")
        return
    frame = pd.DataFrame({"key": one.key, "share": one.share} for one in known)
    bars = alt.Chart(frame).encode(
        y=alt.Y("key:N", sort=None, title=None, axis=alt.Axis(labelLimit=220)),
        x=alt.X("share:Q", title="share of the variance", scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%")),
        tooltip=[alt.Tooltip("key:N"), alt.Tooltip("share:Q", format=".1%")],
    )
    text = bars.mark_text(align="left", dx=4, color=INK).encode(text=alt.Text("share:Q", format=".0%"))
    show_chart((bars.mark_bar(color=BLUE) + text).properties(height=60 + 42 * len(frame)))
    unknown = [one.key for one in importances if one.share is None]
    st.caption(
        f"Of the variance of validation loss over {len(sweep.ended)} finished trials, what lies between the values of "
        "one parameter alone, less what chance would give (epsilon squared). Long lists of numbers are cut in quarters."
        + (f" Too few trials to tell: {', '.join(unknown)}." if unknown else "")
    )


def orders(sweep: data.Sweep) -> bool:
    """The map of (m, n); False where the orders did not vary."""
    rows = data.order_map(sweep)
    if not rows:
        return False
    st.subheader("Orders of the activation", anchor=False)
    base = alt.Chart(pd.DataFrame(rows)).encode(
        x=alt.X("m:O", title="m, order of the numerator", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("n:O", title="n, order of the denominator", sort="descending"),
        tooltip=[
            alt.Tooltip("m:O"),
            alt.Tooltip("n:O"),
            alt.Tooltip("loss:Q", title="validation loss", format=".4f"),
            alt.Tooltip("trials:Q"),
        ],
    )
    cells = base.mark_rect(cornerRadius=3).encode(
        color=alt.Color("loss:Q", scale=alt.Scale(range=SHADES, interpolate="rgb"), legend=None)
    )
    least, most = min(row["loss"] for row in rows), max(row["loss"] for row in rows)
    dark = least + 0.3 * (most - least)  # of the shades
    text = base.mark_text(fontSize=13).encode(
        text=alt.Text("loss:Q", format=".3f"),
        color=alt.condition(f"datum.loss < {dark}", alt.value("white"), alt.value("black")),
    )
    show_chart((cells + text).properties(height=280))
    st.caption("Validation loss, the median of the finished trials of each pair; the paper's orders are (6, 5).")
    return True


def losses(sweep: data.Sweep) -> None:
    st.subheader("Validation loss", anchor=False)
    rows = data.curve_rows(sweep)
    if not rows:
        st.caption("No validation yet.")
        return
    best = sweep.best.number if sweep.best else -1
    chart = (
        alt.Chart(pd.DataFrame(rows))
        .mark_line(strokeWidth=1.6)
        .encode(
            x=alt.X("step:Q", axis=alt.Axis(grid=False)),
            y=alt.Y("loss:Q", title=None, scale=alt.Scale(zero=False)),
            detail=alt.Detail("trial:N"),
            color=alt.condition(f"datum.trial === {best}", alt.value(VERMILION), alt.value(GREY)),
            tooltip=[
                alt.Tooltip("trial:N"),
                alt.Tooltip("state:N"),
                alt.Tooltip("step:Q"),
                alt.Tooltip("loss:Q", format=".4f"),
            ],
        )
    )
    show_chart(chart.properties(height=280))
    st.caption("One line per trial; the best is red.")


def trials(sweep: data.Sweep) -> None:
    st.subheader("Trials", anchor=False)
    frame = pd.DataFrame(data.trial_rows(sweep))
    st.dataframe(
        frame,
        hide_index=True,
        width="stretch",
        placeholder="",
        column_config={
            "trial": st.column_config.NumberColumn("Trial", width="small"),
            "state": st.column_config.TextColumn("State", width="small"),
            "validation_loss": st.column_config.NumberColumn("Validation loss", format="%.4f"),
            "accuracy": st.column_config.NumberColumn("Accuracy", format="percent"),
            "backbone_accuracy": None,
            "majority_accuracy": None,
            "loss": st.column_config.NumberColumn("Test loss", format="%.4f"),
            "trainable_parameters": st.column_config.NumberColumn("Trained parameters", format="localized"),
            "steps": st.column_config.NumberColumn("Steps", format="localized"),
            "seconds": st.column_config.NumberColumn("Seconds", format="%.0f"),
            "message": st.column_config.TextColumn("Outcome"),
            "run_id": None,
        },
    )


if __name__ == "__main__":
    page()
