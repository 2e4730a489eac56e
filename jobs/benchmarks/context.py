"""What a longer prompt costs: time to the first token, PEDRO reading one token, the mean or the maximum of all.

One request at a time, every case in every round; the ratio is to no adapter on the same prompt. PEDRO reads a prompt
through one vector a layer, LoRA multiplies at each of its tokens.
"""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING

from jobs.benchmarks.bench_engine import BenchEngine, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport
from jobs.benchmarks.stats import paired_ratio

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

KINDS = {"none": None, "PEDRO last": "pedro", "PEDRO mean": "pedro-1", "PEDRO max": "pedro-2", "LoRA r16": "lora"}
LENGTHS, QUICK_LENGTHS = (64, 256, 1024, 2048), (64, 256)


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each model, each length."""
    use_threads(options.threads)
    lengths = QUICK_LENGTHS if options.quick else LENGTHS
    rounds = options.rounds or (2 if options.quick else 9)
    report = BenchmarkReport(
        "context", {"lengths": lengths, "rounds": rounds, "tokens": NEW_TOKENS, "threads": options.threads}
    )
    for name in options.models or ("S",):
        size = MODEL_SIZES[name]
        engine = BenchEngine(size, options.device, max_batch=1, max_length=min(size.context, max(lengths) + 64))
        refs = {case: kind and str(adapter_directories(size, kind, 1)[0]) for case, kind in KINDS.items()}
        engine.load([ref for ref in refs.values() if ref])
        for length in lengths:
            seen: dict[str, list[dict[str, float]]] = {case: [] for case in refs}
            for number in range(rounds + 1):  # the first only warms up
                asked = prompts(size, 1, length, number)
                for case, ref in refs.items():
                    figures = engine.answer(asked, [ref], NEW_TOKENS).figures()
                    if number:
                        seen[case].append(figures)
            for case, taken in seen.items():
                first, bare = ([figures["ttft_ms"] for figures in seen[which]] for which in (case, "none"))
                ratio = paired_ratio(first, bare)
                report.rows.append(
                    {
                        "adapters": case,
                        "engine": "ours",
                        "model": name,
                        "batch": 1,
                        "tokens": length,
                        "ttft_ms": round(median(first), 3),
                        "ratio": round(ratio.value, 4),
                        "ratio_interval": ratio.interval,
                        "decode_tok_s": round(median(figures["decode_tok_s"] for figures in taken), 1),
                    }
                )
                log(f"  {name} {length} tokens, {case}: first token after {median(first):.1f} ms, {ratio.value:.2f}")
        engine.close()
    return report
