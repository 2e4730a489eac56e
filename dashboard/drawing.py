"""What every page draws with: the palette and small shared pieces. Knows nothing of where numbers come from."""

from __future__ import annotations

import altair as alt
from streamlit.delta_generator import DeltaGenerator

# Okabe and Ito's palette, told apart by colour-blind readers too; series are told apart by dashes or shapes as well.
BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY = (
    "#0072B2",
    "#E69F00",
    "#009E73",
    "#CC79A7",
    "#56B4E9",
    "#D55E00",
    "#999999",
)
SERIES = [BLUE, ORANGE, GREEN, PINK, SKY, VERMILION, GREY]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]]
INK = "#808495"  # readable on the light and on the dark page


def number(place: DeltaGenerator, label: str, value: str, note: str) -> None:
    """A figure with a plain note under it, as high as its neighbours."""
    place.metric(label, value, note, delta_color="off", delta_arrow="off", border=True, height="stretch")


def colours(field: str, names: list[str]) -> alt.Color:
    """A colour for each of the names of a field, with a legend above the chart."""
    wide = [SERIES[place % len(SERIES)] for place in range(len(names))]
    legend = alt.Legend(title=None, orient="top", columns=4, symbolType="stroke", symbolStrokeWidth=3, labelLimit=240)
    return alt.Color(f"{field}:N", sort=names, scale=alt.Scale(domain=names, range=wide), legend=legend)


def dashes(field: str, names: list[str]) -> alt.StrokeDash:
    """Another dash for each time round the palette, so that no two lines look alike."""
    wide = [DASHES[(place // len(SERIES) + place) % len(DASHES)] for place in range(len(names))]
    legend = alt.Legend(title=None, orient="top", columns=4, symbolType="stroke", symbolStrokeWidth=3, labelLimit=240)
    return alt.StrokeDash(f"{field}:N", sort=names, scale=alt.Scale(domain=names, range=wide), legend=legend)
