"""Draws lines over time in UTC: broken and shaded where nothing was observed, with marks for what happened."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import NamedTuple

import altair as alt
import pandas as pd

from drawing import DASHES, GREY, INK, PINK, SKY, VERMILION, show_chart

EVENTS = {"Swap": VERMILION, "Eviction": SKY, "429": GREY, "Failed load": PINK}
HEIGHT = 230


class Shown(NamedTuple):
    """The time that charts show: from, to, and the parts of it that nobody observed."""

    start: float
    end: float
    gaps: list[tuple[float, float]]

    @property
    def observed(self) -> bool:
        """Whether any of it was."""
        return not (self.gaps and self.gaps[0][0] <= self.start and self.gaps[0][1] >= self.end)


def draw(
    rows: pd.DataFrame,
    by: str,
    colours: dict[str, str],
    happened: pd.DataFrame,
    shown: Shown,
    title: str,
    form: str,
    *,
    points: bool = False,
) -> None:
    """Lines over time in UTC, broken where nothing was observed, and the marks of what happened behind them."""
    names = list(colours)
    broken = [{"at": (begun + ended) / 2, by: name, "value": None} for begun, ended in shown.gaps for name in names]
    rows = pd.concat([rows, pd.DataFrame(broken, columns=["at", by, "value"])]) if broken else rows
    rows = rows.astype({"value": float}).assign(when=rows["at"].map(clock), at=moments(rows["at"]))
    legend = alt.Legend(
        title=None, orient="bottom", columns=2, labelLimit=180, symbolType="stroke", symbolStrokeWidth=3
    )
    dashes = [DASHES[index % len(DASHES)] for index in range(len(names))]
    ends = [1000 * shown.start, 1000 * shown.end]
    x = alt.X(
        "at:T",
        title=None,
        scale=alt.Scale(type="utc", domain=ends, nice=False),
        axis=alt.Axis(grid=False, tickCount=5, format="%H:%M"),
    )
    lines = (
        alt.Chart(rows)
        .mark_line(
            strokeWidth=2,
            interpolate="step-before",
            point=alt.OverlayMarkDef(size=18) if points or rows["at"].nunique() == 1 else False,
        )
        .encode(
            x=x,
            y=alt.Y("value:Q", title=title, scale=alt.Scale(zero=True), axis=alt.Axis(tickCount=4, format=",.2~f")),
            color=alt.Color(
                f"{by}:N", sort=names, legend=legend, scale=alt.Scale(domain=names, range=list(colours.values()))
            ),
            strokeDash=alt.StrokeDash(
                f"{by}:N", sort=names, legend=legend, scale=alt.Scale(domain=names, range=dashes)
            ),
            tooltip=[
                alt.Tooltip(f"{by}:N"),
                alt.Tooltip("when:N", title="UTC"),
                alt.Tooltip("value:Q", format=form),
            ],
        )
    )
    layers = [*unobserved(shown, x), *event_marks(happened), lines]
    show_chart(alt.layer(*layers).properties(height=HEIGHT))


def unobserved(shown: Shown, x: alt.X) -> list[alt.Chart]:
    """Grey where nobody looked; without such a time a band of no width, since Vega draws lines alone at one moment."""
    bands = pd.DataFrame(
        {"at": 1000 * begun, "to": 1000 * ended, "text": f"not observed, {clock(begun)} to {clock(ended)}"}
        for begun, ended in shown.gaps or [(shown.end, shown.end)]
    )
    band = alt.Chart(bands).mark_rect(color=INK, opacity=0.16)
    return [band.encode(x=x, x2=alt.X2("to:T"), tooltip=alt.Tooltip("text:N", title="UTC"))]


def event_marks(happened: pd.DataFrame) -> list[alt.Chart]:
    """Upright lines: one for each moment, by kind."""
    marks = []
    for event, colour in EVENTS.items():
        kind = happened[happened["event"] == event]
        if len(kind):
            marks.append(
                alt.Chart(kind.assign(when=kind["at"].map(clock), at=moments(kind["at"])))
                .mark_rule(color=colour, strokeWidth=2, opacity=0.8, strokeDash=[1, 0] if event == "Swap" else [2, 3])
                .encode(
                    x=alt.X("at:T"),
                    tooltip=[alt.Tooltip("event:N"), alt.Tooltip("text:N"), alt.Tooltip("when:N", title="UTC")],
                )
            )
    return marks


def moments(seconds: pd.Series) -> pd.Series:
    """As a browser counts time."""
    return seconds * 1000


def clock(seconds: float) -> str:
    """A moment of the day in UTC, as every time on this page."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%H:%M:%S")
