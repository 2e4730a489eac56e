"""Adapters: versions, lineage, gate, and promotion through the gateway."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import pandas as pd
import streamlit as st

import connection
from components import promotion, shared_url
from components.beside import beside
from components.catalog import REFRESH_S, catalog_or_notice, forget, read_stored, read_versions, select_version
from components.job_details import runs_link
from components.row_browser import browse
from drawing import number
from pedro.refs import ModelRef
from pedro.registry import CANDIDATE, CHAMPION, PREVIOUS, Version
from sources import adapters as data
from sources import jobs
from sources.differences import of_version
from sources.gateway import Access, GatewayClient, GatewayError
from sources.view import may_act, tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings

DATE = "YYYY-MM-DD HH:mm"
read_made = st.cache_data(ttl=60, show_spinner=False, max_entries=200)(jobs.jobs_of_versions)
VERDICTS = {
    "passed": ":green[:material/check_circle:] passed the gate",
    "refused": ":orange[:material/block:] refused by the gate",
    "imported": ":gray[:material/download:] imported",
    "not gated": ":gray[:material/help:] not gated",
}


def page() -> None:
    settings = connection.settings()
    gateway, status = connection.sidebar()
    st.title("Adapters", anchor=False)
    catalog = catalog_or_notice(settings)
    if not catalog.rows:
        st.caption(f"Registry `{catalog.source}`")
        return
    name = choose(catalog)
    promotion.show_outcome_elsewhere(name)
    if name is not None:
        own = tenant_seen(settings) is not None and status.access is Access.TENANT and may_act(settings)
        able = status.answers and (status.access is Access.ADMIN or own)
        detail(settings, name, gateway if able else None)
        if not able:
            connection.missing(gateway, status, "Moving a champion")
    st.caption(f"Registry `{catalog.source}`, read again every {REFRESH_S} s on use.")


def choose(catalog: data.Catalog) -> str | None:
    """The catalog, searched and paged; the adapter that is selected."""
    rows = catalog.rows
    sought, tenant, state = st.columns([3, 3, 3])
    text = sought.text_input("Search", placeholder="part of a name", icon=":material/search:")
    tenants = tenant.multiselect("Tenants", sorted({row.tenant for row in rows}), key="tenants", placeholder="all")
    kept = data.search(rows, text, tenants, state.selectbox("Show", data.STATES))
    if not kept:
        st.caption(f"None of {len(rows):,} adapters match.")
        return None
    pages = data.pages_of(kept)
    page = 1
    if pages > 1:
        left, right = st.columns([1, 5], vertical_alignment="bottom")
        page = int(left.number_input("Page", 1, pages, 1))
        right.caption(f"of {pages}: {len(kept):,} of {len(rows):,} adapters, {data.PAGE} a page")
    shown = data.page_rows(kept, page)
    table = st.dataframe(
        pd.DataFrame(shown),
        hide_index=True,
        width="stretch",
        height=min(400, 37 + 35 * len(shown)),
        placeholder="–",
        on_select="rerun",
        selection_mode="single-row",
        key=f"catalog_{page}",
        column_config={
            "tenant": st.column_config.TextColumn("Tenant"),
            "adapter": st.column_config.TextColumn("Adapter"),
            "champion": st.column_config.NumberColumn("Champion", format="v%d"),
            "candidate": st.column_config.NumberColumn("Candidate", format="v%d"),
            "previous": st.column_config.NumberColumn("Previous", format="v%d"),
            "created": st.column_config.DatetimeColumn("Registered (UTC)", format=DATE),
        },
    )
    names = [row.name for row in kept]
    follow_table(table, shown)
    known = shared_url.check("adapter", {row.name for row in rows}, "Adapter", "Choose one of those below.")
    return st.selectbox(
        "Adapter",
        names,
        index=0 if known else None,
        placeholder="Choose an adapter",
        key="adapter",
        bind="query-params",
        help="Type to search. A click on a row of the table does it too.",
    )


def follow_table(table: Any, shown: list[dict[str, Any]]) -> None:
    """Selecting a row of the table selects its adapter."""
    selected = list(table.selection.rows) if table else []
    row = shown[selected[0]] if selected and selected[0] < len(shown) else None
    name = ModelRef(row["tenant"], row["adapter"]).name if row else None
    if name is not None and name != st.session_state.get("adapters_clicked"):
        st.session_state["adapter"] = name
    st.session_state["adapters_clicked"] = name


def detail(settings: Settings, name: str, gateway: GatewayClient | None) -> None:
    registered = read_versions(settings, name)
    if registered.problem:
        st.warning(f"{name} cannot be read.\n\n```\n{registered.problem}\n```", icon=":material/broken_image:")
    if not registered.versions:
        st.caption(f"`{name}` has no versions.")
        return
    st.header(name, anchor=False)
    champion, previous, candidate = (registered.holding(alias) for alias in (CHAMPION, PREVIOUS, CANDIDATE))
    facts = st.columns(4)
    number(facts[0], "Champion", *aliased(champion, "none yet"))
    number(facts[1], "Previous", *aliased(previous, "nothing to roll back to"))
    number(facts[2], "Candidate", *aliased(candidate, "none refused"))
    residence(facts[3], name, gateway, registered)
    versions_table(registered)
    chosen = select_version(st, registered, asked_version(registered), label, f"version_{name}")
    promotion.buttons(gateway, chosen, champion, previous, moved)
    promotion.show_outcome(name)
    verdict, reason = data.gate_of(chosen)
    st.markdown(f"**v{chosen.version}** · {VERDICTS[verdict]}: {reason}")
    links(settings, chosen)
    origin(settings, chosen, registered)


def moved(name: str, champion: int | None) -> None:
    """An alias has moved, or may have: read again, and look at the new champion, if it is known."""
    forget()
    if champion is not None:
        st.session_state[f"version_{name}"] = champion


def asked_version(registered: data.Versions) -> Version:
    """The version that a link asks for, else the newest."""
    asked = st.query_params.get("version", "")
    return next((held for held in registered.versions if str(held.version) == asked), registered.versions[0])


def links(settings: Settings, version: Version) -> None:
    """From a version to the job that made it, to a chat with it, and to the adapter's runs."""
    job = made_by(settings, version).get(version.ref)
    one, two, three = st.columns([2, 3, 3])
    with three:
        runs_link(version.name)
    with one:
        st.page_link(
            "views/playground.py", label="Chat with it", icon=":material/forum:", query_params={"model": version.ref}
        )
    with two:
        if job:
            st.page_link(
                "views/runs.py", label=f"Trained by {job}", icon=":material/play_circle:", query_params={"job": job}
            )


