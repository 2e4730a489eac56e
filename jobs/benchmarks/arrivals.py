"""Arrivals by Poisson against all at once, prefill of many tenants against one's, first token at batch 1.

Poisson arrivals come at 1.2 times the rate that the same round's static run served, so that the engine and not the wait
for clients bounds the throughput; both count all tokens over the time from the first arrival to the last token.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.bench_engine import BenchEngine, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, default_dtype, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.timeline import Timeline
from pedro.process import set_torch_threads

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

OFFERED = 1.2
Figures = dict[str, float]


def run(options: Options, log: Log) -> BenchmarkReport:
    """The three comparisons at each model, in paired rounds."""
    use_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 7)
    batch = (options.batches or (8,))[0]
    requests = (2 if options.quick else 16) * batch
    report = BenchmarkReport("arrivals", {"batch": batch, "requests": requests, "rounds": rounds, "offered": OFFERED})
    for name in options.models or ("S",):
        size = MODEL_SIZES[name]
        engine = BenchEngine(size, options.device, max_batch=batch, max_length=PROMPT_TOKENS + NEW_TOKENS + 8)
        refs = [str(path) for path in adapter_directories(size, "pedro", batch)]
        engine.load(refs)
        for base, other, pair in (
            ("all at once", "poisson", partial(_arrival_pair, engine, refs, requests)),
            ("prefill, one tenant", "prefill, a tenant a row", partial(_prefill_pair, engine, refs, batch)),
            ("first token, generate()", "first token, ours", _first_token_pair(engine, refs, options)),
        ):
            seen: dict[str, list[Figures]] = {base: [], other: []}
            for number in range(rounds + 1):
                figures = pair(number)
                if number:
                    seen[base].append(figures[0])
                    seen[other].append(figures[1])
                    log(f"  {name} {base} / {other}: " + " / ".join(f"{f['tok_s']:.0f} tok/s" for f in figures))
            _add(report, size, batch, seen, base, other)
        engine.close()
    return report


def _arrival_pair(engine: BenchEngine, refs: list[str], requests: int, seed: int) -> tuple[Figures, Figures]:
    at_once = static(engine, refs, requests, seed)
    return at_once, poisson(engine, refs, requests, at_once["tok_s"] / NEW_TOKENS, seed)


def _prefill_pair(engine: BenchEngine, refs: list[str], batch: int, seed: int) -> tuple[Figures, Figures]:
    """One tenant's rows and a tenant a row, every other time in this order."""
    if seed % 2:
        return _prefill(engine, refs[:1], batch, seed), _prefill(engine, refs, batch, seed)
    many = _prefill(engine, refs, batch, seed)
    return _prefill(engine, refs[:1], batch, seed), many


def _first_token_pair(
    engine: BenchEngine, refs: list[str], options: Options
) -> Callable[[int], tuple[Figures, Figures]]:
    from jobs.benchmarks.workers.generate import Generate

    setup = {"size": engine.size.name, "device": options.device, "dtype": default_dtype(options.device)}
    generate = Generate({**setup, "threads": options.threads})
    set_torch_threads(1)  # which the engine has left it (BenchEngine)

    def pair(seed: int) -> tuple[Figures, Figures]:
        order = {"batch": 1, "prompt": PROMPT_TOKENS, "new": 1, "seed": seed}
        set_torch_threads(options.threads)
        plain = generate.run(order)
        set_torch_threads(1)
        return plain, _prefill(engine, refs[:1], 1, seed)

    return pair


def _add(
    report: BenchmarkReport, size: ModelSize, batch: int, seen: dict[str, list[Figures]], base: str, other: str
) -> None:
    speed = other == "poisson"
    key = "tok_s" if speed else "ttft_ms"
    ratio = paired_ratio([figures[key] for figures in seen[other]], [figures[key] for figures in seen[base]])
    rows = 1 if base.startswith("first token") else batch
    for case, rounds in seen.items():
        row: dict[str, Any] = {"case": case, "engine": "generate" if case.endswith("()") else "ours"}
        row |= {"adapters": "none" if case.endswith("()") else "pedro", "model": size.name, "batch": rows}
        row["tenants"] = batch if case in ("all at once", "poisson", "prefill, a tenant a row") else 1
        row |= {name: round(median(figures[name] for figures in rounds), 2) for name in ("tok_s", "ttft_ms")}
        if case == other:
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
        report.rows.append(row)
    limit = 0.9 if speed else (1.0 if rows == 1 else 1.05)
    what = "throughput" if speed else "time"
    report.targets.append(Target(f"{size.name}: {other} / {base}: {what}", limit, ratio, at_most=not speed))


def static(engine: BenchEngine, refs: list[str], requests: int, seed: int) -> Figures:
    chosen = [refs[i % len(refs)] for i in range(requests)]
    return engine.answer(prompts(engine.size, requests, PROMPT_TOKENS, seed), chosen, NEW_TOKENS).figures()


def poisson(engine: BenchEngine, refs: list[str], requests: int, served_per_s: float, seed: int) -> Figures:
    """Requests one by one, with exponential times between them; the first at once."""
    rng = random.Random(seed)  # noqa: S311
    coming, at = [], 0.0
    for row, ids in enumerate(prompts(engine.size, requests, PROMPT_TOKENS, seed)):
        coming.append((at, engine.request(ids, refs[row % len(refs)], NEW_TOKENS)))
        at += rng.expovariate(OFFERED * served_per_s)
    timeline = Timeline()
    came: dict[str, float] = {}

    def arrive() -> bool:
        now = time.perf_counter() - timeline.started
        while coming and coming[0][0] <= now:
            due, request = coming.pop(0)
            came[f"{request.id}/0"] = due
            engine.engine.add(request)
        return bool(coming)

    engine.drain(timeline, arrive)
    waits = [timeline.moments[name][0] - due for name, due in came.items()]
    return {**timeline.figures(), **timeline.tails(), "ttft_ms": median(waits) * 1000}


def _prefill(engine: BenchEngine, refs: list[str], rows: int, seed: int) -> Figures:
    """The time until every row has its first token, as ttft_ms."""
    chosen = [refs[i % len(refs)] for i in range(rows)]
    figures = engine.answer(prompts(engine.size, rows, PROMPT_TOKENS, seed), chosen, 1).figures()
    return {**figures, "ttft_ms": figures["wall_s"] * 1000}
