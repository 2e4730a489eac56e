"""Serving: requests, tokens, latencies and resident adapters live, with promotions marked on the time line.

The figures are the gateway's /metrics, read every few seconds while a page is open and kept for all sessions.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from typing import Any

import altair as alt
import pandas as pd
import streamlit as st

import connection
from drawing import BLUE, DASHES, GREEN, GREY, ORANGE, PINK, SERIES, SKY, VERMILION, number
from pedro.config import Settings
from sources import serving as data
from sources.gateway import MAKE_KEY, GatewayClient

WINDOWS = {"5 minutes": 300.0, "15 minutes": 900.0, "1 hour": 3600.0}
MOST_LINES = 6
LATELY_S = 30.0
PERCENTILES = {"p50": BLUE, "p95": ORANGE, "p99": PINK}
EVENTS = {"Swap": VERMILION, "Eviction": SKY, "429": GREY, "Failed load": PINK}
HEIGHT = 230
CHOSEN = "serving_adapters"
MS = "%.1f ms"


def page() -> None:
    gateway, _ = connection.sidebar()
    st.title("Serving", anchor=False)
    span, which, live = st.columns([5, 5, 2], vertical_alignment="bottom")
    seconds = WINDOWS[span.segmented_control("Time", list(WINDOWS), default="15 minutes") or "15 minutes"]
    history = history_of(gateway.url, hashlib.sha256(gateway.key.encode()).hexdigest())
    known = {*data.adapters_of(history.window(time.time(), seconds)[0]), *st.session_state.get(CHOSEN, ())}
    names = which.multiselect("Adapters", sorted(known), key=CHOSEN, persist_state="session", placeholder="the busiest")
    running = live.toggle("Live", True, help=f"Read every {data.INTERVAL_S:g} s while this page is open.")
    st.fragment(show, run_every=data.INTERVAL_S if running else None)(gateway, history, seconds, names)


@st.cache_resource(max_entries=8, show_spinner=False)
def history_of(url: str, key_digest: str) -> data.History:  # noqa: ARG001 - part of the key
    """One a gateway and key, for all sessions: what a key opened is shown only to those who hold it."""
    return data.History()


def show(gateway: GatewayClient, history: data.History, seconds: float, names: list[str]) -> None:
    """Everything that changes by itself: read, then draw."""
    now = time.time()
    problem = ""
    if history.due(now):
        problem = data.scrape_into(history, gateway, now)
        data.follow_registry(history, Settings.from_env(), now)
        st.session_state["serving_problem"] = problem
    problem = problem or st.session_state.get("serving_problem", "")
    if problem:
        st.info(
            f"{problem}. `pedro serve` starts a gateway, and it shows its figures to an admin key (`{MAKE_KEY}`).",
            icon=":material/cloud_off:",
        )
    intervals, swaps = history.window(now, seconds)
    figures(history, intervals)
    if not intervals:
        if not problem:
            st.caption(f"The first figures come with the second reading, in {data.INTERVAL_S:g} s.")
        return
    coarse = data.coarser(intervals)
    chosen = names or sorted(data.adapters_of(intervals)[:MOST_LINES])
    kept = names or None
    happened = pd.DataFrame(data.marks(coarse, swaps), columns=["at", "event", "text"])
    seen = happened[happened["at"] >= intervals[0].start]  # the lines begin there
    one, two = st.columns(2, gap="medium")
    with one:
        throughput(coarse, chosen, seen, only=bool(names))
        latency("Time to first token", coarse, "first", kept, seen)
        resident(coarse)
    with two:
        requests(coarse, seen)
        latency("Time per token", coarse, "each", kept, seen)
        events(happened)
    table(intervals, names)


def figures(history: data.History, intervals: Sequence[data.Interval]) -> None:
    """As of the last reading, and over the time shown."""
    read_at, gauges = history.latest
    lately = [interval for interval in intervals if interval.end > intervals[-1].end - LATELY_S]
    spent = sum(interval.seconds for interval in lately)
    tokens = sum(part.counts.get("completion_tokens", 0) for each in lately for part in each.traffic.values())
    first = data.histogram(intervals, "first").quantile(0.95)
    room = f"{gauges.get('adapter_bytes', 0) / 2**20:,.1f} of {gauges.get('adapter_budget_bytes', 0) / 2**20:,.0f} MiB"
    evicted, loaded = data.total(intervals, "evictions"), data.total(intervals, "loads")
    facts = {
        "Running": (f"{gauges.get('running', 0):,.0f}", f"open streams: {gauges.get('open_streams', 0):,.0f}"),
        "Waiting": (f"{gauges.get('waiting', 0):,.0f}", f"KV cache {gauges.get('kv_cache_usage', 0):.0%} used"),
        "Tokens a second": (f"{tokens / spent:,.0f}" if spent else "–", f"in the last {spent:.0f} s"),
        "First token, p95": ("–" if first is None else f"{1000 * first:,.0f} ms", "of the time shown"),
        "Adapters resident": (f"{gauges.get('resident', 0):,.0f}", room),
        "Evicted": (f"{evicted:,.0f}", f"{loaded:,.0f} loaded"),
    }
    for row in (list(facts)[:3], list(facts)[3:]):
        for column, name in zip(st.columns(3), row, strict=True):
            number(column, name, *(("–", "no figures yet") if read_at is None else facts[name]))


def throughput(intervals: Sequence[data.Interval], names: list[str], happened: pd.DataFrame, *, only: bool) -> None:
    st.subheader("Tokens a second", anchor=False)
    rows = pd.DataFrame(data.rate_rows(intervals, names), columns=["at", "adapter", "value"])
    if rows.empty:
        st.caption("No token was made in this time.")
        return
    if only:
        rows = rows[rows["adapter"] != data.REST]
    shown = [*names, *([data.REST] if (rows["adapter"] == data.REST).any() else [])]
    colours = [*(colour for colour in SERIES if colour != GREY)][: len(names)]
    draw(rows, "adapter", dict(zip(shown, [*colours, GREY], strict=False)), happened, "tokens/s", ",.0f")


def requests(intervals: Sequence[data.Interval], happened: pd.DataFrame) -> None:
    st.subheader("Requests", anchor=False)
    shown = {"running": "running", "waiting": "waiting", "open_streams": "open streams"}
    rows = pd.DataFrame(data.gauge_rows(intervals, shown)).rename(columns={"what": "adapter"})
    draw(rows, "adapter", {"running": BLUE, "waiting": VERMILION, "open streams": GREEN}, happened, "requests", ",.0f")


def latency(
    title: str, intervals: Sequence[data.Interval], which: str, names: list[str] | None, happened: pd.DataFrame
) -> None:
    st.subheader(title, anchor=False)
    rows = pd.DataFrame(data.percentile_rows(intervals, which, names), columns=["at", "percentile", "value"])
    if rows.empty:
        st.caption("No answer ended in this time.")
        return
    rows["value"] *= 1000
    draw(rows, "percentile", PERCENTILES, happened, "ms", ",.1f", points=True)


def resident(intervals: Sequence[data.Interval]) -> None:
    st.subheader("Adapters resident", anchor=False)
    rows = pd.DataFrame(data.gauge_rows(intervals, {"resident": "resident", "pinned": "pinned"}))
    nothing = pd.DataFrame(columns=["at", "event", "text"])
    draw(rows, "what", {"resident": BLUE, "pinned": ORANGE}, nothing, "adapters", ",.0f")


def draw(
    rows: pd.DataFrame,
    by: str,
    colours: dict[str, str],
    happened: pd.DataFrame,
    title: str,
    form: str,
    *,
    points: bool = False,
) -> None:
    """Lines over time, and the marks of what happened behind them."""
    names = list(colours)
    rows = rows.assign(at=moments(rows["at"]))
    legend = alt.Legend(
        title=None, orient="bottom", columns=3, labelLimit=180, symbolType="stroke", symbolStrokeWidth=3
    )
    dashes = [DASHES[index % len(DASHES)] for index in range(len(names))]
    lines = (
        alt.Chart(rows)
        .mark_line(
            strokeWidth=2,
            interpolate="step-before",
            point=alt.OverlayMarkDef(size=18) if points or rows["at"].nunique() == 1 else False,
        )
        .encode(
            x=alt.X("at:T", title=None, axis=alt.Axis(grid=False, tickCount=5, format="%H:%M:%S")),
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=4, format=",.2~f")),
            color=alt.Color(
                f"{by}:N", sort=names, legend=legend, scale=alt.Scale(domain=names, range=list(colours.values()))
            ),
            strokeDash=alt.StrokeDash(
                f"{by}:N", sort=names, legend=legend, scale=alt.Scale(domain=names, range=dashes)
            ),
            tooltip=[
                alt.Tooltip(f"{by}:N"),
                alt.Tooltip("at:T", format="%H:%M:%S"),
                alt.Tooltip("value:Q", format=form),
            ],
        )
    )
    st.altair_chart(alt.layer(*event_marks(happened), lines).properties(height=HEIGHT), width="stretch")


def event_marks(happened: pd.DataFrame) -> list[alt.Chart]:
    """Upright lines: one for each moment, by kind."""
    marks = []
    for event, colour in EVENTS.items():
        kind = happened[happened["event"] == event]
        if len(kind):
            marks.append(
                alt.Chart(kind.assign(at=moments(kind["at"])))
                .mark_rule(color=colour, strokeWidth=2, opacity=0.8, strokeDash=[1, 0] if event == "Swap" else [2, 3])
                .encode(
                    x="at:T",
                    tooltip=[alt.Tooltip("event:N"), alt.Tooltip("text:N"), alt.Tooltip("at:T", format="%H:%M:%S")],
                )
            )
    return marks


def moments(seconds: pd.Series) -> pd.Series:
    """As a browser counts time, which shows it in its reader's own zone."""
    return seconds * 1000