def made_by(settings: Settings, version: Version) -> dict[str, str]:
    """The versions of the same adapter that jobs made, and those jobs."""
    return read_made(settings, version.tenant, version.adapter)


def aliased(version: Version | None, none: str) -> tuple[str, str]:
    if version is None:
        return "–", none
    for name in ("accuracy", "preference_accuracy"):
        if (value := data.number_of(version.metrics, name)) is not None:
            return f"v{version.version}", f"{name.replace('_', ' ')} {value:.1%}"
    return f"v{version.version}", "not measured"


def residence(column: Any, name: str, gateway: GatewayClient | None, registered: data.Versions) -> None:
    """Where the gateway's engines hold the adapter now."""
    if gateway is None:
        number(column, "Resident", "–", "needs a key")
        return
    try:
        adapter = gateway.adapter(name)
    except GatewayError as error:
        number(column, "Resident", "–", "unknown")
        st.warning(error.message, icon=":material/cloud_off:")
        return
    held = adapter.get("residence")
    copies = [entry for entry in held if isinstance(entry, Mapping)] if isinstance(held, list) else []
    if held is None:
        number(column, "Resident", "–", "engine away" if "residence" in adapter else "for operators")
    elif not copies:
        number(column, "Resident", "no", "loads on first request")
    else:
        versions = ", ".join(sorted({f"v{entry.get('version')}" for entry in copies}))
        size = sum(int(entry.get("bytes") or 0) for entry in copies)
        number(column, "Resident", versions, f"{size / 1e3:,.0f} kB in all")
    champion = registered.holding(CHAMPION)
    if champion and (adapter.get("aliases") or {}).get(CHAMPION) != champion.version:
        st.warning(
            f"The gateway at {gateway.url} answers with another champion of {name} than this registry names. Does it "
            "read another registry?",
            icon=":material/difference:",
        )


