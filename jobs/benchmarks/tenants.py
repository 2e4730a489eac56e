"""Flat in the number of tenants. Adapter directories on local disk behind the engine's own pool.

Each case has an engine of its own with room for 64 adapters and sees the same load: requests at once, drawn uniformly
or by Zipf (1/k) from its tenants. Then resident tenants stream while short requests of others arrive, whose adapters
are resident in one case and have to be loaded in the other.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.bench_engine import BenchEngine, take, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio, percentile
from jobs.benchmarks.timeline import Timeline
from pedro.process import freeze_heap

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

ROOM = 64  # adapters that the pool may hold
STREAMS, STREAM_TOKENS = 8, 160
ARRIVAL_STEPS = 8  # after which a short request arrives


@dataclass(frozen=True)
class Case:
    """How many adapters are registered, and how requests draw from them."""

    tenants: int
    draw: str

    @property
    def resident(self) -> bool:
        return self.tenants <= ROOM

    def refs(self, directories: Sequence[str], count: int, seed: int) -> list[str]:
        """The adapters of `count` requests."""
        source = random.Random(seed)  # noqa: S311
        weights = [1 / k for k in range(1, self.tenants + 1)] if self.draw == "zipf" else None
        return source.choices(directories[: self.tenants], weights, k=count)


def run(options: Options, log: Log) -> BenchmarkReport:
    """Throughput of every case, and the residents' time per token while others load."""
    use_threads(options.threads)
    size = MODEL_SIZES[(options.models or ("S",))[0]]
    counts = (1, 32, 256) if options.quick else (1, 32, 1000, 10_000)
    rounds = options.rounds or (2 if options.quick else 7)
    slots, requests = (8, 16) if options.quick else ((options.batches or (16,))[0], 64)
    report = BenchmarkReport("tenants", {"model": size.name, "tenants": counts, "slots": slots, "requests": requests})
    log(f"making {max(counts):,} adapter directories (kept for the next time)")
    directories = [str(path) for path in adapter_directories(size, "pedro", max(counts))]
    budget = ROOM * adapter_bytes(size, directories[0], options)
    cases = [Case(n, draw) for n in counts for draw in ("uniform", "zipf") if n > 1 or draw == "uniform"]

    def engine(max_batch: int) -> BenchEngine:
        length = PROMPT_TOKENS + max(NEW_TOKENS, STREAM_TOKENS) + 8
        return BenchEngine(size, options.device, max_batch=max_batch, max_length=length, adapter_bytes=budget)

    engines = {case: engine(slots) for case in cases}
    freeze_heap()  # as a replica does once it has started
    seen: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
    for number in range(rounds + 1):
        for case in cases[:: -1 if number % 2 else 1]:
            figures = _throughput(engines[case], case, directories, requests, seed=number)
            if number:
                seen[case].append(figures)
        log(
            f"  round {number} of {rounds}"
            + "".join(f", {c.tenants} {c.draw} {r[-1]['tok_s']:.0f}" for c, r in seen.items() if r)
        )
    for used in engines.values():
        used.close()
    _report_cases(report, cases, seen)
    streaming = engine(STREAMS + 4)
    _report_streams(report, streaming, directories, rounds, 48 if options.quick else STREAM_TOKENS, log)
    streaming.close()
    return report


def adapter_bytes(size: ModelSize, directory: str, options: Options) -> int:
    """What the pool counts for one adapter."""
    probe = BenchEngine(size, options.device, max_batch=1, max_length=8)
    probe.load([directory])
    taken = probe.engine.adapters.residents()[directory].nbytes
    probe.close()
    return taken


def _throughput(
    engine: BenchEngine, case: Case, directories: Sequence[str], requests: int, seed: int
) -> dict[str, Any]:
    if case.resident:
        engine.load(directories[: case.tenants])
    before = engine.engine.adapters.stats()["loads"]
    refs = case.refs(directories, requests, seed)
    timeline = engine.answer(prompts(engine.size, requests, PROMPT_TOKENS, seed), refs, NEW_TOKENS, tenants=refs)
    loads = engine.engine.adapters.stats()["loads"] - before
    return {**timeline.figures(), "hit_share": 1 - loads / requests}


