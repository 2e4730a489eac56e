"""A prompt of 2,048 tokens arrives among decodes. What counts is the time between tokens of the others.

Cases: eight streams alone, and eight streams while the long prompt is read. The ratio is p99 over median of all gaps in
the streams of a round with the long prompt.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.bench_engine import BenchEngine, take, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, PROMPT_TOKENS, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import percentile, spread
from jobs.benchmarks.timeline import Timeline

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

STREAMS, LONG, ARRIVES_AFTER = 8, 2048, 24
QUICK_TOKENS, FULL_TOKENS = 96, 256


def run(options: Options, log: Log) -> BenchmarkReport:
    """Both cases, for each model."""
    use_threads(options.threads)
    names = options.models or (("S",) if options.quick else ("S", "M"))
    rounds = options.rounds or (1 if options.quick else 7)
    streams = (options.batches or (STREAMS,))[0]
    new = QUICK_TOKENS if options.quick else FULL_TOKENS
    report = BenchmarkReport("longprompt", {"long_prompt": LONG, "streams": streams, "rounds": rounds, "tokens": new})
    for name in names:
        size = MODEL_SIZES[name]
        engine = BenchEngine(size, options.device, max_batch=streams + 1, max_length=LONG + 64)
        refs = [str(path) for path in adapter_directories(size, "pedro", streams + 1)]
        engine.load(refs)
        seen: dict[str, list[dict[str, float]]] = {"alone": [], "long prompt": []}
        for number in range(rounds + 1):
            for case in seen:
                figures = stream_beside(
                    engine, refs, LONG if case == "long prompt" else 0, new if number else 8, number
                )
                if number:
                    seen[case].append(figures)
                    log(f"  {name} {case}: " + ", ".join(f"{key} {value:.1f}" for key, value in figures.items()))
        engine.close()
        for case, rounds_ in seen.items():
            row: dict[str, Any] = {"case": case, "engine": "ours", "adapters": "pedro", "model": name}
            row |= {"batch": streams, "tokens": LONG if case == "long prompt" else 0}
            row |= {key: round(median(figures[key] for figures in rounds_), 3) for key in rounds_[0]}
            report.rows.append(row)
        ratio = spread([figures["ratio"] for figures in seen["long prompt"]])
        report.targets.append(
            Target(f"{name}: p99 / median time per token beside {LONG} tokens", 3.0, ratio, at_most=True)
        )
    return report


def stream_beside(engine: BenchEngine, refs: list[str], long: int, new: int, seed: int) -> dict[str, float]:
    """The gaps of the streams, and the long prompt's own time to its first token."""
    *stream_refs, long_ref = refs
    asked = prompts(engine.size, len(stream_refs), PROMPT_TOKENS, seed)
    requests = [engine.request(ids, ref, new) for ids, ref in zip(asked, stream_refs, strict=True)]
    timeline, late = Timeline(), None
    for request in requests:
        engine.engine.add(request)
    names = {f"{request.id}/0" for request in requests}
    while engine.engine.has_work():
        take(engine.engine.step(), timeline)
        progress = min((len(timeline.moments.get(name, ())) for name in names), default=0)
        if late is None and long and progress >= min(ARRIVES_AFTER, new // 2):
            late = engine.request(prompts(engine.size, 1, long, seed)[0], long_ref, 2)
            arrived = Timeline()
            engine.engine.add(late)
    gaps = Timeline(moments={name: timeline.moments[name][1:] for name in names}).gaps_ms()
    figures = {"median_ms": median(gaps), "p99_ms": percentile(gaps, 0.99), "longest_ms": max(gaps)}
    figures["ratio"] = figures["p99_ms"] / figures["median_ms"]
    first = timeline.moments[f"{late.id}/0"][0] + timeline.started - arrived.started if late else 0.0
    return {**figures, "ttft_ms": first * 1000}
