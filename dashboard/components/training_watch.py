"""Follows one job or sweep through the API: phase, progress, losses, what it tells, and a chat with its result."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from components import sweep_watch
from components.job_details import SIGNS, duration
from drawing import colours, show_chart
from pedro.refs import ModelRef
from sources import sweep_space
from sources import training as data
from sources.gateway import GatewayError

if TYPE_CHECKING:
    from sources.gateway import GatewayClient

REFRESH_S = 3
EVENTS = "train_events"  # in the session: job, and what it told so far
MOST_LINES = 12
PHASES = ("checking files", "queued", "starting workers", "training", "ended")
SWEEP_PHASES = ("checking files", "queued", "running trials", "ended")


def watch(gateway: GatewayClient, job_id: str, steps: int | None) -> bool:
    """Draw the job, once; `steps` are those of its estimate, if one was made. Whether it goes on."""
    try:
        job = data.read_job(gateway, job_id)
        events = told(gateway, job_id)
    except GatewayError as error:
        st.error(error.message, icon=":material/error:")
        return error.status == 0 or error.status >= 500  # away for a moment
    sweep = sweep_space.sweep_of(job) is not None
    points = [] if sweep else data.curve_rows(events)
    trials = sweep_space.trials_told(events)
    step = max((point["step"] for point in points), default=0)
    status, over = str(job["status"]), job["status"] in data.ENDED
    name = job["fine_tuned_model"] or f"on {job['model']}"
    st.markdown(f"{SIGNS.get(status, '')} **{status}** · {name} · `{job_id}`")
    if not over and sweep:
        phases(now := sweep_watch.phase(job, len(trials)), SWEEP_PHASES)
        sweep_watch.progress(job, trials, sweep_space.planned(events), now)
    elif not over:
        progress(job, step, steps)
    if status == "failed":
        failure(job["error"] or {})
    elif job["fine_tuned_model"]:
        links(str(job["fine_tuned_model"]), job_id)
    if sweep:
        sweep_watch.link(job_id)
    left, right = st.columns([3, 2], gap="large")
    with left:
        sweep_watch.losses(trials, over=over) if sweep else losses(points, over=over)
    with right:
        st.markdown("**Events**")
        lines = [event["message"] for event in events if sweep or event["type"] == "message"]
        st.code("\n".join(lines[-MOST_LINES:]) or "Nothing yet.", language=None, wrap_lines=True)
    return not over


def told(gateway: GatewayClient, job_id: str) -> Sequence[Mapping[str, Any]]:
    """The job's events so far; only new ones are asked for."""
    of, known = st.session_state.get(EVENTS, ("", []))
    known = known if of == job_id else []
    events = [*known, *data.events_since(gateway, job_id, known)]
    st.session_state[EVENTS] = (job_id, events)
    return events


def phases(now: str, known: Sequence[str]) -> None:
    """All of them in a line, the present one in bold."""
    shown = known if now in known else (*known[:-1], now)
    st.markdown(" › ".join(f"**{name}**" if name == now else f":gray[{name}]" for name in shown))


def progress(job: Mapping[str, Any], step: int, steps: int | None) -> None:
    """Phases, the present one in bold, and how far the training is."""
    now = data.phase(job, step)
    phases(now, PHASES)
    words = f"step {step:,}" + (f" of {steps:,}" if steps else "") if step else now
    if job["estimated_finish"]:
        words += f" · about {duration(max(0.0, job['estimated_finish'] - time.time()))} of training left"
    st.progress(min(1.0, step / steps) if steps else 0.0, text=words)


def failure(error: Mapping[str, Any]) -> None:
    """Why it failed, as the API says it."""
    st.error(str(error.get("message") or "It failed."), icon=":material/error:")
    said = " · ".join(f"{name} `{error[name]}`" for name in ("param", "code") if error.get(name))
    if said:
        st.caption(said)


def links(model: str, job_id: str) -> None:
    """Where the result can be asked, and where it is kept."""
    ref = ModelRef.parse(model)
    columns = st.columns(3)
    with columns[0]:
        st.page_link(
            "views/playground.py", label=f"Chat with {model}", icon=":material/forum:", query_params={"model": model}
        )
    with columns[1]:
        st.page_link(
            "views/adapters.py",
            label="Its versions",
            icon=":material/extension:",
            query_params={"adapter": ref.name, "version": str(ref.number)},
        )
    with columns[2]:
        st.page_link(
            "views/runs.py", label="Its scores and rows", icon=":material/play_circle:", query_params={"job": job_id}
        )


def losses(points: Sequence[Mapping[str, Any]], *, over: bool) -> None:
    """Training and validation loss over the steps, on a logarithmic axis where they allow one."""
    if not points:
        st.caption("No curve was recorded." if over else "No curve yet: it appears with the first training steps.")
        return
    frame = pd.DataFrame(points)
    log = bool((frame["value"] > 0).all())
    scale = alt.Scale(type="log", nice=False, padding=8) if log else alt.Scale(zero=False)
    chart = (
        alt.Chart(frame)
        .mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=22))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("value:Q", title="loss, log" if log else "loss", scale=scale, axis=alt.Axis(format=".3~g")),
            color=colours("curve", list(data.CURVES.values())),
            tooltip=[alt.Tooltip("curve:N"), alt.Tooltip("step:Q", format=","), alt.Tooltip("value:Q", format=",.4~g")],
        )
    )
    show_chart(chart.properties(height=300))