def versions_table(registered: data.Versions) -> None:
    rows = pd.DataFrame(data.version_rows(registered.versions)).dropna(axis="columns", how="all")
    st.dataframe(
        rows,
        hide_index=True,
        width="stretch",
        height=min(320, 37 + 35 * len(rows)),
        placeholder="–",
        column_config={
            "version": st.column_config.NumberColumn("Version", format="v%d", width=60),
            "aliases": st.column_config.ListColumn("Aliases"),
            "gate": st.column_config.TextColumn("Gate", width=65),
            "method": st.column_config.TextColumn("Method", width=65),
            "accuracy": st.column_config.ProgressColumn(
                "Accuracy", min_value=0, max_value=1, format="percent", width=120
            ),
            "backbone_accuracy": st.column_config.NumberColumn(
                "Backbone", format="percent", help="Accuracy of the backbone alone", width=75
            ),
            "preference_accuracy": st.column_config.NumberColumn(
                "Pairs", format="percent", help="Preference tuning: pairs whose better answer it favours", width=65
            ),
            "loss": st.column_config.NumberColumn("Loss", format="%.4f", width=65),
            "parameters": st.column_config.NumberColumn("Parameters", format="localized", width=85),
            "digest": st.column_config.TextColumn(
                "Digest", help="The first 12 digits of the weights' sha256", width=105
            ),
            "created": st.column_config.DatetimeColumn("Registered (UTC)", format=DATE, width=130),
        },
    )


def origin(settings: Settings, version: Version, registered: data.Versions) -> None:
    """Lineage, measurements and specification of one version, and what tells it from another."""
    stored = read_stored(settings, version)
    if stored.problem:
        st.warning(
            f"The files of {version.ref} cannot be read; what the registry itself knows is shown.\n\n"
            f"```\n{stored.problem}\n```",
            icon=":material/broken_image:",
        )
    facts, measured, rows_behind, spec, apart = st.tabs(
        ["Lineage", "Measurements", "Rows", "Specification", "Beside another"]
    )
    with apart:
        compared(settings, version, stored, registered)
    with rows_behind:
        made = made_by(settings, version)
        if version.ref in made:
            others = {ref: job for ref, job in made.items() if ref != version.ref}
            browse(settings, made[version.ref], version.ref, others)
        else:
            st.caption("No recorded job produced this version, so its rows are unknown.")
    with facts:
        rows = data.lineage(version, stored.manifest)
        st.dataframe(
            pd.DataFrame(rows, columns=["what", "is"]),
            hide_index=True,
            width="stretch",
            height=37 + 35 * len(rows),
            column_config={
                "what": st.column_config.TextColumn("What", width=130),
                "is": st.column_config.TextColumn("Of this version", width="large"),
            },
        )
    with measured:
        metrics = data.metric_rows(version)
        if metrics:
            st.dataframe(pd.DataFrame(metrics), hide_index=True, width="content")
        else:
            st.caption("Nothing was measured.")
    with spec:
        text = data.spec_text(version, stored.manifest)
        if text:
            st.code(text, language="yaml")
        else:
            st.caption("No specification is recorded.")


def compared(settings: Settings, version: Version, stored: data.Stored, registered: data.Versions) -> None:
    """A version beside another of the same adapter."""
    others = {other.ref: other for other in registered.versions if other.version != version.version}
    if not others:
        st.caption("This is the only version.")
        return
    asked = st.selectbox(
        "Other version", list(others), index=None, key=f"beside_{version.ref}", placeholder="Choose a version"
    )
    if not asked:
        return
    other = others[asked]
    if other.digest == version.digest:
        st.caption("Both have the same weights.")
    sides = of_version(version, stored.manifest), of_version(other, read_stored(settings, other).manifest)
    beside(settings, *sides, where=version.ref)


def label(version: Version) -> str:
    held = f" ({', '.join(version.aliases)})" if version.aliases else ""
    return f"v{version.version}{held} · {version.created.replace('T', ' ').removesuffix('Z')} UTC"


if __name__ == "__main__":
    page()
