"""Demo: what `make demo` measured, adapters against their backbone and a swap under load. Only where it ran."""

from __future__ import annotations

from collections.abc import Sequence

import altair as alt
import pandas as pd
import streamlit as st

import connection
from drawing import BLUE, GREEN, GREY, INK, ORANGE, number, show_chart
from sources import demo as data

REFRESH_S = 10
ANSWERS = {"Majority class": ORANGE, "Backbone alone": GREY, "Backbone with examples": GREEN, "With adapter": BLUE}

read_demo = st.cache_resource(ttl=REFRESH_S, show_spinner=False)(data.read_demo)


def page() -> None:
    settings = connection.settings()
    st.title("Demo", anchor=False)
    demo = read_demo(settings.home)
    if demo.problems:
        listed = "\n".join(demo.problems)
        st.warning(
            f"Parts of `{demo.path}` cannot be read and are left out; `make demo` rewrites it.\n\n```\n{listed}\n```",
            icon=":material/broken_image:",
        )
    if demo.created:
        st.caption(f"Measured {demo.created.replace('T', ' ').replace('Z', ' UTC')}.")
    if demo.tenants:
        figures(demo.tenants, demo.swap)
        left, right = st.columns(2, gap="large")
        with left:
            scores(demo)
        with right:
            swap(demo)
    else:
        swap(demo)


def figures(tenants: Sequence[data.TenantResult], swapped: data.SwapResult | None) -> None:
    """The result in four numbers."""
    backbone, adapted = data.mean_score(tenants)
    numbers = st.columns(4)
    number(numbers[0], "Adapters on one backbone", f"{len(tenants)}", "one a tenant")
    gain = f"{100 * (adapted - backbone):+.1f} points over the backbone"
    numbers[1].metric("Mean score with adapter", f"{adapted:.1%}", gain, border=True, height="stretch")
    sizes = sorted({tenant.trainable_parameters for tenant in tenants})
    largest = f" to {sizes[-1]:,}" if len(sizes) > 1 else ""
    number(numbers[2], "Trained parameters", f"{sizes[0]:,}{largest}", "an adapter; the backbone stays frozen")
    if swapped is None:
        number(numbers[3], "Requests lost in a hot swap", "–", "not measured")
    else:
        lost = f"{swapped.failed + swapped.mixed:,}"
        number(numbers[3], "Requests lost in a hot swap", lost, f"of {swapped.requests:,} while the alias moved")


def scores(demo: data.DemoResult) -> None:
    st.markdown("**Score**")
    frame = pd.DataFrame(data.score_rows(demo.tenants))
    base = alt.Chart(frame).encode(
        x=alt.X("adapter:N", title=None, sort=None, axis=alt.Axis(labelAngle=0, labelLimit=160)),
        xOffset=alt.XOffset("answers:N", sort=list(ANSWERS)),
        y=alt.Y("score:Q", title=None, scale=alt.Scale(domain=[0, 1]), axis=alt.Axis(format=".0%", tickCount=5)),
        tooltip=[
            alt.Tooltip("adapter:N"),
            alt.Tooltip("title:N", title="task"),
            alt.Tooltip("answers:N"),
            alt.Tooltip("metric:N"),
            alt.Tooltip("score:Q", format=".1%"),
            alt.Tooltip("rows:Q", title="test rows", format=","),
        ],
    )
    bars = base.mark_bar(cornerRadiusTopLeft=3, cornerRadiusTopRight=3).encode(
        color=alt.Color(
            "answers:N",
            sort=list(ANSWERS),
            scale=alt.Scale(domain=list(ANSWERS), range=list(ANSWERS.values())),
            legend=alt.Legend(title=None, orient="top", columns=2, labelLimit=240),
        )
    )
    values = base.mark_text(dy=-7, fontSize=12, color=INK).encode(text=alt.Text("score:Q", format=".0%"))
    show_chart((bars + values).properties(height=300))
    rows = ", ".join(f"{tenant.name} {tenant.test_rows:,} by {tenant.metric}" for tenant in demo.tenants)
    st.caption(f"Held-out rows, from the prompt alone, over HTTP: {rows}.")


def swap(demo: data.DemoResult) -> None:
    st.markdown("**Hot swap**")
    seen = demo.swap
    if seen is None:
        st.caption("Appears when the demo has moved an alias under load: `make demo`.")
        return
    st.caption(
        f"The champion of `{seen.model}` moved from v{seen.old_version} to v{seen.new_version} under load. Each "
        "request is answered by one version, from its first token to its last."
    )
    facts = [*st.columns(2), *st.columns(2)]
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
            order=alt.Order("order:Q"),
            color=alt.Color(
                "version:N",
                sort=list(frame["version"]),
                scale=alt.Scale(domain=list(frame["version"]), range=["#E69F00", "#0072B2"]),
                legend=alt.Legend(title=None, orient="top"),
            ),
            tooltip=[alt.Tooltip("version:N"), alt.Tooltip("answers:Q", format=",d")],
        )
    )
    show_chart(bar.properties(height=130))


if __name__ == "__main__":
    page()