def _report_cases(report: BenchmarkReport, cases: Sequence[Case], seen: dict[Case, list[dict[str, Any]]]) -> None:
    one = [figures["tok_s"] for figures in seen[cases[0]]]
    for case in cases:
        ratio = paired_ratio([figures["tok_s"] for figures in seen[case]], one)
        hits = median(figures["hit_share"] for figures in seen[case])
        report.rows.append(
            {
                "case": "resident" if case.resident else "missing",
                "engine": "ours",
                "adapters": "pedro",
                "model": report.settings["model"],
                "tenants": case.tenants,
                "draw": case.draw,
                "hit_share": round(hits, 3),
                "tok_s": round(median(figures["tok_s"] for figures in seen[case]), 2),
                "ratio": round(ratio.value, 4),
                "ratio_interval": ratio.interval,
            }
        )
        if case.tenants > 1:
            least = 0.97 if case.resident else 0.90
            name = f"{case.tenants:,} tenants, {case.draw} ({hits:.0%} resident) / one tenant: throughput"
            report.targets.append(Target(name, least, ratio))


def _report_streams(
    report: BenchmarkReport, engine: BenchEngine, directories: Sequence[str], rounds: int, tokens: int, log: Log
) -> None:
    """Residents' p99 time per token with arrivals that miss, over that with arrivals that are resident."""
    residents, arrivals = list(directories[:STREAMS]), list(directories[STREAMS : 2 * STREAMS])
    missing = itertools.cycle(directories[2 * STREAMS :])
    p99: dict[str, list[float]] = {"arrivals resident": [], "arrivals missing": []}
    for number in range(rounds + 1):
        for case in list(p99)[:: -1 if number % 2 else 1]:
            engine.load(residents + (arrivals if case == "arrivals resident" else []))
            others = arrivals * 8 if case == "arrivals resident" else [next(missing) for _ in range(8 * STREAMS)]
            gaps = _stream(engine, residents, others, tokens, seed=number)
            if number:
                p99[case].append(percentile(gaps, 0.99))
        log(f"  streams: round {number} of {rounds}")
    for case, values in p99.items():
        row = {"case": case, "engine": "ours", "adapters": "pedro", "model": report.settings["model"]}
        report.rows.append({**row, "tenants": len(directories), "p99_ms": round(median(values), 3)})
    ratio = paired_ratio(p99["arrivals missing"], p99["arrivals resident"])
    report.targets.append(Target("residents' p99 time per token, misses loading / none", 1.10, ratio, at_most=True))


def _stream(
    engine: BenchEngine, residents: Sequence[str], others: Sequence[str], tokens: int, seed: int
) -> list[float]:
    """Milliseconds between the residents' tokens while one of `others` asks for two tokens every few steps."""
    asked = prompts(engine.size, len(residents) + len(others), PROMPT_TOKENS, seed)
    streams = [engine.request(ids, ref, tokens) for ids, ref in zip(asked, residents, strict=False)]
    coming = [engine.request(ids, ref, 2) for ids, ref in zip(asked[len(streams) :], others, strict=True)]
    timeline = Timeline()
    for request in streams:
        engine.engine.add(request)
    named = {f"{request.id}/0" for request in streams}
    steps = 0
    while any(len(timeline.moments.get(name, ())) < tokens for name in named):
        take(engine.engine.step(), timeline)
        steps += 1
        if steps % ARRIVAL_STEPS == 0 and coming and len(timeline.moments) >= len(streams):
            engine.engine.add(coming.pop(0))
    engine.drain(Timeline())
    return Timeline(moments={name: timeline.moments[name][1:] for name in named}).gaps_ms()
