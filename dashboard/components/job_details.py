"""One job: how far it is, its curves, the end of its log, what became of it, and where to go from there."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import altair as alt
import pandas as pd
import streamlit as st

from components.curves import smoothed
from drawing import DASHES, SERIES, show_chart
from pedro.refs import ModelRef
from sources import jobs as data
from sources import mlflow_runs
from sources.view import tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry.queries import TrackedRun
    from pedro.training.progress import Progress

REFRESH_S = 3
SIGNS = {
    "running": ":blue[:material/sync:]",
    "validating_files": ":gray[:material/rule:]",
    "queued": ":gray[:material/schedule:]",
    "paused": ":gray[:material/pause_circle:]",
    "succeeded": ":green[:material/check_circle:]",
    "failed": ":red[:material/error:]",
    "cancelled": ":gray[:material/block:]",
    "lost": ":orange[:material/link_off:]",
}
PHASES = ("validating", "queued", "starting workers", "training", "scoring", "registering")

read_runs = st.cache_resource(max_entries=100, ttl=REFRESH_S / 2, show_spinner=False)(data.job_runs)
read_curves = st.cache_data(ttl=REFRESH_S / 2, show_spinner=False)(data.curve_rows)
read_told = st.cache_data(ttl=REFRESH_S / 2, show_spinner=False)(data.told)
read_log = st.cache_data(ttl=REFRESH_S / 2, show_spinner=False)(data.log_tail)


def details(settings: Settings, job: data.Job, where: str) -> None:
    """`where` tells the widgets of one place on the page from those of another."""
    st.markdown(f"{SIGNS.get(job.status, '')} **{job.status}** · created {minute_utc(job.created)} UTC · `{job.id}`")
    lines, problem = read_log(settings, job.id)
    if job.live and not job.sweep:
        progress_bar(data.progress_of(job, lines))
    if job.message:
        st.caption(job.message)
    left, right = st.columns([3, 2], gap="large")
    with left:
        drawn, unread = read_runs(settings, job)
        nothing = "No curve yet: it appears with the first training steps." if job.live else "No curve was recorded."
        curves(settings, data.curve_names(drawn), unread or nothing, where)
    with right:
        st.markdown("**Log**")
        if tenant_seen(settings) is not None:  # what stands in the log of a cluster is for its operators
            st.code(
                "\n".join(reversed(read_told(settings, job))) or "Nothing yet.",
                language=None,
                wrap_lines=True,
                height=300,
            )
        elif lines:
            st.code("\n".join(reversed(lines)), language=None, wrap_lines=True, height=300)
            st.caption(f"Newest lines first. `pedro jobs logs {job.id}` shows all.")
        else:
            st.caption(problem or "Nothing written yet.")
    links(job, drawn)


def progress_bar(progress: Progress) -> None:
    """Phases, the present one in bold, and the share of the training that is done."""
    now = str(progress.phase)
    st.markdown(" › ".join(f"**{name}**" if name == now else f":gray[{name}]" for name in PHASES))
    words = f"step {progress.step:,} of {progress.steps:,}" if progress.steps else now
    if progress.left_s is not None:
        words += f" · about {duration(progress.left_s)} of training left"
    st.progress(progress.share, text=words)


def duration(seconds: float) -> str:
    """As people say it."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def links(job: data.Job, drawn: Sequence[TrackedRun]) -> None:
    """The version that it became, a chat with that, the adapter's runs beside each other; and the run by its id."""
    ref = str(data.result_of(job).get("model", ""))
    columns = st.columns([2, 2, 2], vertical_alignment="center")
    with columns[0]:
        number = ModelRef.parse(ref).version if ref else None
        query = {"adapter": job.model, **({"version": str(number)} if number else {})}
        st.page_link("views/adapters.py", label=ref or job.model, icon=":material/extension:", query_params=query)
    with columns[1]:
        if ref:
            st.page_link(
                "views/playground.py", label="Chat with it", icon=":material/forum:", query_params={"model": ref}
            )
    if job.sweep:
        with columns[2]:
            st.page_link(
                "views/sweeps.py",
                label="Trials of this sweep",
                icon=":material/tune:",
                query_params={"sweep": job.sweep},
            )
    elif drawn:
        with columns[2]:
            runs_link(job.model)
        st.caption(f"Run in MLflow: `{drawn[0].id}` in experiment `{drawn[0].model}`")


def runs_link(model: str) -> None:
    """To all runs of an adapter, as a comparison."""
    query = {"comparison": mlflow_runs.NAME, "models": model}
    st.page_link("views/compare.py", label="Compare its runs", icon=":material/compare_arrows:", query_params=query)


def curves(settings: Settings, names: dict[str, str], nothing: str, where: str) -> None:
    """The curves of runs by their ids and names, one plot at a time."""
    plots = list(data.PLOTS)
    plot = st.segmented_control("Curves", plots, default=plots[0], required=True, key=f"plot_{where}") or plots[0]
    smoothing = st.slider("Smoothing", 0.0, 0.95, 0.0, 0.05, key=f"smoothing_{where}")
    frame = pd.DataFrame(read_curves(settings, names, plot), columns=["run", "curve", "step", "value"])
    if frame.empty:
        st.caption(nothing if plot == plots[0] or not names else "Nothing was logged for this.")
        return
    runs = list(dict.fromkeys(frame["run"]))
    colour, dash = ("run", "curve") if len(runs) > 1 else ("curve", "run")
    legend = alt.Legend(title=None, orient="top", columns=2, labelLimit=240)
    loss = plot == plots[0]
    log = loss and bool((frame["value"] > 0).all())
    scale = alt.Scale(type="log", nice=False, padding=8) if log else alt.Scale(zero=False)
    lines = frame.assign(method=frame["run"] + frame["curve"]).sort_values(["method", "step"], kind="stable")
    lines = lines.assign(shown=smoothed(lines, smoothing))
    chart = (
        alt.Chart(lines)
        .mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=22))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, grid=False)),
            y=alt.Y("shown:Q", title="loss, log" if log else plot, scale=scale, axis=alt.Axis(format=".3~g")),
            color=alt.Color(f"{colour}:N", scale=alt.Scale(range=SERIES), legend=legend, sort=None),
            strokeDash=alt.StrokeDash(
                f"{dash}:N", scale=alt.Scale(range=DASHES), legend=legend if len(runs) > 1 else None, sort=None
            ),
            tooltip=[
                alt.Tooltip("run:N"),
                alt.Tooltip("curve:N"),
                alt.Tooltip("step:Q", format=","),
                alt.Tooltip("value:Q", format=",.4~g"),
            ],
        )
    )
    show_chart(chart.properties(height=300))
    best = frame[frame["curve"] == data.CURVES["dev/loss"]]
    if not best.empty:
        least = min(best.to_dict("records"), key=lambda row: row["value"])
        st.caption(f"Best validation loss {least['value']:.4f} at step {least['step']:,} ({least['run']}).")


def minute_utc(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M")