def events(happened: pd.DataFrame) -> None:
    st.subheader("What happened", anchor=False)
    if happened.empty:
        st.caption("No swap, no eviction, no refusal in this time.")
        return
    latest = happened.iloc[::-1].assign(at=pd.to_datetime(happened["at"], unit="s"))
    st.dataframe(
        latest,
        hide_index=True,
        width="stretch",
        height=min(HEIGHT, 37 + 35 * len(latest)),
        column_config={
            "at": st.column_config.DatetimeColumn("At (UTC)", format="HH:mm:ss"),
            "event": st.column_config.TextColumn("Event", width="small"),
            "text": st.column_config.TextColumn("What"),
        },
    )


def table(intervals: Sequence[data.Interval], names: list[str]) -> None:
    st.subheader("By adapter", anchor=False)
    rows = [row for row in data.adapter_table(intervals) if not names or row["adapter"] in names]
    if not rows:
        st.caption("No answer ended in this time.")
        return
    config: dict[str, Any] = {
        "adapter": st.column_config.TextColumn("Adapter", pinned=True),
        "requests": st.column_config.NumberColumn("Answers", format="localized"),
        "failed": st.column_config.NumberColumn("Failed", format="localized"),
        "requests_per_s": st.column_config.NumberColumn("Answers/s", format="%.2f"),
        "tokens_per_s": st.column_config.NumberColumn("Tokens/s", format="%.1f"),
        "prompt_tokens_per_s": st.column_config.NumberColumn("Prompt tokens/s", format="%.1f"),
    }
    for which, title in (("first", "First token"), ("each", "Per token"), ("queued", "Queued")):
        for q in data.PERCENTILES:
            config[f"{which}_p{100 * q:g}"] = st.column_config.NumberColumn(f"{title} p{100 * q:g}", format=MS)
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", column_config=config)
    st.caption("Percentiles come from histogram buckets, as Prometheus's histogram_quantile reads them.")


if __name__ == "__main__":
    page()
