"""Overview: adapters, what they gained, how they learned, what a hot swap cost. Drawing only."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
import streamlit as st

from drawing import DASHES, INK, SERIES, number
from pedro.config import Settings
from pedro.registry import Version
from sources import demo as data
from sources import versions as registry

REFRESH_S = 5
# Okabe and Ito's palette, told apart by colour-blind readers too; grey and orange are the baselines.
ANSWERS = {"Backbone alone": "#999999", "Majority class": "#E69F00", "With adapter": "#0072B2"}

read_demo = st.cache_data(ttl=REFRESH_S, show_spinner=False)(data.read_demo)
read_adapters = st.cache_data(ttl=REFRESH_S, show_spinner="Reading the registry …")(registry.read_adapters)
read_curves = st.cache_data(ttl=REFRESH_S, show_spinner="Reading the learning curves …")(registry.curves_of)


def page() -> None:
    settings = Settings.from_env()
    demo, adapters = read_demo(settings.home), read_adapters(settings)
    head(demo)
    troubles(demo, adapters)
    if demo.tenants:
        figures(demo.tenants, demo.swap)
    left, right = st.columns([5, 6], gap="large")
    with left:
        accuracy(demo)
    with right:
        curves(settings, adapters.versions)
    table(adapters)
    swap(demo)
    foot(settings, adapters)


def head(demo: data.Demo) -> None:
    title, action = st.columns([8, 1], vertical_alignment="bottom")
    with title:
        st.title("pedro", anchor=False)
        measured = f" Measured {demo.created.replace('T', ' ').replace('Z', ' UTC')}." if demo.created else ""
        st.caption(f"One frozen backbone, many tenants, one tiny adapter each.{measured}")
    if action.button("Reload", icon=":material/refresh:", width="stretch"):
        st.cache_data.clear()
        st.rerun()


def troubles(demo: data.Demo, adapters: registry.Adapters) -> None:
    """What is missing or broken, and what to do about it."""
    if adapters.problem:
        st.warning(f"The registry cannot be read.\n\n```\n{adapters.problem}\n```", icon=":material/database_off:")
    if demo.problems:
        listed = "\n".join(demo.problems)
        st.warning(
            f"Parts of `{demo.path}` cannot be read and are left out; `make demo` writes it anew."
            f"\n\n```\n{listed}\n```",
            icon=":material/broken_image:",
        )
    if not demo.exists:
        st.info(
            f"No demo result yet: `{demo.path}` does not exist. `make demo` trains three tenants' adapters, serves "
            "them, measures them and writes it.",
            icon=":material/play_circle:",
        )


def figures(tenants: Sequence[data.TenantResult], swapped: data.SwapResult | None) -> None:
    """The result in four numbers."""
    backbone, adapted = data.mean_accuracy(tenants)
    numbers = st.columns(4)
    number(numbers[0], "Adapters on one backbone", f"{len(tenants)}", "one a tenant")
    gain = f"{100 * (adapted - backbone):+.1f} points over the backbone"
    numbers[1].metric("Mean accuracy with adapter", f"{adapted:.1%}", gain, border=True, height="stretch")
    sizes = sorted({tenant.trainable_parameters for tenant in tenants})
    largest = f" to {sizes[-1]:,}" if len(sizes) > 1 else ""
    number(numbers[2], "Trained parameters", f"{sizes[0]:,}{largest}", "an adapter; the backbone stays frozen")
    if swapped is None:
        number(numbers[3], "Requests lost in a hot swap", "–", "not measured")
    else:
        lost = f"{swapped.failed + swapped.mixed:,}"
        number(numbers[3], "Requests lost in a hot swap", lost, f"of {swapped.requests:,} while the alias moved")


def accuracy(demo: data.Demo) -> None:
    st.subheader("Accuracy", anchor=False)
    if not demo.tenants:
        st.caption("Appears when the demo has measured its adapters: `make demo`.")
        return
    frame = pd.DataFrame(data.accuracy_rows(demo.tenants))
    base = alt.Chart(frame).encode(
        x=alt.X("adapter:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, labelLimit=160)),
        xOffset=alt.XOffset("answers:N", sort=list(ANSWERS)),
        y=alt.Y("accuracy:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", tickCount=5)),
        tooltip=[
            alt.Tooltip("adapter:N"),
            alt.Tooltip("title:N", title="task"),
            alt.Tooltip("answers:N"),
            alt.Tooltip("accuracy:Q", format=".1%"),
            alt.Tooltip("rows:Q", title="test rows", format=","),
        ],
    )
    bars = base.mark_bar(cornerRadiusTopLeft=3, cornerRadiusTopRight=3).encode(
        color=alt.Color(
            "answers:N",
            sort=list(ANSWERS),
            scale=alt.Scale(domain=list(ANSWERS), range=list(ANSWERS.values())),
            legend=alt.Legend(title=None, orient="top"),
        )
    )
    values = base.mark_text(dy=-7, fontSize=12, color=INK).encode(text=alt.Text("accuracy:Q", format=".0%"))
    st.altair_chart((bars + values).properties(height=360), width="stretch")
    rows = ", ".join(f"{tenant.name} {tenant.test_rows:,}" for tenant in demo.tenants)
    st.caption(f"Share of held-out rows answered exactly, from the prompt alone, over HTTP. Rows: {rows}.")


def curves(settings: Settings, versions: Sequence[Version]) -> None:
    st.subheader("Learning curves", anchor=False)
    if not versions:
        st.caption("Appear when an adapter has been trained: `make demo`, or `pedro submit SPEC.yaml`.")
        return
    by_ref = {version.ref: version for version in versions}
    chosen = st.multiselect(
        "Versions", list(by_ref), default=[version.ref for version in registry.newest_and_champions(versions)]
    )
    points = pd.DataFrame(
        read_curves(settings, [by_ref[ref] for ref in chosen]), columns=["adapter", "metric", "step", "value"]
    )
    logged = [metric for metric in registry.CURVES if metric in set(points["metric"])]
    if not logged:
        st.caption("The runs of these versions logged no curves." if chosen else "Choose a version.")
        return
    metric = st.segmented_control(
        "Curve", logged, default=logged[0], format_func=registry.CURVES.__getitem__, label_visibility="collapsed"
    )
    metric = metric or logged[0]
    frame = points[points["metric"] == metric]
    refs = [ref for ref in chosen if ref in set(frame["adapter"])]
    legend = alt.Legend(title=None, orient="top", columns=3, labelLimit=220, symbolType="stroke", symbolStrokeWidth=3)
    line = (
        alt.Chart(frame)
        .mark_line(strokeWidth=2.5, interpolate="monotone", point=alt.OverlayMarkDef(size=28))
        .encode(
            x=alt.X("step:Q", title="step", axis=alt.Axis(tickMinStep=1, tickCount=7, grid=False)),
            y=alt.Y("value:Q", title=None, scale=alt.Scale(zero=False)),
            color=alt.Color("adapter:N", scale=alt.Scale(domain=refs, range=SERIES), sort=refs, legend=legend),
            strokeDash=alt.StrokeDash(
                "adapter:N", scale=alt.Scale(domain=refs, range=DASHES), sort=refs, legend=legend
            ),
            tooltip=[
                alt.Tooltip("adapter:N"),
                alt.Tooltip("step:Q", format=","),
                alt.Tooltip("value:Q", title=registry.CURVES[metric], format=",.4~g"),
            ],
        )
    )
    st.altair_chart(line.properties(height=285), width="stretch")


def table(adapters: registry.Adapters) -> None:
    st.subheader("Adapters", anchor=False)
    if not adapters.versions:
        if adapters.problem is None:
            st.caption(
                "The registry holds no adapters yet. `make demo` trains three; `pedro submit SPEC.yaml` trains yours."
            )
        return
    tenants = sorted({version.tenant for version in adapters.versions})
    kept = set(st.pills("Tenants", tenants, selection_mode="multi", label_visibility="collapsed") or tenants)
    rows = registry.adapter_rows(version for version in adapters.versions if version.tenant in kept)
    st.dataframe(
        pd.DataFrame(rows),
        hide_index=True,
        width="stretch",
        column_config={
            "tenant": st.column_config.TextColumn("Tenant"),
            "adapter": st.column_config.TextColumn("Adapter"),
            "version": st.column_config.NumberColumn("Version", format="v%d", width="small"),
            "aliases": st.column_config.ListColumn("Aliases"),
            "method": st.column_config.TextColumn("Method"),
            "digest": st.column_config.TextColumn("Digest", help="The first 12 digits of the weights' sha256"),
            "parameters": st.column_config.NumberColumn("Trained parameters", format="localized"),
            "accuracy": st.column_config.ProgressColumn("Accuracy", min_value=0, max_value=1, format="percent"),
            "backbone": st.column_config.TextColumn("Backbone"),
            "created": st.column_config.DatetimeColumn("Registered (UTC)", format="YYYY-MM-DD HH:mm"),
        },
    )


def swap(demo: data.Demo) -> None:
    st.subheader("Hot swap", anchor=False)
    seen = demo.swap
    if seen is None:
        st.caption("Appears when the demo has moved an alias under load: `make demo`.")
        return
    st.caption(
        f"The champion of `{seen.model}` moved from v{seen.old_version} to v{seen.new_version} under load. Each "
        "request is answered by one version, from its first token to its last."
    )
    facts = st.columns(4)
    number(facts[0], "Requests", f"{seen.requests:,}", f"{seen.in_flight} in flight at the switch")
    number(facts[1], "Failed", f"{seen.failed:,}", f"{seen.mixed:,} answered by two versions")
    first = "–" if seen.seconds_to_first_new is None else f"{seen.seconds_to_first_new:.2f} s"
    number(facts[2], "First answer by the new version", first, "after the alias moved")
    if seen.old_accuracy is None or seen.new_accuracy is None:
        number(facts[3], "Accuracy after", "–", "not measured")
    else:
        gain = f"{100 * (seen.new_accuracy - seen.old_accuracy):+.1f} points over v{seen.old_version}"
        facts[3].metric("Accuracy after", f"{seen.new_accuracy:.1%}", gain, border=True, height="stretch")
    frame = pd.DataFrame(
        [
            {
                "version": f"v{seen.old_version}, old: {seen.answered_by_old:,}",
                "answers": seen.answered_by_old,
                "order": 0,
            },
            {
                "version": f"v{seen.new_version}, new: {seen.answered_by_new:,}",
                "answers": seen.answered_by_new,
                "order": 1,
            },
        ]
    )
    bar = (
        alt.Chart(frame)
        .mark_bar(height=26)
        .encode(
            x=alt.X(
                "answers:Q",
                title="requests answered",
                scale=alt.Scale(domain=[0, max(1, seen.answered_by_old + seen.answered_by_new)], nice=False),
                axis=alt.Axis(tickCount=6, grid=False, format=",d", titlePadding=4),
            ),
            order="order:Q",
            color=alt.Color(
                "version:N",
                sort=list(frame["version"]),
                scale=alt.Scale(domain=list(frame["version"]), range=["#E69F00", "#0072B2"]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=[alt.Tooltip("version:N"), alt.Tooltip("answers:Q", format=",d")],
        )
    )
    st.altair_chart(bar.properties(height=130), width="stretch")


def foot(settings: Settings, adapters: registry.Adapters) -> None:
    st.divider()
    st.caption(f"Home `{settings.home}` · registry `{adapters.source}` · read again every {REFRESH_S} s on use.")


if __name__ == "__main__":
    page()
