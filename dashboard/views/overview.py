"""Overview: what the platform does now: traffic, errors, tokens, adapters at risk, jobs, services, the day's news."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import date
from typing import TYPE_CHECKING

import altair as alt
import pandas as pd
import streamlit as st

import connection
from components.catalog import EMPTY
from components.observed import history_of, refresh
from components.timeline import HEIGHT, Shown, draw
from drawing import BLUE, GREEN, GREY, ORANGE, SERIES, number, show_chart
from pedro.traffic.history import Interval, coarser
from sources import serving
from sources.compare import literal
from sources.overview import REST, Overview, read_overview, token_rows
from sources.risks import FAILING, REFUSED, Risk, rising
from sources.services import Service, ServiceState, health
from sources.view import tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.traffic.scrape import Histogram
    from sources.gateway import GatewayClient

REFRESH_S = 10
SHOWN_S = 3600.0  # of traffic
MINUTES = 60
MOST_RISKS = 6
SIGNS = {
    ServiceState.UP: ":green[:material/check_circle:]",
    ServiceState.OFF: ":gray[:material/radio_button_unchecked:]",
    ServiceState.DOWN: ":red[:material/error:]",
}
RISK_ICONS = {REFUSED: ":material/block:", FAILING: ":material/trending_up:"}

read_health = st.cache_resource(ttl=REFRESH_S / 2, show_spinner=False)(health)
read_now = st.cache_resource(ttl=REFRESH_S / 2, show_spinner="Reading the registry …")(read_overview)


def page() -> None:
    settings = connection.settings()
    gateway, _ = connection.sidebar()
    title, action = st.columns([6, 1], vertical_alignment="bottom")
    title.title("pedro", anchor=False)
    if action.button("Reload", icon=":material/refresh:", width="stretch"):
        st.cache_data.clear()
        st.cache_resource.clear()
        st.rerun()
    now(settings, gateway)


@st.fragment(run_every=REFRESH_S)
def now(settings: Settings, gateway: GatewayClient) -> None:
    """All of it, redrawn every few seconds."""
    seen, moment = read_now(settings), time.time()
    history = history_of(gateway, SHOWN_S)
    problem = refresh(gateway, history, SHOWN_S, moment)
    intervals = history.window(moment, SHOWN_S)
    risks = [*rising(intervals, moment), *seen.refused]
    own = tenant_seen(settings)
    whose, where = (f"{len(seen.tenants):,} tenants, ", f" Home `{settings.home}`.") if own is None else ("", "")
    st.caption(f"{whose}{seen.adapters:,} adapters, {seen.in_service:,} of them in service.{where}")
    if seen.problems:
        listed = "\n".join(seen.problems)
        st.warning(f"Parts of the platform cannot be read.\n\n```\n{listed}\n```", icon=":material/database_off:")
    traffic(seen, intervals, observed=history.read_at is not None)
    work(seen, risks)
    if problem:
        st.caption(f":gray[:material/cloud_off:] Traffic is not observed: {literal(problem)}.")
    if not (seen.adapters or seen.running or seen.queued or seen.problems):
        st.info(EMPTY, icon=":material/extension_off:")
    at_risk(risks)
    left, right = st.columns(2, gap="large")
    with left:
        tokens(seen)
    with right:
        requests(settings, intervals, moment)
    if own is None:
        services(read_health(settings))
    news(seen)


def traffic(seen: Overview, intervals: Sequence[Interval], *, observed: bool) -> None:
    """Four figures: of the last hour as the gateway observed it, and of today as the ledger counts."""
    columns = st.columns(4)
    names = {name for interval in intervals for name in interval.traffic}
    answers, failed = (sum(serving.total(intervals, what, name) for name in names) for what in ("requests", "failed"))
    refused, seconds = serving.total(intervals, "refused"), sum(interval.seconds for interval in intervals)
    first = serving.histogram(intervals, "first")
    span = "in the last hour" if seconds > 0.9 * SHOWN_S else f"in {seconds / 60:.0f} min observed of the last hour"
    if observed:
        share = f"{failed / answers:.1%} of the answers" if answers else "no answer finished"
        number(columns[0], "Requests", f"{answers:,.0f}", span)
        number(columns[1], "Errors", f"{failed:,.0f}", f"{share}; {refused:,.0f} refused (429)")
        number(columns[2], "Time to first token", milliseconds(first, 0.5), f"median; p95 {milliseconds(first, 0.95)}")
    else:
        for column, label in zip(columns, ("Requests", "Errors", "Time to first token"), strict=False):
            number(column, label, "–", "not observed")
    number(columns[3], "Tokens today", f"{seen.tokens_on(0):,}", f"{seen.tokens_on(1):,} yesterday (UTC)")


def milliseconds(observed: Histogram, q: float) -> str:
    value = observed.quantile(q)
    return "–" if value is None else f"{1000 * value:,.0f} ms"


def work(seen: Overview, risks: Sequence[Risk]) -> None:
    columns = st.columns(4)
    lost = f"{seen.lost:,} lost with their cluster" if seen.lost else "fine-tuning and sweeps"
    number(columns[0], "Jobs running", f"{seen.running:,}", lost)
    number(columns[1], "Jobs queued", f"{seen.queued:,}", "waiting for the cluster")
    number(columns[2], "Jobs failed", f"{seen.failed:,}", "in the last day")
    refused = sum(risk.what == REFUSED for risk in risks)
    models = len({risk.model for risk in risks})
    number(
        columns[3], "At risk", f"{models:,}", f"refused by a gate: {refused:,}; errors rise: {len(risks) - refused:,}"
    )


def at_risk(risks: Sequence[Risk]) -> None:
    """Each with the way to it."""
    if not risks:
        return
    st.subheader("At risk", anchor=False)
    for risk in risks[:MOST_RISKS]:
        an_adapter = "." in risk.model
        st.page_link(
            "views/adapters.py" if an_adapter else "views/serving.py",
            label=f"**{literal(risk.model)}**: {risk.what}, {literal(risk.detail)}",
            icon=RISK_ICONS[risk.what],
            query_params={"adapter": risk.model} if an_adapter else None,
        )
    if len(risks) > MOST_RISKS:
        st.caption(f"And {len(risks) - MOST_RISKS:,} more.")


def tokens(seen: Overview) -> None:
    """A bar a day, its parts the tenants."""
    st.subheader("Tokens a day", anchor=False)
    rows = token_rows(seen.usage)
    if not rows:
        st.caption(f"Nothing was served in the last {len(seen.days)} days.")
        return
    days = {day: f"{date.fromisoformat(day):%b} {date.fromisoformat(day).day}" for day in seen.days}
    frame = pd.DataFrame(rows).assign(on=lambda frame: frame["day"].map(days))
    names = list(dict.fromkeys(sorted(frame["tenant"], key=lambda name: name == REST)))
    palette = [colour for colour in SERIES if colour != GREY][: len(names)]
    if names[-1] == REST:
        palette = [*palette[: len(names) - 1], GREY]
    bars = (
        alt.Chart(frame)
        .mark_bar()
        .encode(
            x=alt.X(
                "on:O",
                title=None,
                scale=alt.Scale(domain=list(days.values())),
                axis=alt.Axis(labelAngle=0, labelOverlap=True),
            ),
            y=alt.Y("tokens:Q", title="tokens", axis=alt.Axis(tickCount=4, format=".2~s")),
            color=alt.Color(
                "tenant:N",
                sort=names,
                scale=alt.Scale(domain=names, range=palette),
                legend=alt.Legend(title=None, orient="bottom", columns=4, labelLimit=150),
            ),
            tooltip=[
                alt.Tooltip("day:N"),
                alt.Tooltip("tenant:N"),
                *(alt.Tooltip(f"{name}:Q", format=",") for name in ("tokens", "requests")),
            ],
        )
    )
    show_chart(bars.properties(height=HEIGHT))
    st.caption("Prompts and answers, by tenant and day (UTC), from the usage ledger.")


def requests(settings: Settings, intervals: Sequence[Interval], moment: float) -> None:
    """Answers, errors and refusals a minute, with what happened to the adapters."""
    st.subheader("Requests a minute", anchor=False)
    if not intervals:
        st.caption("Not observed.")
        return
    shown = Shown(moment - SHOWN_S, moment, serving.gaps(intervals, moment - SHOWN_S, moment))
    coarse = coarser(intervals, MINUTES)
    happened = serving.marks(coarse, serving.read_swaps(settings, shown.start))
    colours = {"answers": BLUE, "errors": ORANGE, "refused (429)": GREEN}
    rows = pd.DataFrame(
        serving.request_rows(coarse, dict(zip(("requests", "failed", "refused"), colours, strict=True)))
    )
    draw(rows, "what", colours, pd.DataFrame(happened, columns=["at", "event", "text"]), shown, "a minute", ",.1f")


def services(listed: Sequence[Service]) -> None:
    st.subheader("Services", anchor=False)
    for column, service in zip(st.columns(len(listed)), listed, strict=True):
        with column.container(border=True, height="stretch", gap="small"):
            st.markdown(f"{SIGNS[service.state]} **{service.name}** {service.state}")
            st.caption(service.found + (f"  \n{service.remedy}" if service.remedy else ""))


def news(seen: Overview) -> None:
    st.subheader("In the last day", anchor=False)
    if not seen.news:
        st.caption("No version was registered or promoted, and no job ended.")
        return
    rows = [
        {"at": int(event.at * 1000), "what": event.what, "name": event.name, "detail": event.detail}
        for event in seen.news
    ]
    st.dataframe(
        pd.DataFrame(rows).assign(at=lambda frame: pd.to_datetime(frame["at"], unit="ms")),
        hide_index=True,
        height=min(38 + 35 * len(rows), 320),
        column_config={
            "at": st.column_config.DatetimeColumn("When (UTC)", format="YYYY-MM-DD HH:mm", width=130),
            "what": st.column_config.TextColumn("What", width=120),
            "name": st.column_config.TextColumn("Which", width="medium"),
            "detail": st.column_config.TextColumn("Details", width="large"),
        },
    )


if __name__ == "__main__":
    page()
