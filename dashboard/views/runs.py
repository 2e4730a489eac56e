"""Runs: what is under way with its progress, and a filtered, paged table of all jobs; the open one is in the URL."""

from __future__ import annotations

from math import ceil
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

import connection
from components import shared_url
from components.beside import beside
from components.job_details import REFRESH_S, details, minute_utc, read_runs
from components.row_browser import browse
from sources import jobs as data
from sources.differences import of_job
from sources.view import may_act, tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings

PAGE = 25
ALL = "all"
OPEN = "job"  # the open row, in the URL
BESIDE = "beside"  # and the job that it is compared with
MOST_BESIDE = 100
COLUMNS: dict[str, Any] = {
    "status": st.column_config.TextColumn("Status", width="small"),
    "model": st.column_config.TextColumn("Adapter"),
    "kind": st.column_config.TextColumn("Kind"),
    "created": st.column_config.DatetimeColumn("Created (UTC)", format="YYYY-MM-DD HH:mm"),
    "minutes": st.column_config.NumberColumn("Minutes", format="%.1f", width="small"),
    "version": st.column_config.TextColumn("Became", width=105),
    "accuracy": st.column_config.NumberColumn("Accuracy", format="percent", width="small"),
    "message": st.column_config.TextColumn("Outcome", width="large"),
    "job": st.column_config.TextColumn("Job"),
}

read_live = st.cache_resource(max_entries=100, ttl=REFRESH_S / 2, show_spinner=False)(data.live_jobs)
read_past = st.cache_resource(max_entries=100, ttl=REFRESH_S, show_spinner="Reading the jobs …")(data.past_jobs)
read_one = st.cache_resource(max_entries=100, ttl=REFRESH_S, show_spinner=False)(data.one_job)
read_made = st.cache_data(ttl=60, show_spinner=False, max_entries=100)(data.jobs_of_versions)
read_trained = st.cache_data(ttl=30, show_spinner=False)(data.trained_adapters)


def page() -> None:
    settings = connection.settings()
    st.title("Runs", anchor=False)
    under_way(settings)
    past(settings)


@st.fragment(run_every=REFRESH_S)
def under_way(settings: Settings) -> None:
    """The live part, redrawn every few seconds."""
    seen = read_live(settings)
    st.subheader("Under way", anchor=False)
    complain(seen)
    if seen.cluster.problem and not seen.cluster.gone and tenant_seen(settings) is None:
        st.caption(f":orange[:material/warning:] {seen.cluster.problem}")
    if not seen.jobs:
        st.caption("Nothing is running or queued. `pedro submit SPEC.yaml` starts a job, `pedro sweep SPEC.yaml` many.")
        return
    by_id = {job.id: job for job in seen.jobs}
    chosen = st.selectbox(
        "Job", list(by_id), format_func=lambda job_id: title(by_id[job_id]), key="live", persist_state="session"
    )
    job = by_id[chosen] if chosen in by_id else seen.jobs[0]
    details(settings, job, "live")
    ending(settings, job)


def title(job: data.Job) -> str:
    return f"{job.model} · {job.kind} · {job.status} · {minute_utc(job.created)} · {job.id}"


def complain(seen: data.Jobs) -> None:
    if seen.problem:
        st.warning(
            f"The platform's records cannot be read.\n\n```\n{seen.problem}\n```", icon=":material/database_off:"
        )


def ending(settings: Settings, job: data.Job) -> None:
    """Two steps, so that nobody cancels a job by accident; the question survives redraws."""
    if not job.live or not may_act(settings):
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
    st.toast(problem or f"{job_id} was ended", icon=":material/error:" if problem else ":material/check:")


