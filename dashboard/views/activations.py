"""Activations: what each layer's R(x) became (the paper's figure 2), and the vectors it makes of typed prompts.

The curves are computed from the adapter's files alone; only prompts need PyTorch and the backbone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import altair as alt
import pandas as pd
import streamlit as st

import connection
from components import prompt_vectors, shared_url
from components.catalog import catalog_or_notice, read_stored, read_versions, select_version
from drawing import DASHES, GREY, INK, SERIES, VERMILION, show_chart
from pedro.errors import PedroError
from pedro.registry import CHAMPION, Version
from sources import activations as data

if TYPE_CHECKING:
    import numpy as np

    from pedro.config import Settings

START = VERMILION  # the colour of the fit that training starts from
COLOURS = [colour for colour in SERIES if colour not in (GREY, START)]
MOST_LAYERS = len(COLOURS)
NONE = "none"

read_activations = st.cache_data(show_spinner=False, max_entries=200)(data.read_activations)
Orders = tuple[int, int]
InputRange = tuple[float, float] | None  # the x that typed prompts gave to R: from, to


class Chosen(NamedTuple):
    """An adapter version that has activations."""

    version: Version
    directory: Path
    activations: data.Activations

    @property
    def ref(self) -> str:
        return self.version.ref


def page() -> None:
    settings = connection.settings()
    st.title("Activations", anchor=False)
    st.caption(
        "PEDRO makes its vectors by l = R(pool(x) W_down) W_up + b, with a rational R(x) that each layer learns from "
        "its start, a fit of GELU (arXiv 2409.17834, eq. 6 and 7)."
    )
    names = [row.name for row in catalog_or_notice(settings).rows]
    if not names:
        return
    columns = st.columns([3, 2, 3, 2])
    one = choose(settings, columns[:2], names, "Adapter", "adapter")
    other = choose(settings, columns[2:], [NONE, *names], "Compared with", "other")
    if one is None:
        return
    seen = prompt_vectors.inputs_seen(one.ref)
    functions(one, other, seen)
    apart(one, other)
    prompt_vectors.section(one.version, one.directory)


def choose(settings: Settings, columns: Sequence[Any], names: list[str], label: str, key: str) -> Chosen | None:
    """An adapter and one of its versions; None where there are no activations to show, which is said."""
    known = shared_url.check(key, names, "Adapter", "Choose one of those below.")
    name = columns[0].selectbox(label, names, index=0 if known else None, key=key, bind="query-params")
    if name is None or name == NONE:
        return None
    adapter = read_versions(settings, name)
    if not adapter.versions:
        st.warning(f"{name} has no version that can be read. {adapter.problem}", icon=":material/broken_image:")
        return None
    champion = adapter.holding(CHAMPION) or adapter.versions[0]
    version = select_version(columns[1], adapter, champion, short_label, f"{key}_version_{name}")
    stored = read_stored(settings, version)
    if stored.directory is None:
        st.warning(f"{version.ref} cannot be read: {stored.problem}", icon=":material/broken_image:")
        return None
    try:
        return Chosen(version, stored.directory, read_activations(stored.directory))
    except PedroError as error:
        st.info(f"{version.ref} has no activations to show: {error.message}.", icon=":material/show_chart:")
        return None


def short_label(version: Version) -> str:
    return " ".join([f"v{version.version}", *version.aliases])


def functions(one: Chosen, other: Chosen | None, seen: InputRange) -> None:
    """Figure 2: R(x) over GELU and its fit, and what training moved."""
    numbers = [layer.index for layer in one.activations.layers]
    picked, width = st.columns([3, 2])
    shown = picked.multiselect(
        "Layers",
        numbers,
        default=sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}),
        max_selections=MOST_LAYERS,
        key=f"layers_{one.ref}",
    )
    reach = float(width.slider("Range of x", 1, 10, 5, format="±%d"))
    area = st.empty()
    orders = data.learned_orders(layer for chosen in filter(None, (one, other)) for layer in chosen.activations.layers)
    if not one.activations.learned:
        st.caption(f"{one.ref} has fixed activations: none of them was learned.")
    if any(data.known_initial(m, n) is None for m, n in orders):  # the curves need not wait for PyTorch
        with area.container():
            draw(one, other, shown, reach, None, seen)
        with st.spinner("Fitting GELU, for the start of R(x) …"):
            for m, n in orders:
                data.initial(m, n)
    with area.container():
        draw(one, other, shown, reach, orders, seen)


def draw(
    one: Chosen,
    other: Chosen | None,
    shown: Sequence[int],
    reach: float,
    orders: Sequence[Orders] | None,
    seen: InputRange,
) -> None:
    """The two charts side by side; `orders` are those of the initial fits, None while they are not known."""
    x = data.grid(reach)
    curves: dict[str, Curve] = {"GELU": Curve(data.gelu, GREY, DASHES[0])}
    for m, n in orders or ():
        name = "initial fit" if len(orders or ()) == 1 else f"initial fit of orders ({m}, {n})"
        curves[name] = Curve(data.initial(m, n), START, DASHES[2])
    chosen_layers: dict[str, tuple[data.LayerActivation, str, list[int]]] = {}
    for index, chosen in enumerate(filter(None, (one, other))):
        by_index = {layer.index: layer for layer in chosen.activations.layers}
        for colour, layer in zip(COLOURS, sorted(shown), strict=False):
            if layer in by_index:
                name = f"layer {layer}" if other is None else f"layer {layer}, {chosen.ref}"
                chosen_layers[name] = (by_index[layer], colour, DASHES[index])
    curves |= {name: Curve(*look) for name, look in chosen_layers.items()}
    known = [one.activations.inputs[layer] for layer in shown if layer in one.activations.inputs]
    shade = data.shade_rows(known, reach)
    if not shade and seen is not None:
        shade = [{"low": max(seen[0], -reach), "high": min(seen[1], reach), "density": 0.4}]
    left, right = st.columns(2, gap="medium")
    with left:
        st.subheader("R(x) over GELU", anchor=False)
        show_chart(lines(curves, x, "R(x)", reach, shade))
    with right:
        st.subheader("What training moved", anchor=False)
        if orders is None:
            st.caption("R(x) minus its initial fit of GELU.")
        elif not orders:
            st.caption("Nothing.")
        elif not shown:
            st.caption("Choose a layer.")
        else:
            moved = {
                name: Curve(data.moved(layer), colour, dash) for name, (layer, colour, dash) in chosen_layers.items()
            }
            show_chart(lines(moved, x, "R(x) − fit", reach, shade))
    if known:
        low, high = min(given.low for given in known), max(given.high for given in known)
        st.caption(
            f"Grey: where the x of these layers of {one.ref} lay for the rows on which training scored it, "
            f"{low:.2g} to {high:.2g}; the darker, the more of them."
        )
    elif seen is not None:
        st.caption(f"Grey: where the x of your prompts lay, {seen[0]:.2g} to {seen[1]:.2g}.")


class Curve(NamedTuple):
    """A function and how its line looks."""

    function: Callable[[np.ndarray], np.ndarray]
    colour: str
    dash: list[int]


def lines(curves: dict[str, Curve], x: np.ndarray, title: str, reach: float, shade: list[dict[str, float]]) -> Any:
    """The curves, and behind them where the x lay that R was given."""
    frame = pd.DataFrame(data.curve_rows({name: curve.function for name, curve in curves.items()}, x))
    names = list(curves)
    legend = alt.Legend(
        title=None, orient="bottom", columns=2, labelLimit=260, symbolType="stroke", symbolStrokeWidth=3
    )
    chart = (
        alt.Chart(frame)
        .mark_line(strokeWidth=2.2)
        .encode(
            x=alt.X("x:Q", title="x", scale=alt.Scale(domain=[-reach, reach]), axis=alt.Axis(grid=False)),
            y=alt.Y("y:Q", title=title),
            color=alt.Color(
                "curve:N", sort=names, legend=legend,
                scale=alt.Scale(domain=names, range=[curve.colour for curve in curves.values()]),
            ),
            strokeDash=alt.StrokeDash(
                "curve:N", sort=names, legend=legend,
                scale=alt.Scale(domain=names, range=[curve.dash for curve in curves.values()]),
            ),
            tooltip=[alt.Tooltip("curve:N"), alt.Tooltip("x:Q", format=".2f"), alt.Tooltip("y:Q", format=".4f")],
        )
    )  # fmt: skip
    if not shade:
        return alt.layer(chart).properties(height=340)
    opacity = alt.Opacity("density:Q", scale=alt.Scale(domain=[0, 1], range=[0.02, 0.35]), legend=None)
    behind = (
        alt.Chart(pd.DataFrame(shade))
        .mark_rect(color=INK)
        .encode(x=alt.X("low:Q"), x2=alt.X2("high:Q"), opacity=opacity)
    )
    return alt.layer(behind, chart).properties(height=340)


def apart(one: Chosen, other: Chosen | None) -> None:
    """How far layers lie from each other, and from where they began."""
    left, right = st.columns(2, gap="medium")
    against = one if other is None else other
    with left:
        st.subheader("Between layers" if other is None else f"{one.ref} against {other.ref}", anchor=False)
        rows = pd.DataFrame(data.distance_rows(one.activations, against.activations))
        base = alt.Chart(rows).encode(
            x=alt.X("other:O", title=f"layer of {against.ref}", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("layer:O", title=f"layer of {one.ref}"),
            tooltip=[alt.Tooltip("layer:O"), alt.Tooltip("other:O"), alt.Tooltip("distance:Q", format=".4f")],
        )
        cells = base.mark_rect().encode(
            color=alt.Color(
                "distance:Q", scale=alt.Scale(scheme="cividis"), legend=alt.Legend(title=None, format=".2g")
            )
        )
        chart = cells
        if len(rows) <= 64:
            middle = float(rows["distance"].max()) / 2
            chart = cells + base.mark_text(fontSize=11).encode(
                text=alt.Text("distance:Q", format=".2f"),
                color=alt.condition(f"datum.distance > {middle}", alt.value("black"), alt.value("white")),
            )
        show_chart(chart.properties(height=300))
    with right:
        st.subheader("From the start", anchor=False)
        if not one.activations.learned:
            st.caption("None of these activations was learned.")
        else:
            began = pd.DataFrame(
                [
                    {
                        "adapter": chosen.ref,
                        "layer": layer.index,
                        "distance": data.distance(
                            layer, data.start_of(layer), chosen.activations.inputs.get(layer.index)
                        ),
                    }
                    for chosen in filter(None, (one, other))
                    for layer in chosen.activations.layers
                ]
            )
            refs = list(dict.fromkeys(began["adapter"]))
            bars = (
                alt.Chart(began)
                .mark_bar(cornerRadiusTopLeft=2, cornerRadiusTopRight=2)
                .encode(
                    x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0)),
                    xOffset=alt.XOffset("adapter:N", sort=refs),
                    y=alt.Y("distance:Q", title=None),
                    color=alt.Color(
                        "adapter:N",
                        sort=refs,
                        scale=alt.Scale(domain=refs, range=COLOURS),
                        legend=alt.Legend(title=None, orient="top", labelLimit=260),
                    ),
                    tooltip=[alt.Tooltip("adapter:N"), alt.Tooltip("layer:O"), alt.Tooltip("distance:Q", format=".4f")],
                )
            )
            show_chart(bars.properties(height=300))
    where = [f"for x in ±{data.REACH:g}", f"where the x of each layer of {one.ref} lay for the rows that were scored"]
    st.caption(f"Root mean square of the difference, {where[bool(one.activations.inputs)]}.")


if __name__ == "__main__":
    page()
