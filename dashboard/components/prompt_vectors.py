"""Draws, layer by layer, the vectors that an adapter generates from typed prompts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import altair as alt
import numpy as np
import pandas as pd
import streamlit as st

import connection
from drawing import INK, SERIES, colours, show_chart
from pedro.errors import PedroError
from sources import vectors
from sources.view import without_places

if TYPE_CHECKING:
    from pedro.registry import Version

MOST_PROMPTS = 6
PROMPTS = "play some jazz music\nwhat is the weather like tomorrow\nbook a table for two at eight"
CHAT, RAW = "As a chat message", "As it stands"
READ = "prompts_read"  # in the session: of which version, what the prompts are called, what they gave
SPREAD = ("low", "p5", "p25", "p50", "p75", "p95", "high")

load_reader = st.cache_resource(show_spinner="Loading the adapter on its backbone …", max_entries=4)(
    vectors.VectorReader
)


def section(version: Version, directory: Path) -> None:
    """The vectors of typed prompts, from the adapter on its backbone."""
    st.header("Vectors of your prompts", anchor=False)
    with st.form("prompts"):
        text = st.text_area("Prompts, one a line", PROMPTS, height=110, max_chars=vectors.LONGEST * MOST_PROMPTS)
        shape, go = st.columns([3, 2], vertical_alignment="bottom")
        how = shape.radio("Read each", (CHAT, RAW), horizontal=True)
        pressed = go.form_submit_button(
            "Make the vectors", icon=":material/play_arrow:", type="primary", width="stretch"
        )
    st.caption(
        f"Runs {version.ref} on its backbone {version.backbone_id} in the dashboard's own process, on the CPU: the "
        "first time loads both."
    )
    if pressed:
        read_prompts(version, directory, [line.strip() for line in text.splitlines() if line.strip()], how == CHAT)
    ref, names, readings = st.session_state.get(READ, ("", [], []))
    if ref == version.ref:
        show(names, readings)


def inputs_seen(ref: str) -> tuple[float, float] | None:
    """From where to where the x lay that the prompts gave to this version's activations; None before there were any."""
    of, _, readings = st.session_state.get(READ, ("", [], []))
    if of != ref:
        return None
    given = np.concatenate([values for reading in readings for values in reading.inputs.values()])
    return float(given.min()), float(given.max())


def read_prompts(version: Version, directory: Path, lines: list[str], chat: bool) -> None:
    """Read the prompts and keep what came of them for this session; the page is drawn again with their band."""
    if not lines:
        st.warning("Type a prompt.", icon=":material/edit:")
        return
    if len(lines) > MOST_PROMPTS:
        st.toast(f"Only the first {MOST_PROMPTS} prompts are read.", icon=":material/format_list_numbered:")
    texts = list(dict.fromkeys(line[: vectors.LONGEST] for line in lines))[:MOST_PROMPTS]
    try:
        reader = load_reader(directory)
        with st.spinner("Reading the prompts …"):
            readings = [reader.read(text, chat=chat) for text in texts]
    except PedroError as error:
        st.error(without_places(connection.settings(), error.message), icon=":material/error:")
        return
    except Exception as error:  # noqa: BLE001 (a backbone may fail in as many ways as PyTorch has)
        st.error(f"{version.ref} could not read them ({type(error).__name__}).", icon=":material/error:")
        return
    names = [f"{number}. {text[:40]}" for number, text in enumerate(texts, start=1)]
    st.session_state[READ] = (version.ref, names, readings)
    st.rerun()


def show(names: list[str], readings: list[vectors.PromptVectors]) -> None:
    """Where the vectors' values lie, layer by layer, and how much of that the prompt decides."""
    spread = pd.DataFrame(vectors.spread_rows(readings, names))
    targets = list(dict.fromkeys(spread["target"]))
    for column, target in zip(st.columns(len(targets), gap="medium"), targets, strict=True):
        base = alt.Chart(spread[spread["target"] == target]).encode(
            x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
            xOffset=alt.XOffset("prompt:N", sort=names),
            color=alt.Color("prompt:N", sort=names, scale=alt.Scale(domain=names, range=SERIES), legend=None),
            tooltip=[
                alt.Tooltip("prompt:N"),
                alt.Tooltip("layer:O"),
                *(alt.Tooltip(f"{at}:Q", format=".3f") for at in SPREAD),
            ],
        )
        whiskers = base.mark_rule(strokeWidth=1.5).encode(
            y=alt.Y("p5:Q", title=None, scale=alt.Scale(zero=False)), y2=alt.Y2("p95:Q")
        )
        boxes = base.mark_bar(size=7).encode(y=alt.Y("p25:Q"), y2=alt.Y2("p75:Q"))
        ones = alt.Chart(pd.DataFrame([{"one": 1.0}])).mark_rule(color=INK, strokeDash=[4, 4]).encode(y=alt.Y("one:Q"))
        with column:
            st.subheader(target, anchor=False)
            show_chart((ones + whiskers + boxes).properties(height=260))
    st.caption("Boxes: the middle half of a vector's values; lines: 5 % to 95 %. At 1, the dashes, nothing changes.")
    numbers = sorted(readings[0].vectors)
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader("One vector", anchor=False)
        a, b = st.columns(2)
        layer = a.selectbox("Layer", numbers, index=len(numbers) // 2, key="vector_layer")
        target = b.selectbox("Vector", list(readings[0].vectors[layer]), format_func=vectors.NAMES.__getitem__)
        counted = pd.DataFrame(vectors.histogram_rows(readings, names, layer, target))
        steps = (
            alt.Chart(counted)
            .mark_line(interpolate="step-after", strokeWidth=2)
            .encode(
                x=alt.X("left:Q", title="value", scale=alt.Scale(zero=False)),
                y=alt.Y("share:Q", title="share of its values", axis=alt.Axis(format=".0%")),
                color=colours("prompt", names, columns=1),
                tooltip=[
                    alt.Tooltip("prompt:N"),
                    alt.Tooltip("left:Q", format=".3f"),
                    alt.Tooltip("share:Q", format=".1%"),
                ],
            )
        )
        show_chart(steps.properties(height=300))
    with right:
        st.subheader("What the prompt decides", anchor=False)
        if len(readings) < 2:
            st.caption("Give two prompts or more.")
            return
        st.dataframe(
            pd.DataFrame(vectors.dependence_rows(readings)),
            hide_index=True,
            width="stretch",
            height=340,
            column_config={
                "layer": st.column_config.NumberColumn("Layer", width="small"),
                "target": st.column_config.TextColumn("Vector"),
                "from_one": st.column_config.NumberColumn("Distance from 1", format="%.4f"),
                "between_prompts": st.column_config.NumberColumn("Between prompts", format="%.4f"),
            },
        )
        st.caption("Root mean squares. The first layer sees no context: its vectors differ only if the last tokens do.")
