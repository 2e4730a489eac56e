"""The engine beside busy processes: 0, 1 and 2 of them, with one thread, with several, and with what it grants itself.

Every case is measured in every round, so that ratios are taken within one; the ratio is to one thread beside the same
neighbours. A neighbour is a process that spins; each is ended by its own id.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, EngineProcessError, Log
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio, spread

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options

NEIGHBOURS = (0, 1, 2)
LEAST = 0.9  # of one thread's speed, whatever is beside
SETTLE_S = 1.2  # after neighbours came or went: longer than the engine's memory of them (threads.py)
ORDERS = {  # phase and model: what is asked of a batch of 1 and of more
    ("decode", 1): {"prompt": 16, "new": 17},
    ("decode", 8): {"prompt": 16, "new": 13},
    ("prefill", 1): {"prompt": 128, "new": 1},
    ("prefill", 8): {"prompt": 32, "new": 1},
}
LONGER = {"tiny": 1, "S": 12, "M": 1}  # times the new tokens, or prompts: shorter runs would time the machine's slices
CaseKey = tuple[str, int, int, str]  # phase, batch, neighbours, threads


def run(options: Options, log: Log) -> BenchmarkReport:
    """Every model in turn; its engines, one a number of threads, stay for all rounds."""
    names = options.models or (("S",) if options.quick else ("S", "M"))
    rounds = options.rounds or (2 if options.quick else 5)
    batches = options.batches or (1, 8)
    cases: dict[str, int | None] = {"1": 1, str(options.threads): options.threads, "auto": None}
    report = BenchmarkReport(
        "contention", {"neighbours": NEIGHBOURS, "batches": batches, "rounds": rounds, "threads": [*cases]}
    )
    for name in names:
        with EnginePool(log) as pool:
            for case, threads in cases.items():
                setup = {"size": name, "device": options.device, "dtype": "float32", "threads": threads}
                pool.start(case, "ours", setup | {"adapters": {}, "max_batch": max(batches), "length": 256})
            ready = pool.wait()
            if missing := set(cases) - set(ready):
                raise EngineProcessError(f"contention needs every case; {', '.join(sorted(missing))} did not start")
            seen = _measure(pool, name, [*cases], batches, rounds, log)
        _tell(report, name, seen)
    return report


def _measure(
    pool: EnginePool, name: str, cases: list[str], batches: tuple[int, ...], rounds: int, log: Log
) -> dict[CaseKey, list[float]]:
    """Tokens per second of every cell, a round each."""
    seen: dict[CaseKey, list[float]] = {}
    for number in range(rounds):
        for count in NEIGHBOURS:
            with neighbours(count):
                time.sleep(SETTLE_S)
                for case in cases:  # not counted: it finds the number of threads
                    pool.run(case, _order("decode", 1, name, number))
                for phase in ("decode", "prefill"):
                    for batch in batches:
                        for case in cases if number % 2 else reversed(cases):
                            speed = _speed(pool, case, phase, batch, name, number)
                            seen.setdefault((phase, batch, count, case), []).append(speed)
            log(f"  {name} round {number + 1} of {rounds}, {count} neighbours")
    return seen


def _speed(pool: EnginePool, case: str, phase: str, batch: int, name: str, number: int) -> float:
    """Tokens per second: new ones, or those of prompts."""
    order = _order(phase, batch, name, number)
    if phase == "decode":
        return float(pool.run(case, order)["decode_tok_s"])
    times = LONGER.get(name, 1)
    wall_s = sum(pool.run(case, order | {"seed": 100 * number + one})["wall_s"] for one in range(times))
    return float(times * batch * order["prompt"] / wall_s)


def _order(phase: str, batch: int, name: str, number: int) -> dict[str, Any]:
    order = ORDERS[phase, 1 if batch == 1 else 8]
    new = order["new"] if phase == "prefill" else 1 + (order["new"] - 1) * LONGER.get(name, 1)
    return {"batch": batch, "prompt": order["prompt"], "new": new, "seed": number, "adapters": None, "tenants": 0}


def _tell(report: BenchmarkReport, name: str, seen: dict[CaseKey, list[float]]) -> None:
    for (phase, batch, count, case), speeds in seen.items():
        ratio, speed = paired_ratio(speeds, seen[phase, batch, count, "1"]), spread(speeds)
        report.rows.append(
            {
                "phase": phase,
                "engine": "ours",
                "model": name,
                "batch": batch,
                "neighbours": count,
                "threads": case,
                "tok_s": round(median(speeds), 2),
                "tok_s_interval": speed.interval,
                "ratio": round(ratio.value, 4),
                "ratio_interval": ratio.interval,
            }
        )
        if case != "1" and count:
            named = f"{name} {phase}, B = {batch}: {case} threads / one, {count} busy beside"
            report.targets.append(Target(named, LEAST, ratio))


@contextmanager
def neighbours(count: int) -> Iterator[list[int]]:
    """`count` processes that spin; gives their ids."""
    running: list[subprocess.Popen[bytes]] = []
    try:
        for _ in range(count):
            running.append(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        yield [process.pid for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
