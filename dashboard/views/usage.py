"""Usage: requests, tokens and training by tenant, model, key and day, as a chart, a table and CSV. Days are UTC."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import altair as alt
import pandas as pd
import streamlit as st

import connection
from components import shared_url
from drawing import colours, number, show_chart
from pedro.store import USAGE_GROUPS
from sources import usage as data
from sources.view import tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings

ALL = "all"
MOST_SERIES = 7
COLUMNS: dict[str, Any] = {
    "tenant": st.column_config.TextColumn("Tenant"),
    "model": st.column_config.TextColumn("Model"),
    "key_id": st.column_config.TextColumn("Key"),
    "key_name": st.column_config.TextColumn("Its name"),
    "day": st.column_config.TextColumn("Day (UTC)"),
    "requests": st.column_config.NumberColumn("Requests", format="localized"),
    "prompt_tokens": st.column_config.NumberColumn("Prompt tokens", format="localized"),
    "cached_tokens": st.column_config.NumberColumn(
        "Of which cached", format="localized", help="Tokens of prompts that needed no reading"
    ),
    "completion_tokens": st.column_config.NumberColumn("Answer tokens", format="localized"),
    "training_tokens": st.column_config.NumberColumn("Training tokens", format="localized"),
    "training_seconds": st.column_config.NumberColumn(
        "Training seconds", format="localized", help="Times the workers of each job"
    ),
}

read_usage = st.cache_data(ttl=5, show_spinner="Reading the ledger …", max_entries=100)(data.read_usage)
read_tenants = st.cache_data(ttl=30, show_spinner=False)(data.tenants_with_usage)
read_names = st.cache_data(ttl=30, show_spinner=False)(data.key_names)


def page() -> None:
    settings = connection.settings()
    st.title("Usage", anchor=False)
    columns = st.columns([4, 2, 3], vertical_alignment="bottom")
    period = columns[0].segmented_control(
        "Time", list(data.PERIODS), default="30 days", required=True, key="time", bind="query-params"
    )
    since, tenant = data.first_day(period or "30 days"), None
    if tenant_seen(settings) is None:
        tenants = read_tenants(settings)
        shared_url.check("tenant", [ALL, *tenants], "Tenant", "It has no usage.")
        chosen = columns[1].selectbox("Tenant", [ALL, *tenants], key="tenant", bind="query-params")
        tenant = None if chosen in (None, ALL) else chosen
    by = columns[2].multiselect(
        "Summed by",
        [name for name in USAGE_GROUPS if name != "tenant" or tenant_seen(settings) is None],
        default=["model", "key"],
        key="by",
        bind="query-params",
    )
    daily, problem = read_usage(settings, ["tenant", "model", "day"], since, tenant)
    if problem:
        st.warning(f"The ledger cannot be read.\n\n```\n{problem}\n```", icon=":material/database_off:")
        return
    if not daily:
        st.caption("No usage in this time.")
        return
    frame = pd.DataFrame(daily)
    figures(frame)
    over_time(frame, "model" if tenant or tenant_seen(settings) else "tenant")
    table(settings, by or ["model"], since, tenant)


def figures(frame: pd.DataFrame) -> None:
    """Sums of all that is shown."""
    sums = frame.sum(numeric_only=True)
    columns = st.columns(4)
    number(columns[0], "Requests", f"{sums['requests']:,.0f}", days_said(frame["day"].nunique()))
    cached = sums["cached_tokens"] / max(1, sums["prompt_tokens"])
    number(columns[1], "Prompt tokens", f"{sums['prompt_tokens']:,.0f}", f"{cached:.0%} cached")
    number(columns[2], "Answer tokens", f"{sums['completion_tokens']:,.0f}", "as the engine counted them")
    hours = f"{sums['training_seconds'] / 3600:,.2f} h, times the workers"
    number(columns[3], "Training tokens", f"{sums['training_tokens']:,.0f}", hours)


def days_said(count: int) -> str:
    return "on one day" if count == 1 else f"on {count:,} days"


def over_time(frame: pd.DataFrame, field: str) -> None:
    """Tokens a day; of many models or tenants the smallest are summed."""
    st.subheader("Tokens a day", anchor=False)
    counted = ["prompt_tokens", "completion_tokens", "training_tokens"]
    frame = frame.assign(tokens=frame[counted].sum(axis=1))
    largest = frame.groupby(field)["tokens"].sum().nlargest(MOST_SERIES - 1).index
    frame[field] = frame[field].where(frame[field].isin(largest), "others")
    days = frame.groupby(["day", field], as_index=False)["tokens"].sum()
    names = sorted(days[field].unique())
    chart = (
        alt.Chart(days)
        .mark_bar(size=min(40, 600 // days["day"].nunique()))
        .encode(
            x=alt.X("day:O", title=None, axis=alt.Axis(labelAngle=0, labelOverlap=True)),
            y=alt.Y("tokens:Q", title="tokens", axis=alt.Axis(format="~s")),
            color=colours(field, names, lines=False),
            tooltip=[alt.Tooltip(f"{field}:N"), alt.Tooltip("day:O"), alt.Tooltip("tokens:Q", format=",")],
        )
    )
    show_chart(chart.properties(height=260))


def table(settings: Settings, by: list[str], since: str | None, tenant: str | None) -> None:
    """The sums, and the same as a file."""
    rows, _ = read_usage(settings, by, since, tenant)
    shown = pd.DataFrame(rows)
    if "key" in by:
        names = read_names(settings)
        shown.insert(shown.columns.get_loc("key_id") + 1, "key_name", shown["key_id"].map(names).fillna(""))
    st.dataframe(shown, hide_index=True, width="stretch", column_config=COLUMNS)
    st.download_button(
        "CSV",
        partial(data.as_csv, rows, by),
        f"usage-{since or 'all'}.csv",
        "text/csv",
        icon=":material/download:",
        on_click="ignore",
    )


if __name__ == "__main__":
    page()
