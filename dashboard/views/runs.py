"""Runs: running jobs with live curves and logs, a paged table of all jobs, cancellation."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from math import ceil
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

from drawing import DASHES, SERIES
from pedro.config import Settings
from pedro.store import JobStatus
from sources import jobs as data

if TYPE_CHECKING:
    from pedro.registry.queries import TrackedRun

REFRESH_S = 3
PAGE = 25
SIGNS = {
    "running": ":blue[:material/sync:]",
    "queued": ":gray[:material/schedule:]",
    "paused": ":gray[:material/pause_circle:]",
    "succeeded": ":green[:material/check_circle:]",
    "failed": ":red[:material/error:]",
    "cancelled": ":gray[:material/block:]",
    "lost": ":orange[:material/link_off:]",
}
COLUMNS: dict[str, Any] = {
    "status": st.column_config.TextColumn("Status", width="small"),
    "model": st.column_config.TextColumn("Adapter"),
    "kind": st.column_config.TextColumn("Kind"),
    "created": st.column_config.DatetimeColumn("Created (UTC)", format="YYYY-MM-DD HH:mm"),
    "minutes": st.column_config.NumberColumn("Minutes", format="%.1f", width="small"),
    "version": st.column_config.TextColumn("Became", width=105),
    "accuracy": st.column_config.NumberColumn("Accuracy", format="percent", width="small"),
    "message": st.column_config.TextColumn("Why", width="large"),
    "job": st.column_config.TextColumn("Job"),
}

read_live = st.cache_resource(max_entries=100, ttl=REFRESH_S / 2, show_spinner=False)(data.live_jobs)
read_past = st.cache_resource(max_entries=100, ttl=REFRESH_S, show_spinner="Reading the jobs …")(data.past_jobs)
read_runs = st.cache_resource(max_entries=100, ttl=REFRESH_S / 2, show_spinner=False)(data.job_runs)
read_curves = st.cache_data(ttl=REFRESH_S / 2, show_spinner=False)(data.curve_rows)
read_log = st.cache_data(ttl=REFRESH_S / 2, show_spinner=False)(data.log_tail)


def page() -> None:
    settings = Settings.from_env()
    st.title("Runs", anchor=False)
    under_way(settings)
    past(settings)


@st.fragment(run_every=REFRESH_S)
def under_way(settings: Settings) -> None:
    """The live part, redrawn every few seconds."""
    seen = read_live(settings)
    st.subheader("Under way", anchor=False)
    complain(seen)
    if seen.cluster.problem and not seen.cluster.gone:
        st.caption(f":orange[:material/warning:] {seen.cluster.problem}")
    if not seen.jobs:
        st.caption("Nothing is running or queued. `pedro submit SPEC.yaml` starts a job, `pedro sweep SPEC.yaml` many.")
        return
    by_id = {job.id: job for job in seen.jobs}
    chosen = st.selectbox(
        "Job", list(by_id), format_func=lambda job_id: title(by_id[job_id]), key="live", persist_state="session"
    )
    job = by_id[chosen] if chosen in by_id else seen.jobs[0]
    details(settings, job)
    ending(settings, job)


def title(job: data.Job) -> str:
    return f"{job.model} · {job.kind} · {job.status} · {minute_utc(job.created)} · {job.id}"


def complain(seen: data.Jobs) -> None:
    if seen.problem:
        st.warning(
            f"The platform's records cannot be read.\n\n```\n{seen.problem}\n```", icon=":material/database_off:"
        )


def details(settings: Settings, job: data.Job) -> None:
    """How it stands, its curves, the end of its log."""
    st.markdown(f"{SIGNS.get(job.status, '')} **{job.status}** · begun {minute_utc(job.created)} UTC · `{job.id}`")
    if job.message:
        st.caption(job.message)
    left, right = st.columns([3, 2], gap="large")
    with left:
        drawn, problem = read_runs(settings, job)
        nothing = "No curve yet: it appears with the first training steps." if job.live else "It left no curve."
        curves(settings, drawn, problem or nothing)
    with right:
        lines, problem = read_log(settings, job.id)
        st.markdown("**Log**")
        if lines:
            st.code("\n".join(reversed(lines)), language=None, wrap_lines=True, height=300)
            st.caption(f"The newest lines, the last first. `pedro jobs logs {job.id}` shows all.")
        else:
            st.caption(problem or "Nothing written yet.")


def curves(settings: Settings, drawn: Sequence[TrackedRun], nothing: str) -> None:
    st.markdown("**Curves**")
    frame = pd.DataFrame(read_curves(settings, drawn), columns=["run", "curve", "step", "value"])
    if frame.empty:
        st.caption(nothing)
        return
    runs = list(dict.fromkeys(frame["run"]))
    colour, dash = ("run", "curve") if len(runs) > 1 else ("curve", "run")
    legend = alt.Legend(title=None, orient="top", columns=4)
    chart = (
        alt.Chart(frame)
        .mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=22))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("value:Q", title="loss", scale=alt.Scale(zero=False)),
            color=alt.Color(f"{colour}:N", scale=alt.Scale(range=SERIES), legend=legend, sort=None),
            strokeDash=alt.StrokeDash(
                f"{dash}:N", scale=alt.Scale(range=DASHES), legend=legend if len(runs) > 1 else None, sort=None
            ),
            tooltip=["run:N", "curve:N", alt.Tooltip("step:Q", format=","), alt.Tooltip("value:Q", format=",.4~g")],
        )
    )
    st.altair_chart(chart.properties(height=300), width="stretch")
    best = frame[frame["curve"] == data.CURVES["dev/loss"]]
    if not best.empty:
        least = min(best.to_dict("records"), key=lambda row: row["value"])
        st.caption(f"Best validation loss {least['value']:.4f} at step {least['step']:,} ({least['run']}).")


def ending(settings: Settings, job: data.Job) -> None:
    """Two steps, so that nobody cancels a job by accident; the question survives redraws."""
    if not job.live:
        return
    if st.session_state.get("ending") != job.id:
        st.button("End this job …", icon=":material/stop_circle:", on_click=_ask, args=(job.id,))
        return
    st.warning(f"End {job.model} (`{job.id}`)? Its checkpoints stay, nothing is registered.", icon=":material/help:")
    yes, no, _ = st.columns([1, 1, 4])
    yes.button("End it", type="primary", width="stretch", on_click=_end, args=(settings, job.id))
    no.button("Keep it", width="stretch", on_click=_ask, args=(None,))


def _ask(job_id: str | None) -> None:
    st.session_state["ending"] = job_id


def _end(settings: Settings, job_id: str) -> None:
    problem = data.cancel(settings, job_id)
    st.session_state["ending"] = None
    read_live.clear()
    read_past.clear()
    st.toast(problem or f"{job_id} is ended", icon=":material/error:" if problem else ":material/check:")


def past(settings: Settings) -> None:
    st.subheader("All jobs", anchor=False)
    left, right, _ = st.columns([2, 1, 3], vertical_alignment="bottom")
    everything = "all"
    status = left.selectbox("Status", [everything, *map(str, JobStatus)], key="status", bind="query-params")
    wanted = None if status in (None, everything) else status
    number = int(right.number_input("Page", 1, key="page", bind="query-params"))
    seen = read_past(settings, wanted, PAGE, (number - 1) * PAGE)
    complain(seen)
    counts = seen.counts or {}
    total = counts.get(wanted, 0) if wanted else sum(counts.values())
    if not total:
        st.caption("No such job." if wanted else "No job yet. `pedro submit SPEC.yaml` starts one.")
        return
    if not seen.jobs:
        st.caption(f"There are {ceil(total / PAGE):,} pages.")
        return
    recorded = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items(), key=lambda pair: -pair[1]))
    first, last = (number - 1) * PAGE + 1, min(number * PAGE, total)
    st.caption(f"{first:,} to {last:,} of {total:,}, newest first. Recorded: {recorded}.")
    frame = pd.DataFrame(data.job_rows(seen.jobs), columns=list(COLUMNS))
    frame["created"] = pd.to_datetime(frame["created"], unit="ms")
    st.dataframe(frame, hide_index=True, width="stretch", column_config=COLUMNS, placeholder="")
    by_id = {job.id: job for job in seen.jobs}
    chosen = st.selectbox(
        "Look at", list(by_id), index=None, format_func=lambda job_id: title(by_id[job_id]), placeholder="Choose a job"
    )
    if chosen:
        one(settings, by_id[chosen])


def one(settings: Settings, job: data.Job) -> None:
    """A job of the table: what came of it."""
    with st.container(border=True):
        details(settings, job)
        result = data.result_of(job)
        if result:
            metrics = {
                name: value for name, value in result.get("metrics", {}).items() if isinstance(value, int | float)
            }
            st.caption(" · ".join(f"{name} {value:,.4g}" for name, value in metrics.items()))
        if job.record and job.record.spec:
            with st.expander("Specification"):
                st.json(job.record.spec)


def minute_utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")


if __name__ == "__main__":
    page()
