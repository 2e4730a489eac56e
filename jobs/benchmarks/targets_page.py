"""Writes into docs/targets.md what every committed benchmark measured of its targets, and draws its figure.

`python -m jobs.benchmarks.targets_page`, after a benchmark was measured anew.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jobs.benchmarks.measured_pages import DOCS, RESULTS, filled, markdown_table

PAGE, PICTURE = DOCS / "targets.md", DOCS / "targets.png"
Result = Mapping[str, Any]
VERDICTS = {"met": "C2", "not met": "C3"}
"""What can be said of a target, and its colour in the figure."""
DRAWN = "How far each measured figure is from its target, by benchmark"
FARTHEST = 4.0  # times better or worse than the target: what is farther is drawn there


def results(folder: Path = RESULTS) -> dict[str, Result]:
    """Every committed result that has targets, by its file's name."""
    held = {file.stem: json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))}
    return {name: result for name, result in held.items() if result.get("targets")}


def written(page: str, held: Mapping[str, Result], about: Mapping[str, str]) -> str:
    """The page with what the results say; `about` says of a benchmark what it measures."""
    return filled(
        page, {"count": partial(_count, held), "missed": partial(_missed, held), "all": partial(_all, held, about)}
    )


def verdict(target: Result) -> str:
    """`met` or `not met`, and whether the interval holds the target."""
    said = "met" if target["met"] else "not met"
    return f"{said}, unclear" if target["unclear"] else said


def _count(held: Mapping[str, Result]) -> str:
    targets = [target for result in held.values() for target in result["targets"]]
    missed, unclear = sum(not target["met"] for target in targets), sum(target["unclear"] for target in targets)
    return (
        f"{len(targets) - missed} of {len(targets)} targets are met, {missed} are not. Of {unclear}, met or not, the "
        "95 % interval holds the target: measured again, they may fall to the other side. The figure has a dot a "
        "target, and behind a benchmark's name how many it keeps; targets of 0, such as failures, are counted, not "
        f"drawn.\n\n![{DRAWN}]({PICTURE.name})"
    )


def _missed(held: Mapping[str, Result]) -> str:
    lines = [
        [f"[{name}](#{name})", *_cells(target)]
        for name, result in held.items()
        for target in result["targets"]
        if not target["met"]
    ]
    return markdown_table(("benchmark", "target", "wanted", "measured", ""), lines)


def _all(held: Mapping[str, Result], about: Mapping[str, str]) -> str:
    return "\n\n".join(_benchmark(name, result, about) for name, result in held.items())


def _benchmark(name: str, result: Result, about: Mapping[str, str]) -> str:
    said, machine = about.get(result["benchmark"], ""), result["hardware"]
    made = f"`python -m {result['command']}`, " if "command" in result else ""
    made += f"{result['created'][:10]}, commit {result['commit'][:8]}, {machine['cores']} cores of {machine['cpu']}"
    lines = [_cells(target) for target in result["targets"]]
    return "\n\n".join(
        [
            f"### {name}",
            f"{said[:1].upper()}{said[1:]}{'. ' if said else ''}{made}: [{name}.json](../jobs/results/{name}.json).",
            markdown_table(("target", "wanted", "measured", ""), lines),
        ]
    )


def _cells(target: Result) -> list[str]:
    low, high = target["interval"]
    measured = _figure(target["value"])
    if low != high:
        measured += f" [{_figure(low)}, {_figure(high)}]"
    side, bound = target["target"].split()
    return [
        target["name"],
        f"{'at most' if side == '<=' else 'at least'} {_figure(float(bound))}",
        measured,
        verdict(target),
    ]


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 or float(value).is_integer() else f"{value:.3g}"


def better_than_wanted(target: Result) -> float | None:
    """How many times better than its target a figure is, from 0 to infinity; None where the target is 0."""
    side, text = target["target"].split()
    bound, value = float(text), float(target["value"])
    if bound <= 0:
        return None
    if side == ">=":
        return max(value, 0.0) / bound
    return bound / value if value > 0 else math.inf


def figure(held: Mapping[str, Result], path: Path) -> None:
    """A line a benchmark, a dot a target: to the right of the middle it is kept."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(held)
    drawn = Figure(figsize=(9, 0.24 * len(names) + 1), layout="constrained")
    FigureCanvasAgg(drawn)
    axes = drawn.subplots()
    for said, colour in VERDICTS.items():
        for clear in (True, False):
            places = [
                (min(max(times, 1 / FARTHEST), FARTHEST), number)
                for number, name in enumerate(names)
                for target in held[name]["targets"]
                if (times := better_than_wanted(target)) is not None
                and target["met"] == (said == "met")
                and target["unclear"] != clear
            ]
            axes.scatter(
                [x for x, _ in places],
                [y for _, y in places],
                s=28,
                color=colour if clear else "none",
                edgecolor=colour,
                alpha=0.8,
                label=said if clear else f"{said}, unclear",
            )
    axes.axvline(1, color="grey", linewidth=1)
    axes.set_xscale("log", base=2)
    steps = [2.0**step for step in range(int(-math.log2(FARTHEST)), int(math.log2(FARTHEST)) + 1)]
    axes.set_xticks(steps, [f"{step:g}×" for step in steps])
    counts = [
        f"{sum(target['met'] for target in held[name]['targets'])} of {len(held[name]['targets'])}" for name in names
    ]
    axes.set_yticks(range(len(names)), [f"{name} ({count})" for name, count in zip(names, counts, strict=True)])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel=f"times better than wanted (at the edges: {FARTHEST:g} and more)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False)
    drawn.savefig(path, dpi=100, metadata={"Software": None})


def abouts() -> dict[str, str]:
    """What each benchmark measures, as `python -m jobs.bench --help` says it."""
    from jobs.benchmarks.engine_benchmarks import BENCHMARKS
    from jobs.benchmarks.server_benchmarks import SERVER_BENCHMARKS

    return {name: benchmark.about for name, benchmark in {**BENCHMARKS, **SERVER_BENCHMARKS}.items()}


def main() -> None:
    """Write the page and the figure."""
    held = results()
    PAGE.write_text(written(PAGE.read_text(), held, abouts()))
    figure(held, PICTURE)


if __name__ == "__main__":
    main()
