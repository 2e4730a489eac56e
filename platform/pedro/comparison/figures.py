"""A comparison in figures: every method with its interval, scores against budgets (the paper's figure 3), scores by
group, learned activations (its figure 2), Pareto fronts of two columns. Draws what others found; decides nothing.

matplotlib is imported where it is used, by its objects alone, so that nothing here depends on a display.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pedro.comparison.costs import front, metric, points_of
from pedro.comparison.result_model import BEST, JUDGE, RunResult, Selection, Table, TableEntry, position
from pedro.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

# Okabe and Ito: told apart by people who do not tell all colours apart. Yellow is left out: too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
PLAIN, STRONG, PALE = "#4D4D4D", "#0072B2", "0.85"
X = np.linspace(-5.0, 5.0, 401)
MIDDLE = 2.0  # the differences' axis is fitted to |x| up to here; beyond, where few inputs are, they may leave it
DPI = 150
ACROSS = 5  # panels beside each other
AT_MOST = 15  # runs whose activations are drawn
FEW_GROUPS = 12  # that one panel can hold
PanelCell = tuple[int, int]
"""Row and column of a panel."""
Panel = tuple[str, str]
"""Backbone and task."""


def draw_figures(tables: Sequence[Table], selection: Selection, folder: Path) -> None:
    """Every figure that applies, as a PNG in the folder."""
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a label is a dollar
        draw_table(tables, folder / "table.png")
        if len({table.budget for table in tables}) > 1:
            draw_budgets(tables, folder / "budget.png")
        if grouped(selection):
            draw_groups(selection, folder / "groups.png")
        if any(run.activations for run in selection.runs):
            draw_activations(selection, folder / "activations.png")


def draw_table(tables: Sequence[Table], path: Path) -> None:
    """A panel for each task: the methods' medians, intervals and single seeds; a dashed line at the majority rate."""
    cells: list[PanelCell] = []
    for table in tables:  # each begins a line of its own
        first = 1 + max((row for row, _ in cells), default=-1)
        cells += [(first + index // ACROSS, index % ACROSS) for index in range(len(table.columns))]
    tall = max(len(table.rows) for table in tables)
    figure, axes = _panels(cells, (2.9, 0.9 + 0.24 * tall))
    panels = [(table, task) for table in tables for task in table.columns]
    several = len({table.backbone for table in tables}) > 1
    first_of: dict[str, Axes] = {}
    for (table, task), plot in zip(panels, axes, strict=True):
        _forest(plot, table, task)
        if first_of.setdefault(task, plot) is not plot:
            plot.sharex(first_of[task])  # so that tables can be compared
        budget = [f"{table.budget:,} parameters"] if table.budget else []
        plot.set_title(" · ".join([task, *budget, *([table.backbone] if several else [])]), fontsize=10)
        if not _leftmost(plot):
            plot.tick_params(axis="y", labelleft=False)
    if len(tables) == 1:
        figure.suptitle(tables[0].title, fontsize=11)
    _legend(
        figure,
        [
            ("median over seeds, 95 % interval", {"color": PLAIN, "marker": "o"}),
            ("best", {"color": STRONG, "marker": "D"}),
            ("at chance", {"color": PLAIN, "marker": "o", "markerfacecolor": "white"}),
            ("one seed", {"color": PLAIN, "marker": "|", "linestyle": "none"}),
            ("majority rate", {"color": PLAIN, "linestyle": "--"}),
        ],
    )
    figure.savefig(path, dpi=DPI)


def draw_budgets(tables: Sequence[Table], path: Path) -> None:
    """A panel for each task (and backbone): score against the number of trained parameters, a line a method."""
    panels = list(dict.fromkeys((table.backbone, task) for table in tables for task in table.columns))
    labels = list(dict.fromkeys(label for table in tables for label in table.rows))
    several = len({backbone for backbone, _ in panels}) > 1
    figure, axes = _panels([divmod(index, ACROSS - 1) for index in range(len(panels))], (3.6, 3.1))
    for (backbone, task), plot in zip(panels, axes, strict=True):
        mine = [table for table in tables if table.backbone == backbone]
        for label in labels:
            entries = [table.entries[label, task] for table in mine if (label, task) in table.entries]
            _curve(plot, [entry for entry in entries if entry.value is not None], _look(label, labels))
        _majority(plot, [entry for table in mine for at, entry in table.entries.items() if at[1] == task], across=True)
        _count_axis(plot)
        plot.set_title(f"{task} · {backbone}" if several else task, fontsize=10)
        plot.grid(color=PALE, linewidth=0.6)
    for plot in axes:
        if _leftmost(plot):
            plot.set_ylabel("score (%)")
    keys = [(label, _look(label, labels)) for label in labels]
    _legend(figure, [*keys, ("majority rate", {"color": PLAIN, "linestyle": "--"})])
    figure.savefig(path, dpi=DPI)


def draw_pareto(tables: Sequence[Table], runs: Sequence[RunResult], x: str, y: str, path: Path) -> list[str]:
    """A panel for each backbone: every method that has both columns, those that no other beats in both filled and
    joined. Their names; raises ConfigError for a column that there is not, or that no method has.
    """
    across, up = metric(x, tables), metric(y, tables)
    points = [point for point in points_of(tables, runs) if x in point.values and y in point.values]
    if not points:
        raise ConfigError(f"--pareto: no method has both {x} and {y}; choose other columns", param="--pareto")
    backbones = list(dict.fromkeys(point.backbone for point in points))
    figure, axes = _panels([divmod(index, ACROSS - 1) for index in range(len(backbones))], (5.2, 3.8))
    unbeaten: list[str] = []
    for backbone, plot in zip(backbones, axes, strict=True):
        mine = [point for point in points if point.backbone == backbone]
        best = front(mine, x, y)
        unbeaten += [point.name for point in best]
        values = {point.name: (point.values[x] / across.unit, point.values[y] / up.unit) for point in mine}
        line = [values[point.name] for point in best]
        plot.plot([at for at, _ in line], [at for _, at in line], color=STRONG, linestyle="--", linewidth=1.2)
        for point in mine:
            look: dict[str, Any] = {"color": STRONG} if point in best else {"color": PLAIN, "markerfacecolor": "white"}
            plot.plot(*values[point.name], marker="o", markersize=6, **look)
            plot.annotate(point.name, values[point.name], (5, 5), textcoords="offset points", fontsize=8)
        if across.log:
            _count_axis(plot)
        plot.set_yscale("log" if up.log else "linear")
        plot.set_xlabel(across.title)
        plot.set_ylabel(up.title)
        plot.margins(0.15)
        plot.grid(color=PALE, linewidth=0.6)
        plot.set_title(backbone, fontsize=10)
    keys = [("no other is as good in both, and better in one", {"color": STRONG, "marker": "o", "linestyle": "--"})]
    _legend(figure, [*keys, ("beaten", {"color": PLAIN, "marker": "o", "markerfacecolor": "white", "linestyle": ""})])
    figure.savefig(path, dpi=DPI)
    return unbeaten


def grouped(selection: Selection) -> dict[Panel, list[str]]:
    """The (backbone, task) whose score falls into a few groups (prompt lengths, sub-tasks), and those in their order.

    None where there are several budgets: lines would be too many.
    """
    runs = selection.runs
    groups: dict[Panel, set[str]] = defaultdict(set)
    if len({run.budget for run in runs}) > 1:
        return {}
    for run in runs:
        for score in run.scores:
            groups[run.backbone, score.task].update(score.groups)
    return {panel: sorted(names, key=_natural) for panel, names in groups.items() if 1 < len(names) <= FEW_GROUPS}


def draw_groups(selection: Selection, path: Path) -> None:
    """A panel for each task that has a few groups: the score in each, a line a method, its seeds as dots."""
    panels, labels, runs = grouped(selection), selection.labels, selection.runs
    several = len({backbone for backbone, _ in panels}) > 1
    figure, axes = _panels([divmod(index, ACROSS - 1) for index in range(len(panels))], (4.2, 3.3))
    for ((backbone, task), names), plot in zip(panels.items(), axes, strict=True):
        for label in labels:
            look, seeds = _look(label, labels), _group_scores(runs, label, backbone, task)
            values = [[100 * groups[name] for groups in seeds if name in groups] for name in names]
            shown = [(x, y) for x, y in enumerate(values) if y]
            plot.plot([x for x, _ in shown], [np.median(y) for _, y in shown], linewidth=1.6, markersize=4.5, **look)
            for x, y in shown:
                plot.plot([x] * len(y), y, color=look["color"], marker=".", linestyle="none", alpha=0.4)
        plot.set_xticks(range(len(names)), names, fontsize=8.5)
        plot.set_title(f"{task} · {backbone}" if several else task, fontsize=10)
        plot.grid(color=PALE, linewidth=0.6)
        if _leftmost(plot):
            plot.set_ylabel("score (%)")
    _legend(figure, [(label, _look(label, labels)) for label in labels])
    figure.savefig(path, dpi=DPI)


def draw_activations(selection: Selection, path: Path) -> None:
    """For each method and task that has them: R(x) of every layer beside GELU (above), and minus GELU (below).

    Of several seeds the first is drawn, of several budgets the largest.
    """
    from matplotlib import colormaps

    runs = _with_activations(selection)[:AT_MOST]
    blocks = [divmod(index, ACROSS) for index in range(len(runs))]
    figure, axes = _panels([(2 * row + part, column) for row, column in blocks for part in (0, 1)], (2.9, 2.3))
    furthest = 0.0
    for above, below, run in zip(axes[::2], axes[1::2], runs, strict=True):
        layers = (run.activations or {}).get("layers", [])
        for depth, layer in enumerate(layers):
            colour = colormaps["viridis"](0.9 * depth / max(1, len(layers) - 1))
            values = rational(X, layer["a"], layer["b"])
            above.plot(X, values, color=colour, linewidth=1.4)
            below.plot(X, values - gelu(X), color=colour, linewidth=1.4)
            furthest = max(furthest, float(np.abs(values - gelu(X))[np.abs(X) <= MIDDLE].max()))
        above.plot(X, gelu(X), color="black", linestyle="--", linewidth=1.2)
        below.axhline(0, color="black", linestyle="--", linewidth=1.2)
        above.set_title(f"{run.label} · {run.task}", fontsize=10)
        above.set_ylim(-1.5, 5.5)
        below.set_xlabel("x")
        if _leftmost(above):
            above.set_ylabel("R(x)")
            below.set_ylabel("R(x) − GELU(x)")
    for below in axes[1::2]:
        below.set_ylim(-1.1 * furthest or -1, 1.1 * furthest or 1)
    for plot in axes:
        plot.set_xticks([-4, -2, 0, 2, 4])
        plot.grid(color=PALE, linewidth=0.6)
    deepest = max((len((run.activations or {}).get("layers", [])) for run in runs), default=1)
    shades = [
        (f"layer {depth + 1}", {"color": colormaps["viridis"](0.9 * depth / max(1, deepest - 1))})
        for depth in _few(deepest)
    ]
    _legend(figure, [("GELU", {"color": "black", "linestyle": "--"}), *shades])
    figure.savefig(path, dpi=DPI)


def rational(x: NDArray[np.float64], a: Sequence[float], b: Sequence[float]) -> NDArray[np.float64]:
    """PEDRO eq. 7: sum of a_j x^j over 1 + |sum of b_i x^i|, with j from 0 and i from 1."""
    above = np.polynomial.polynomial.polyval(x, a)
    below = np.polynomial.polynomial.polyval(x, [0.0, *b])
    y: NDArray[np.float64] = above / (1 + np.abs(below))
    return y


def gelu(x: NDArray[np.float64]) -> NDArray[np.float64]:
    y: NDArray[np.float64] = x * 0.5 * (1 + np.array([math.erf(value / math.sqrt(2)) for value in x]))
    return y


def _natural(name: str) -> tuple[float, str]:
    """Names that begin with a number in its order, the others after them."""
    number = name.split(" ", 1)[0]
    return (float(number) if number.isdecimal() else math.inf, name)


def _group_scores(runs: Sequence[RunResult], label: str, backbone: str, task: str) -> list[dict[str, float]]:
    """Of each seed."""
    mine = [run for run in runs if (run.label, run.backbone) == (label, backbone)]
    return [score.groups for run in mine for score in run.scores if score.task == task]


def _forest(plot: Axes, table: Table, task: str) -> None:
    for height, label in enumerate(reversed(table.rows)):
        entry = table.entries.get((label, task))
        if entry is None:
            continue
        if entry.value is None:
            plot.text(0.5, height, "failed", transform=plot.get_yaxis_transform(), ha="center", va="center", fontsize=8)
            continue
        scale, best = _scale(entry), entry.mark == BEST
        colour = STRONG if best else PLAIN
        if entry.low is not None and entry.high is not None:
            plot.plot([scale * entry.low, scale * entry.high], [height, height], color=colour, linewidth=1.6)
        plot.plot(
            scale * entry.value,
            height,
            marker="D" if best else "o",
            markersize=5.5,
            color=colour,
            markerfacecolor="white" if entry.at_chance else colour,
        )
        seeds = [scale * value for _, value in entry.values]
        plot.plot(seeds, [height] * len(seeds), marker="|", markersize=8, linestyle="none", color=colour, alpha=0.6)
    _majority(plot, [entry for at, entry in table.entries.items() if at[1] == task], across=False)
    plot.set_yticks(range(len(table.rows)), list(reversed(table.rows)), fontsize=8.5)
    plot.set_ylim(-0.7, len(table.rows) - 0.3)
    plot.tick_params(axis="x", labelsize=8.5)
    plot.tick_params(axis="y", length=0)
    plot.grid(axis="x", color=PALE, linewidth=0.6)


def _curve(plot: Axes, entries: Sequence[TableEntry], look: dict[str, Any]) -> None:
    """A method over its budgets; one that has a single size is a point."""
    points: dict[int, TableEntry] = {}
    for entry in entries:
        points.setdefault(entry.parameters, entry)
    by_size = [points[count] for count in sorted(points)]
    if not by_size:
        return
    x = [entry.parameters for entry in by_size]
    value, low, high = (
        [_scale(entry) * (math.nan if part is None else part) for entry, part in zip(by_size, parts, strict=True)]
        for parts in ([e.value for e in by_size], [e.low for e in by_size], [e.high for e in by_size])
    )
    if len(by_size) > 1:
        plot.fill_between(x, low, high, color=look["color"], alpha=0.13, linewidth=0)
    else:
        plot.vlines(x, low, high, color=look["color"], linewidth=1.2)
    plot.plot(x, value, linewidth=1.6, markersize=4.5, **look)


def _majority(plot: Axes, entries: Sequence[TableEntry], across: bool) -> None:
    rates = {round(entry.majority * _scale(entry), 4) for entry in entries if entry.majority is not None}
    for rate in rates:
        line = plot.axhline if across else plot.axvline
        line(rate, color=PLAIN, linestyle="--", linewidth=1, zorder=0)


def _with_activations(selection: Selection) -> list[RunResult]:
    """One run for each label, task and backbone: the first seed at the largest budget."""
    runs = [run for run in selection.runs if run.activations]
    first: dict[tuple[str, str, str], RunResult] = {}
    for run in sorted(runs, key=lambda run: (-(run.budget or 0), run.seed)):
        first.setdefault((run.label, run.task, run.backbone), run)
    labels, tasks = selection.labels, list(selection.columns)
    return sorted(first.values(), key=lambda run: (position(run.label, labels), position(run.task, tasks)))


def _scale(entry: TableEntry) -> float:
    return 1.0 if entry.metric == JUDGE else 100.0


def _look(label: str, labels: Sequence[str]) -> dict[str, Any]:
    index = labels.index(label)
    solid = index < len(COLOURS)
    return {
        "color": COLOURS[index % len(COLOURS)],
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": "-" if solid else "-.",
    }


def _few(count: int) -> list[int]:
    """At most six of `count` layers, the first and the last among them."""
    return sorted({round(layer) for layer in np.linspace(0, count - 1, min(count, 6))})


def _count_axis(plot: Axes) -> None:
    """Numbers of parameters, by their logarithm."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plot.set_xscale("log")
    plot.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    plot.xaxis.set_major_formatter(FuncFormatter(lambda count, _: f"{count:,.0f}"))
    plot.xaxis.set_minor_formatter(NullFormatter())
    plot.tick_params(axis="x", labelsize=8.5)
    plot.set_xlabel("trained parameters")


def _panels(cells: Sequence[PanelCell], size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure with a panel of this size (inches) at each place."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    down, across = 1 + max(row for row, _ in cells), 1 + max(column for _, column in cells)
    figure = Figure(figsize=(size[0] * across + 1.2, size[1] * down + 0.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = [figure.add_subplot(down, across, row * across + column + 1) for row, column in cells]
    for plot in axes:
        plot.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _leftmost(plot: Axes) -> bool:
    spec = plot.get_subplotspec()
    return spec is not None and spec.is_first_col()


def _legend(figure: Figure, keys: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """One legend below all panels, in as many columns as fit."""
    from matplotlib.lines import Line2D

    lines = [Line2D([], [], label=label, **look) for label, look in keys]
    for columns in range(min(len(lines), 7), 0, -1):
        legend = figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return
        legend.remove()
