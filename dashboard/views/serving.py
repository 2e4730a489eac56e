"""Serving: requests, tokens, latencies and resident adapters over time, with promotions marked on the time line.

The gateway keeps the figures, or a Prometheus does (PEDRO_PROMETHEUS_URL), whether or not a page is open; what was not
observed is drawn as such. Times are UTC.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import pandas as pd
import streamlit as st

import connection
from components.observed import LONG_S, history_of, kept_elsewhere, refresh
from components.timeline import HEIGHT, Shown, clock, draw
from drawing import BLUE, GREEN, GREY, ORANGE, PINK, SERIES, VERMILION, number
from pedro.traffic.history import Interval, coarser
from sources import serving as data
from sources.gateway import MAKE_KEY, Access, GatewayClient
from sources.services import gateway_url
from sources.view import tenant_seen

WINDOWS = {"5 minutes": 300.0, "15 minutes": 900.0, "1 hour": 3600.0, "6 hours": 21600.0, "24 hours": LONG_S}
DEFAULT = "15 minutes"
MOST_LINES = 6
LATELY_S = 30.0
PERCENTILES = {"p50": BLUE, "p95": ORANGE, "p99": PINK}
CHOSEN = "serving_adapters"
MS = "%.1f ms"


def page() -> None:
    gateway, status = connection.sidebar()
    st.title("Serving", anchor=False)
    span, which, live = st.columns([6, 3, 2], vertical_alignment="bottom")
    seconds = WINDOWS[span.segmented_control("Time", list(WINDOWS), default=DEFAULT, required=True) or DEFAULT]
    history = history_of(gateway, seconds)
    settings = connection.settings()
    ours = status.access is Access.ADMIN and tenant_seen(settings) is None and gateway.url == gateway_url(settings)
    elsewhere = kept_elsewhere(settings.prometheus_url, seconds) if settings.prometheus_url and ours else None
    sources = [each for each in (elsewhere, history) if each is not None]
    seen = [name for each in sources for name in data.adapters_of(each.window(time.time(), seconds))]
    known = {*seen, *st.session_state.get(CHOSEN, ())}
    names = which.multiselect("Adapters", sorted(known), key=CHOSEN, persist_state="session", placeholder="the busiest")
    running = live.toggle("Live", True, help=f"Read every {data.INTERVAL_S:g} s while this page is open.")
    st.fragment(show, run_every=data.INTERVAL_S if running else None)(gateway, history, elsewhere, seconds, names)


def show(
    gateway: GatewayClient, history: data.History, elsewhere: data.History | None, seconds: float, names: list[str]
) -> None:
    """Everything that changes by itself: read, then draw; what the gateway keeps where a Prometheus does not answer."""
    now = time.time()
    keeps = "The gateway keeps its figures while it runs."
    if elsewhere is not None:
        if problem := refresh(gateway, elsewhere, seconds, now):
            st.warning(f"{problem}. These are the figures that the gateway itself keeps.", icon=":material/cloud_off:")
        else:
            history, keeps = elsewhere, "Prometheus has no figures for this time."
    problem = "" if history is elsewhere else refresh(gateway, history, seconds, now)
    if problem:
        st.info(
            f"{problem}. `pedro serve` starts a gateway, and it shows its figures to an admin key (`{MAKE_KEY}`).",
            icon=":material/cloud_off:",
        )
    intervals = history.window(now, seconds)
    figures(history, intervals)
    if not intervals:
        if not problem:
            st.caption(
                "The gateway has only just started to observe: the first figures come in some seconds."
                if history is not elsewhere
                else "Prometheus has no figures for this time."
            )
        return
    shown = Shown(now - seconds, now, data.gaps(intervals, now - seconds, now))
    coarse = coarser(intervals, data.POINTS)
    chosen = names or sorted(data.adapters_of(intervals)[:MOST_LINES])
    kept = names or None
    swaps = data.read_swaps(connection.settings(), now - seconds)
    happened = pd.DataFrame(data.marks(coarse, swaps), columns=["at", "event", "text"])
    if shown.gaps:
        listed = ", ".join(f"{clock(begun)} to {clock(ended)}" for begun, ended in shown.gaps[:4])
        more = f" and {len(shown.gaps) - 4} more times" if len(shown.gaps) > 4 else ""
        st.caption(f"Not observed (grey): {listed}{more}. {keeps}")
    one, two = st.columns(2, gap="medium")
    with one:
        throughput(coarse, chosen, happened, shown, only=bool(names))
        latency("Time to first token", coarse, "first", kept, happened, shown)
        resident(coarse, shown)
    with two:
        requests(coarse, happened, shown)
        latency("Time per token", coarse, "each", kept, happened, shown)
        events(happened)
    table(intervals, names)


def figures(history: data.History, intervals: Sequence[Interval]) -> None:
    """As of the last reading, and over the time shown."""
    gauges = history.gauges
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
    if history.read_at is None:
        facts = dict.fromkeys(facts, ("–", "no figures yet"))
    elif "running" not in gauges:  # the gateway's own are not the engine's
        facts |= dict.fromkeys(("Running", "Waiting", "Adapters resident"), ("–", "no engine answers"))
    for column, name in zip(st.columns(len(facts)), facts, strict=True):
        number(column, name, *facts[name])


def throughput(
    intervals: Sequence[Interval], names: list[str], happened: pd.DataFrame, shown: Shown, *, only: bool
) -> None:
    st.subheader("Tokens a second", anchor=False)
    rows = pd.DataFrame(data.rate_rows(intervals, names), columns=["at", "adapter", "value"])
    if rows.empty:
        nothing("No tokens were generated", shown)
        return
    if only:
        rows = rows[rows["adapter"] != data.REST]
    lines = [*names, *([data.REST] if (rows["adapter"] == data.REST).any() else [])]
    colours = [*(colour for colour in SERIES if colour != GREY)][: len(names)]
    draw(rows, "adapter", dict(zip(lines, [*colours, GREY], strict=False)), happened, shown, "tokens/s", ",.0f")


def requests(intervals: Sequence[Interval], happened: pd.DataFrame, shown: Shown) -> None:
    st.subheader("Requests", anchor=False)
    gauges = {"running": "running", "waiting": "waiting", "open_streams": "open streams"}
    rows = pd.DataFrame(data.gauge_rows(intervals, gauges)).rename(columns={"what": "adapter"})
    colours = {"running": BLUE, "waiting": VERMILION, "open streams": GREEN}
    draw(rows, "adapter", colours, happened, shown, "requests", ",.0f")


def latency(
    title: str,
    intervals: Sequence[Interval],
    which: str,
    names: list[str] | None,
    happened: pd.DataFrame,
    shown: Shown,
) -> None:
    st.subheader(title, anchor=False)
    rows = pd.DataFrame(data.percentile_rows(intervals, which, names), columns=["at", "percentile", "value"])
    if rows.empty:
        nothing("No answer finished", shown)
        return
    answered = set(rows["at"])
    idle = [(each.end, name) for each in intervals if each.end not in answered for name in PERCENTILES]
    breaks = pd.DataFrame([{"at": at, "percentile": name, "value": math.nan} for at, name in idle])
    rows = pd.concat([rows, breaks]).assign(value=lambda frame: 1000 * frame["value"])  # a line ends where none did
    draw(rows, "percentile", PERCENTILES, happened, shown, "ms", ",.1f", points=True)


def nothing(what: str, shown: Shown) -> None:
    """That nothing happened is said of what was observed alone."""
    if not shown.observed:
        st.caption("Not observed.")
    else:
        st.caption(f"{what} in the time observed." if shown.gaps else f"{what} in this time.")


def resident(intervals: Sequence[Interval], shown: Shown) -> None:
    st.subheader("Adapters resident", anchor=False)
    rows = pd.DataFrame(data.gauge_rows(intervals, {"resident": "resident", "pinned": "pinned"}))
    no_events = pd.DataFrame(columns=["at", "event", "text"])
    draw(rows, "what", {"resident": BLUE, "pinned": ORANGE}, no_events, shown, "adapters", ",.0f")


def events(happened: pd.DataFrame) -> None:
    st.subheader("What happened", anchor=False)
    if happened.empty:
        st.caption("No swap, eviction or refusal was recorded in this time.")
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


def table(intervals: Sequence[Interval], names: list[str]) -> None:
    st.subheader("By adapter", anchor=False)
    rows = [row for row in data.adapter_table(intervals) if not names or row["adapter"] in names]
    if not rows:
        st.caption("No answer finished in this time.")
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
