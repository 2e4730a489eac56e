"""What `--prefill-stall` trades: tokens per second where requests keep coming, for even streams beside prompts.

In each round every stall serves the same requests all at once, the same by Poisson, and eight streams beside one prompt
of 2,048 tokens. `ratio` is Poisson's throughput over that of the same stall all at once; `stream_ratio` is p99 over
median of the time between the streams' tokens.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.arrivals import poisson, static
from jobs.benchmarks.bench_engine import BenchEngine, use_threads
from jobs.benchmarks.longprompt import LONG, stream_beside
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport
from jobs.benchmarks.stats import paired_ratio, spread

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

STALLS = (0.5, 1.25, 3.0, 8.0)
BATCH, TOKENS = 8, 256
Figures = dict[str, float]


def run(options: Options, log: Log) -> BenchmarkReport:
    """Every stall at each model, in rounds that go through them back and forth."""
    use_threads(options.threads)
    rounds = options.rounds or (1 if options.quick else 7)
    requests, long, new = (2 * BATCH, 256, 48) if options.quick else (16 * BATCH, LONG, TOKENS)
    settings = {"batch": BATCH, "requests": requests, "rounds": rounds, "long_prompt": long, "tokens": new}
    report = BenchmarkReport("stall", settings)
    for name in options.models or ("S",):
        size = MODEL_SIZES[name]
        refs = [str(path) for path in adapter_directories(size, "pedro", BATCH + 1)]
        engines = {stall: _engines(name, options.device, refs, long, stall) for stall in STALLS}
        seen: dict[float, list[Figures]] = {stall: [] for stall in STALLS}
        for number in range(rounds + 1):
            for stall in STALLS[:: -1 if number % 2 else 1]:
                figures = _figures(*engines[stall], refs, requests, long, new, number)
                if number:
                    seen[stall].append(figures)
                    log(f"  {name} {stall:g}: " + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))
        for stall, found in seen.items():
            row: dict[str, Any] = {"model": name, "adapters": "pedro", "batch": BATCH, "prefill_stall": stall}
            row |= {key: round(median(figures[key] for figures in found), 2) for key in found[0]}
            ratio = paired_ratio([f["tok_s"] for f in found], [f["static_tok_s"] for f in found])
            streams = spread([f["stream_ratio"] for f in found])
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
            row |= {"stream_ratio": round(streams.value, 4), "stream_ratio_interval": streams.interval}
            report.rows.append(row)
        for pair in engines.values():
            for engine in pair:
                engine.close()
    return report


def _engines(name: str, device: str, refs: list[str], long: int, stall: float) -> tuple[BenchEngine, BenchEngine]:
    """One for short prompts, one for the long prompt among streams."""
    size = MODEL_SIZES[name]
    room = {BATCH: PROMPT_TOKENS + NEW_TOKENS + 8, BATCH + 1: max(PROMPT_TOKENS, long) + 64}
    short, roomy = (
        BenchEngine(size, device, max_batch=batch, max_length=length, prefill_stall=stall)
        for batch, length in room.items()
    )
    for engine in (short, roomy):
        engine.load(refs)
    return short, roomy


def _figures(
    short: BenchEngine, roomy: BenchEngine, refs: list[str], requests: int, long: int, new: int, seed: int
) -> Figures:
    at_once = static(short, refs[:BATCH], requests, seed)
    arriving = poisson(short, refs[:BATCH], requests, at_once["tok_s"] / NEW_TOKENS, seed)
    streams = stream_beside(roomy, refs, long, new, seed)
    return {
        "static_tok_s": at_once["tok_s"],
        **{key: arriving[key] for key in ("tok_s", "ttft_ms", "token_ms", "token_p99_ms")},
        "stream_ms": streams["median_ms"],
        "stream_p99_ms": streams["p99_ms"],
        "stream_ratio": streams["ratio"],
        "long_ttft_ms": streams["ttft_ms"],
    }