def past(settings: Settings) -> None:
    st.subheader("All jobs", anchor=False)
    trained = read_trained(settings)
    columns = st.columns([2, 2, 3, 1], vertical_alignment="bottom")
    tenants = list(dict.fromkeys(tenant for tenant, _ in trained))
    shared_url.check("tenant", [ALL, *tenants], "Tenant", "No job of it is recorded.")
    tenant = _one(columns[0].selectbox("Tenant", [ALL, *tenants], key="tenant", bind="query-params"))
    adapters = list(dict.fromkeys(adapter for owner, adapter in trained if tenant in (None, owner)))
    adapter = _one(columns[1].selectbox("Adapter", [ALL, *adapters], key="adapter", bind="query-params"))
    status = _one(columns[2].selectbox("Status", [ALL, *data.STATES], key="status", bind="query-params"))
    number = int(columns[3].number_input("Page", 1, key="page", bind="query-params"))
    seen = read_past(settings, status, PAGE, (number - 1) * PAGE, tenant, adapter)
    complain(seen)
    counts = seen.counts or {}
    total = counts.get(status, 0) if status else sum(counts.values())
    if not total:
        filtered = status or tenant or adapter
        st.caption("No such job." if filtered else "No job yet. `pedro submit SPEC.yaml` starts one.")
    elif not seen.jobs:
        st.caption(f"There are {ceil(total / PAGE):,} pages.")
    else:
        by_state = ", ".join(f"{count:,} {state}" for state, count in sorted(counts.items(), key=lambda at: -at[1]))
        first, last = (number - 1) * PAGE + 1, min(number * PAGE, total)
        st.caption(f"{first:,} to {last:,} of {total:,}, newest first. In all: {by_state}.")
    opened(settings, {job.id: job for job in seen.jobs})


def opened(settings: Settings, by_id: dict[str, data.Job]) -> None:
    """The table, and the row of it that is open; a row that the URL names need not be on this page."""
    asked = st.query_params.get(OPEN)
    if asked and asked not in by_id and (found := read_one(settings, asked)) is not None:
        by_id = {asked: found, **by_id}
    if by_id:
        table = st.container()
        chosen = shared_url.choose(
            "Look at",
            list(by_id),
            OPEN,
            titles={job_id: title(job) for job_id, job in by_id.items()},
            what="Job",
            placeholder="Choose a job, here or in the table",
            empty=True,
        )
        with table:
            follow_rows(list(by_id.values()))
        if chosen:
            one(settings, by_id[chosen])
    else:
        shared_url.check(OPEN, by_id, "Job", "No such job is recorded.")


def follow_rows(jobs: list[data.Job]) -> None:
    frame = pd.DataFrame(data.job_rows(jobs), columns=list(COLUMNS))
    frame["created"] = pd.to_datetime(frame["created"], unit="ms")
    st.dataframe(
        frame,
        hide_index=True,
        width="stretch",
        column_config=COLUMNS,
        placeholder="",
        key="jobs_table",
        on_select=lambda: _follow([job.id for job in jobs]),
        selection_mode="single-row",
    )


def _follow(ids: list[str]) -> None:
    """Selecting a row opens it."""
    rows = st.session_state["jobs_table"].selection.rows
    if rows and rows[0] < len(ids):
        st.session_state[OPEN] = ids[rows[0]]


def one(settings: Settings, job: data.Job) -> None:
    """A job of the table: what came of it."""
    with st.container(border=True):
        details(settings, job, "past")
        result = data.result_of(job)
        if result:
            metrics = {
                name: value for name, value in result.get("metrics", {}).items() if isinstance(value, int | float)
            }
            st.caption(" · ".join(f"{name} {value:,.4g}" for name, value in metrics.items()))
        if result:
            made = read_made(settings, job.tenant, job.adapter)
            with st.expander("Rows behind the score", icon=":material/table_rows:"):
                browse(settings, job.id, "past", {ref: other for ref, other in made.items() if other != job.id})
        if job.record and job.record.spec:
            with st.expander("Specification"):
                st.json(job.record.spec)
        with st.expander("Beside another job", expanded=BESIDE in st.query_params, icon=":material/difference:"):
            compared(settings, job)


def compared(settings: Settings, job: data.Job) -> None:
    """A job beside another: the newest of the same adapter are offered, and whichever the URL names."""
    near = read_past(settings, None, MOST_BESIDE, 0, job.tenant, job.adapter).jobs
    by_id = {other.id: other for other in near if other.id != job.id}
    asked = st.query_params.get(BESIDE)
    if asked and asked not in (job.id, *by_id) and (found := read_one(settings, asked)) is not None:
        by_id[asked] = found
    other = shared_url.choose(
        "Other job",
        list(by_id),
        BESIDE,
        titles={job_id: title(each) for job_id, each in by_id.items()},
        what="Job",
        placeholder="Choose a job" if by_id else "No other job of this adapter is recorded",
        empty=True,
    )
    if other:
        one, second = (of_job(each, read_runs(settings, each)[0]) for each in (job, by_id[other]))
        beside(settings, one, second, where="beside")


def _one(chosen: str | None) -> str | None:
    return None if chosen in (None, ALL) else chosen


if __name__ == "__main__":
    page()
