"""Follows a sweep's job through the API: how many trials have ended, what each scored, and the way to all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

from drawing import BLUE, GREY, VERMILION, show_chart
from sources import sweep_space as data
from sources import training

HEIGHT = 300


def progress(job: Mapping[str, Any], trials: Sequence[Mapping[str, Any]], total: int | None, phase: str) -> None:
    """How many of its trials have ended."""
    ended = len(trials)
    known = total or (data.sweep_of(job) or {}).get("search", {}).get("trials")
    words = f"{ended} of {known} trials have ended" if known else f"{ended} trials have ended"
    st.progress(min(1.0, ended / known) if known else 0.0, text=words if job["status"] == "running" else phase)


def link(job_id: str) -> None:
    st.page_link(
        "views/sweeps.py",
        label="All trials, and what each parameter explains",
        icon=":material/tune:",
        query_params={"sweep": job_id},
    )


def losses(trials: Sequence[Mapping[str, Any]], *, over: bool) -> None:
    """A point a trial; the best is red, those that were stopped are grey."""
    scored = [trial for trial in trials if trial["loss"] is not None]
    if not scored:
        st.caption("No trial has a loss." if over else "No trial has ended yet.")
        return
    finished = [trial for trial in scored if trial["state"] == "finished"]
    best = min(finished, key=lambda trial: trial["loss"])["trial"] if finished else None
    kinds = {"best": VERMILION, "finished": BLUE, "stopped early": GREY}
    frame = pd.DataFrame(
        {
            **trial,
            "how": "best"
            if trial["trial"] == best
            else "finished"
            if trial["state"] == "finished"
            else "stopped early",
        }
        for trial in scored
    )
    keys = [name for name in frame.columns if name not in ("trial", "state", "loss", "step", "how")]
    chart = (
        alt.Chart(frame.rename(columns={key: key.replace(".", "_") for key in keys}))
        .mark_point(size=90, filled=True, opacity=0.9)
        .encode(
            x=alt.X("trial:O", title="trial", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("loss:Q", title="validation loss", scale=alt.Scale(zero=False, padding=14)),
            color=alt.Color(
                "how:N",
                sort=list(kinds),
                scale=alt.Scale(domain=list(kinds), range=list(kinds.values())),
                legend=alt.Legend(title=None, orient="top"),
            ),
            shape=alt.Shape("how:N", sort=list(kinds), scale=alt.Scale(domain=list(kinds)), legend=None),
            tooltip=[
                alt.Tooltip("trial:O"),
                alt.Tooltip("how:N"),
                alt.Tooltip("loss:Q", format=".4f"),
                *(alt.Tooltip(f"{key.replace('.', '_')}:N", title=key) for key in keys),
            ],
        )
    )
    show_chart(chart.properties(height=HEIGHT))


def show_estimate(found: Mapping[str, Any], said: str) -> None:
    """What the trials take one after the other, at most."""
    sweep = found["sweep"]
    st.caption(
        f"One trial with the settings above; {sweep['trials']} of them take {said} one after the other, less where "
        "several run at once or weak ones are stopped."
    )


def phase(job: Mapping[str, Any], ended: int) -> str:
    """What a sweep does now."""
    return "running trials" if job["status"] == "running" else training.phase(job, ended)
