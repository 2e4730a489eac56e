"""Writes into docs/scaling.md what scaleout.json and scaling.json hold, and draws its figure.

`python -m jobs.benchmarks.scaling_page`, after either was measured anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from jobs.benchmarks.measured_pages import DOCS, RESULTS, filled, markdown_table

PAGE, PICTURE = DOCS / "scaling.md", DOCS / "scaling.png"
Result = Mapping[str, Any]
DRAWN = "Share of calls whose adapter is resident, by placement, by the bound, and while replicas die"
BEHIND = (
    "answered at once",
    "wait p50, p99 (ms)",
    "answer p50, p99 (s)",
    "busiest 1 % of the mean",
    "hottest on",
    "held",
)


def written(page: str, scaleout: Result, scaling: Result) -> str:
    """The page with what the results say; an empty one was not made yet."""

    def part(name: str, write: Callable[[Result], str]) -> str:
        result = scaleout if name == "scaleout" else scaling
        return write(result) if result else f"Not run yet: `python -m jobs.bench {name}`."

    return filled(page, {part_name: partial(part, *held) for part_name, held in PARTS.items()})


def results() -> tuple[Result, Result]:
    """Those of `scaleout` and `scaling`, empty where there is none."""
    files = [RESULTS / f"{name}.json" for name in ("scaleout", "scaling")]
    held: list[Result] = [json.loads(file.read_text()) if file.is_file() else {} for file in files]
    return held[0], held[1]


def _machine(scaleout: Result) -> str:
    said, hardware = scaleout["settings"], scaleout["hardware"]
    return (
        f"{said['rounds']} interleaved rounds of {said['seconds']:g} s each on {hardware['cpu']}, "
        f"{said['granted_cores']} cores; {said['model']}, {said['prompt']} + {said['new']} tokens; one thread, "
        f"{said['slots']} slots and {said['slots']} callers a replica."
    )


def _together(scaleout: Result) -> str:
    slots, speeds = scaleout["settings"]["slots"], [row for row in scaleout["rows"] if row["case"] == "speed"]
    rows = [row for row in speeds if row["callers"] == slots * row["replicas"]]
    heads = ["replicas", "tokens/s", "of n × one", "of min(n, cores) × one", "replicas' cores"]
    heads += ["tokens a core-second", "router and callers, a call"]
    lines = []
    for row in rows:
        ratio, of_cores = "1", "1"
        if "ratio" in row:
            ratio, of_cores = _ratio(row["ratio"], row["ratio_interval"]), f"{row['of_cores']:.2f}"
        used = [f"{row['tok_s'] / row['replicas_cpu']:.0f}", f"{row['router_us'] / 1000:.1f} ms"]
        lines.append(
            [f"{row['replicas']}", f"{row['tok_s']:.0f}", ratio, of_cores, f"{row['replicas_cpu']:.2f}", *used]
        )
    return markdown_table(heads, lines)


def _placed(scaleout: Result) -> str:
    heads = ("asked for", "placed", "adapter resident", "of at random", "loads", "tokens/s", "of at random", "held")
    targets = {target["name"]: target for target in scaleout["targets"]}
    lines = []
    for row in (row for row in scaleout["rows"] if row["case"] == "residency"):
        hits, speed = "1", "1"
        if "ratio" in row:
            found = targets[f"{row['draw']}: share of hits, by adapter / at random"]
            hits, speed = _ratio(found["value"], found["interval"]), _ratio(row["ratio"], row["ratio_interval"])
        lines.append(
            [
                *(row["draw"], row["placement"], f"{row['hit_share']:.3f}", hits),
                *(f"{row['loads']:.0f}", f"{row['tok_s']:.0f}", speed, f"{row['resident']:.0f}"),
            ]
        )
    return markdown_table(heads, lines)


def _ratio(value: float, interval: Sequence[float]) -> str:
    return f"{value:.2f} [{interval[0]:.2f}, {interval[1]:.2f}]"


def _costs(scaling: Result) -> str:
    said = scaling["settings"]
    rates = said["calls_s"]
    speeds = f"{rates[1]:.2f} calls one at a time, {rates[4]:.2f} with four, {rates[-1]:.2f} with {said['slots']}"
    load = f"{said['load_ms']:.0f} ms, {said['load_cpu_ms']:.0f} of them the replica's processor's"
    return f"In a second of processor time a replica answers {speeds}, all its slots. A load takes {load}."


def _placements(scaling: Result) -> str:
    rows = [row for row in scaling["rows"] if row["case"] == "placement"]
    lines = [[f"{row['zipf']:g}", row["placement"], *_figures(row)] for row in rows]
    return f"{markdown_table(('Zipf', 'placed', *BEHIND), lines)}\n\n![{DRAWN}]({PICTURE.name})"


def _bounds(scaling: Result) -> str:
    rows = [row for row in scaling["rows"] if row["case"] == "bound"]
    return markdown_table(("bound", *BEHIND), [[f"{row['share']:g}", *_figures(row)] for row in rows])


def _death(scaling: Result) -> str:
    death, moved = scaling["death"], 100 * scaling["moved_share"]
    return (
        f"{death['died']} of {scaling['settings']['replicas']:,} replicas died at once: "
        f"{death['calls_issued_again']:,} calls were issued again. Answered at once were {death['before']:.3f} before, "
        f"{death['just_after']:.3f} in the first {death['seconds_a_bucket']:.1f} s after, {death['at_the_end']:.3f} at "
        f"the end. When one replica leaves, {moved:.2f} % of the adapters get another first replica, all its own."
    )


def _choice(scaling: Result) -> str:
    each = ", ".join(f"{us:.0f} µs among {int(count):,}" for count, us in scaling["choice_us"].items())
    return f"A choice takes the gateway {each} replicas."


PARTS: dict[str, tuple[str, Callable[[Result], str]]] = {
    "machine": ("scaleout", _machine),
    "together": ("scaleout", _together),
    "placed": ("scaleout", _placed),
    "costs": ("scaling", _costs),
    "placements": ("scaling", _placements),
    "bounds": ("scaling", _bounds),
    "death": ("scaling", _death),
    "choice": ("scaling", _choice),
}
"""Of which result each part is, and how it is written."""


def _figures(row: Result) -> list[str]:
    waits = f"{row['wait_p50_ms']:,.0f}, {row['wait_p99_ms']:,.0f}"
    answers = f"{row['answer_p50_s']:.2f}, {row['answer_p99_s']:.2f}"
    return [
        f"{row['hit_share']:.3f}",
        waits,
        answers,
        f"{row['load_p99']:.1f}",
        f"{row['hot_on']:,}",
        f"{row['held']:,}",
    ]


def figure(scaling: Result, path: Path) -> None:
    """What each placement and each bound finds resident, and what a death does."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    drawn = Figure(figsize=(12, 3.4), layout="constrained")
    FigureCanvasAgg(drawn)
    left, middle, right = drawn.subplots(1, 3, sharey=True)
    placed = [row for row in scaling["rows"] if row["case"] == "placement"]
    names = list(dict.fromkeys(row["placement"] for row in placed))
    places = np.arange(len(names))
    for number, zipf in enumerate(dict.fromkeys(row["zipf"] for row in placed)):
        shares = [row["hit_share"] for row in placed if row["zipf"] == zipf]
        left.bar(places + 0.4 * number, shares, 0.38, label=f"Zipf {zipf:g}")
    left.set_xticks(places + 0.2, [name.replace(" ", "\n") for name in names])
    left.set(ylim=(0, 1), ylabel="calls whose adapter is resident")
    left.legend(loc="upper center")
    bounds = [row for row in scaling["rows"] if row["case"] == "bound"]
    middle.plot([row["share"] for row in bounds], [row["hit_share"] for row in bounds], "o-", color="C2")
    middle.axvline(scaling["settings"]["bound"], linestyle=":", color="grey")
    middle.set(xlabel="bound, of the mean load (dotted: the router's)")
    death = scaling["death"]
    shares = death["hit_share"]
    seconds = death["seconds_a_bucket"] * (np.arange(len(shares)) + 0.5 - len(shares) / 2)
    right.plot(seconds, shares, color="C3")
    right.axvline(0, linestyle=":", color="grey")
    right.set(xlabel=f"seconds since {death['died']} replicas died")
    drawn.savefig(path, dpi=100, metadata={"Software": None})


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text(), *results()))
    if simulated := results()[1]:
        figure(simulated, PICTURE)
