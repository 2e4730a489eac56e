"""A thousand replicas and a million tenants, simulated from what `scaleout` and `registry` measured on one machine.

The router's placement beside others, what a looser or tighter bound on a replica's share would do, and the death of a
tenth of the replicas at once. `docs/scaling.md` says what is assumed.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jobs.benchmarks.fleet import (
    AT_HOME,
    AT_RANDOM,
    LEAST_OF_TWO,
    ROUTER,
    Costs,
    Demand,
    Fleet,
    Placement,
    Seen,
    by_adapter,
    share_moved,
)
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.refs import ModelRef
from pedro.serving.router import SHARE, choose

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

RESULTS = Path(__file__).parents[1] / "results"
REPLICAS, TENANTS = 1000, 1_000_000
ROOM = 64  # adapters of the size that `scaleout` measured, about 0.5 MB each
SHARE_OF_CAPACITY = 0.7
WARM, CALLS = 200_000, 100_000
ZIPF = (1.0, 1.1)
BOUNDS = (1.1, 1.5, 2.0)
DIE = 0.1
BUCKETS = 40  # of the time that counts, in the figure


def run(options: Options, log: Log) -> BenchmarkReport:
    """All of it; `--quick` has fewer replicas, tenants and calls."""
    costs = measured_costs(RESULTS)
    replicas, tenants, warm, calls = (20, 5_000, 1_200, 800) if options.quick else (REPLICAS, TENANTS, WARM, CALLS)
    settings: dict[str, Any] = {
        "replicas": replicas,
        "tenants": tenants,
        "room": costs.room,
        "slots": costs.slots,
        "calls": calls,
    }
    settings |= {"warm": warm, "share_of_capacity": SHARE_OF_CAPACITY, "bound": SHARE, "gateways": 4, "seed": 0}
    settings |= {"calls_s": [round(rate, 3) for rate in costs.rates], "load_ms": round(1000 * costs.load_s, 2)}
    report = BenchmarkReport("scaling", {**settings, "load_cpu_ms": round(1000 * costs.load_cpu_s, 2)})

    def simulate(zipf: float, placement: Placement, die: int = 0) -> Seen:
        began = time.monotonic()
        demand = Demand(replicas, tenants, zipf, SHARE_OF_CAPACITY, warm, calls)
        seen = Fleet(costs, demand, placement, die).run()
        row = seen.row()
        log(
            f"  {placement.name}, Zipf {zipf:g}: {row['hit_share']:.0%} hits, p99 wait {row['wait_p99_ms']:,.0f} ms "
            f"({time.monotonic() - began:.0f} s)"
        )
        return seen

    for zipf in ZIPF:
        for placement in (ROUTER, LEAST_OF_TWO, AT_RANDOM, AT_HOME):
            seen = simulate(zipf, placement)
            report.rows.append({"case": "placement", "zipf": zipf, "placement": placement.name, **seen.row()})
    bounds = {SHARE: report.rows[0]}  # the router's own
    for bound in BOUNDS:
        bounds[bound] = simulate(ZIPF[0], by_adapter(bound, f"by adapter, at most {bound:g} of the mean")).row()
    named = {"case": "bound", "zipf": ZIPF[0], "placement": ROUTER.name}
    report.rows += [{**bounds[bound], **named, "share": bound} for bound in sorted(bounds)]
    dying = simulate(ZIPF[0], ROUTER, die=round(DIE * replicas))
    report.rows.append({"case": "death", "zipf": ZIPF[0], "placement": ROUTER.name, **dying.row()})
    report.facts |= {"death": _after_death(dying, round(DIE * replicas))}
    _conclude(report, replicas, min(tenants, 100_000))
    return report


def measured_costs(results: Path, room: int = ROOM) -> Costs:
    """What a replica with a core of its own would do: calls/s by callers (between them: on a line), and a load.

    Rates are per second of processor time, since the replica that was measured had less than a core. A load is that
    of an adapter which its host must fetch first, as of `registry`.
    """
    measured = json.loads((results / "scaleout.json").read_text())
    rows, new = measured["rows"], measured["settings"]["new"]
    speeds = [row for row in rows if row["case"] == "speed" and row["replicas"] == 1]
    alone = {row["callers"]: row["tok_s"] / row["replicas_cpu"] / new for row in speeds}
    (load,) = [row for row in rows if row["case"] == "load"]
    registry = json.loads((results / "registry.json").read_text())["rows"]
    fetch = {row["case"]: row["median_ms"] for row in registry if "median_ms" in row}
    callers = [0, *sorted(alone)]
    rates = np.interp(range(callers[-1] + 1), callers, [0.0, *(alone[count] for count in sorted(alone))])
    fetching = max(0.0, fetch["fetch"] - fetch["fetch again"]) / 1000
    return Costs(
        tuple(float(rate) for rate in rates),
        room,
        load["load_ms"] / 1000 + fetching,
        load["load_cpu_ms"] / 1000 + fetching,
    )


def _after_death(seen: Seen, died: int) -> dict[str, Any]:
    """Hits by time, each since the first call that counts; the replicas died in the middle."""
    hits, at = np.array(seen.hits), np.array(seen.at_s)
    edges = np.linspace(0, at[-1], BUCKETS + 1)
    shares = [float(hits[(at >= low) & (at < high)].mean()) for low, high in itertools.pairwise(edges)]
    half = BUCKETS // 2
    return {
        "died": died,
        "calls_issued_again": seen.again,
        "seconds_a_bucket": round(float(edges[1]), 3),
        "hit_share": [round(share, 4) for share in shares],
        "before": round(float(np.mean(shares[half - half // 2 : half])), 4),
        "just_after": round(shares[half], 4),
        "at_the_end": round(float(np.mean(shares[-half // 4 :])), 4),
    }


def _conclude(report: BenchmarkReport, replicas: int, adapters: int) -> None:
    """Targets; what one replica's leaving moves; what a choice costs the gateway."""
    for zipf in ZIPF:
        found = {row["placement"]: row for row in report.rows if row["case"] == "placement" and row["zipf"] == zipf}
        better = found[ROUTER.name]["hit_share"] / max(0.0001, found[AT_RANDOM.name]["hit_share"])
        report.targets.append(Target(f"Zipf {zipf:g}: share of hits, by adapter / at random", 1.0, exactly(better)))
    moved = share_moved(replicas, adapters)
    report.facts["moved_share"] = round(moved, 6)
    most = 1.2 / replicas  # adapters are dealt at random, so a replica has more or less than its share
    report.targets.append(
        Target("adapters that move when a replica leaves, of all", most, exactly(round(moved, 6)), at_most=True)
    )
    report.facts["choice_us"] = {str(count): _choice_us(count) for count in (2, 32, replicas)}


def _choice_us(replicas: int) -> float:
    """Microseconds that the router's choice takes, the least of some tries."""
    loads = {f"replica-{number}": number % 7 for number in range(replicas)}
    refs = [ModelRef.parse(f"acme.a{number}:1#sha256:{number}") for number in range(100)]

    def once() -> float:
        began = time.perf_counter()
        for ref in refs:
            choose(ref, loads)
        return (time.perf_counter() - began) / len(refs)

    return round(1e6 * min(once() for _ in range(5)), 1)
