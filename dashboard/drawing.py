"""What every page draws with: palette, legends, metric tiles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import altair as alt
import streamlit as st

if TYPE_CHECKING:
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
CHECKED = False
"""Whether charts are held against Vega-Lite's schema, which takes longer than all else of drawing them. Tests do it."""
STYLE = """<style>
[data-testid="stMainBlockContainer"] {padding: 3.2rem clamp(1rem, 3.5vw, 4rem) 4rem;}
[data-testid="stMetricLabel"] *, [data-testid="stMetricDelta"], [data-testid="stMetricDelta"] *,
[data-testid="stMetricValue"], [data-testid="stMetricValue"] *, [data-testid="stPageLink"] * {
  white-space: normal !important; overflow: visible !important; text-overflow: clip !important;}
[data-testid="stMetricDelta"] {height: auto; max-width: 100%;}
@media (min-width: 641px) {
  [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"]:nth-child(6) [data-testid="stMetric"]) {
    flex-wrap: wrap;}
  [data-testid="stHorizontalBlock"]:has(> [data-testid="stColumn"]:nth-child(6) [data-testid="stMetric"]) >
  [data-testid="stColumn"] {min-width: calc(33% - 1rem);}
}
@media (max-width: 640px) {
  [data-testid="stMetricValue"] {font-size: 1.6rem;}
  [data-testid="stHorizontalBlock"]:not(:has([data-testid="stHorizontalBlock"])) >
  [data-testid="stColumn"]:has([data-testid="stMetric"]) {min-width: calc(50% - 0.5rem); flex: 1 1 calc(50% - 0.5rem);}
}
</style>"""
"""Less margin, and figures and links whose words wrap instead of ending in dots; of six figures three to a row, and on
a phone two, so that rows of figures are of an even number."""


def number(column: DeltaGenerator, label: str, value: str, note: str) -> None:
    """A figure with a plain note under it, as high as its neighbours."""
    column.metric(label, value, note, delta_color="off", delta_arrow="off", border=True, height="stretch")


def show_chart(chart: alt.TopLevelMixin) -> None:
    """A chart as wide as its place."""
    unchecked: Any = _Unchecked(chart)
    st.altair_chart(unchecked, width="stretch")


class _Unchecked:
    """A chart, as far as Streamlit asks one."""

    def __init__(self, chart: alt.TopLevelMixin) -> None:
        self._chart = chart

    def to_dict(self) -> dict[str, Any]:
        return self._chart.to_dict(validate=CHECKED)


def background_colour() -> str:
    """The page's background in the reader's theme."""
    return st.get_option(f"theme.{st.context.theme.type or 'light'}.backgroundColor") or "white"


def background_css() -> str:
    """The same in CSS, which follows a theme that changes while the page is open."""
    return "light-dark({}, {})".format(*(st.get_option(f"theme.{name}.backgroundColor") for name in ("light", "dark")))


def colours(field: str, names: list[str], columns: int = 3, *, lines: bool = True) -> alt.Color:
    """A colour for each of the names of a field, with a legend of `columns` columns above the chart."""
    palette = [SERIES[index % len(SERIES)] for index in range(len(names))]
    legend = _legend(columns) if lines else alt.Legend(title=None, orient="top", columns=columns, labelLimit=240)
    return alt.Color(f"{field}:N", sort=names, scale=alt.Scale(domain=names, range=palette), legend=legend)


def dashes(field: str, names: list[str]) -> alt.StrokeDash:
    """Dashes that are others each time round the palette, so that no two lines look alike."""
    patterns = [DASHES[(2 * (index // len(SERIES)) + index) % len(DASHES)] for index in range(len(names))]
    return alt.StrokeDash(f"{field}:N", sort=names, scale=alt.Scale(domain=names, range=patterns), legend=_legend())


def _legend(columns: int = 3) -> alt.Legend:
    """One legend for colours and dashes: equal ones are merged."""
    return alt.Legend(
        title=None,
        orient="top",
        columns=columns,
        symbolType="stroke",
        symbolStrokeWidth=3,
        symbolSize=250,
        symbolOpacity=1,
        labelLimit=240,
    )
