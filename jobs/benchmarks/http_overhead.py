"""What a server costs: streams over HTTP against the same engine stepped in process. The server is somebody else's.

The client and the in-process engine are processes of their own and run in turn; both turn tokens into text. Where the
processor time of full batches goes stands beside it (`http_costs.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks import http_costs
from jobs.benchmarks.engine_process import EnginePool, Log
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, default_dtype
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio, spread

if TYPE_CHECKING:
    from pathlib import Path

    from jobs.benchmarks.command_line import Options

TTFT_LIMIT_MS = 30.0
COLUMNS = (
    *("engine", "adapters", "model", "batch", "tok_s", "decode_tok_s", "ttft_ms", "ratio", "ratio_interval"),
    *http_costs.COLUMNS,
)


@dataclass(frozen=True)
class Server:
    """A running server: model size, address, a key, the model to ask for, and that adapter on disk."""

    size: str
    url: str
    key: str
    model: str
    adapter: str
    tokenizer: str


def run(options: Options, server: Server, home: Path, log: Log) -> BenchmarkReport:
    """Throughput of a full batch of streams, the time to the first token of single ones, and what the processes of the
    server's `home` take."""
    batch = 8 if options.quick else (options.batches or (32,))[0]
    rounds = options.rounds or (2 if options.quick else 7)
    report = BenchmarkReport(
        "http", {"model": server.size, "batch": batch, "rounds": rounds, "threads": options.threads}
    )
    setup: dict[str, Any] = {"size": server.size, "device": options.device, "dtype": default_dtype(options.device)}
    setup |= {"threads": options.threads, "max_batch": batch, "length": MODEL_SIZES[server.size].context}
    setup |= {"adapters": {"pedro": [server.adapter]}, "tokenizer": server.tokenizer, "digest": _digest(server)}
    with EnginePool(log) as pool:
        pool.start("in process", "ours", setup, OMP_NUM_THREADS=str(options.threads))
        pool.start("http", "http", {"size": server.size, "url": server.url, "key": server.key, "model": server.model})
        ready = pool.wait()
        if len(ready) == 2:
            for rows in (batch, 1):
                seen = _rounds(pool, rows, rounds if rows > 1 else 3 * rounds, log)
                _add(report, server.size, rows, seen)
            http_costs.add(report, pool, server.size, home, options.quick, log)
        report.skipped |= pool.skipped
    return report


def _digest(server: Server) -> str:
    from pedro.adapter_directory import read_manifest

    return str(read_manifest(server.adapter)["backbone"]["digest"])


def _rounds(pool: EnginePool, rows: int, rounds: int, log: Log) -> dict[str, list[dict[str, Any]]]:
    seen: dict[str, list[dict[str, Any]]] = {"in process": [], "http": []}
    order: dict[str, Any] = {
        "batch": rows,
        "tenants": 1,
        "adapters": "pedro",
        "prompt": PROMPT_TOKENS,
        "new": NEW_TOKENS,
    }
    for number in range(rounds + 1):
        for name in list(seen)[:: -1 if number % 2 else 1]:
            figures = pool.run(name, {**order, "seed": number})
            if number:
                seen[name].append(figures)
                log(f"  B={rows} {name}: {figures['tok_s']:.0f} tok/s, first token {figures['ttft_ms']:.0f} ms")
    return seen


def _add(report: BenchmarkReport, model: str, rows: int, seen: dict[str, list[dict[str, Any]]]) -> None:
    ratio = paired_ratio([r["tok_s"] for r in seen["http"]], [r["tok_s"] for r in seen["in process"]])
    for name, rounds in seen.items():
        row: dict[str, Any] = {"engine": name, "adapters": "pedro", "model": model, "batch": rows, "tenants": 1}
        row |= {key: round(median(r[key] for r in rounds), 2) for key in ("tok_s", "decode_tok_s", "ttft_ms")}
        if name == "http":
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
        report.rows.append(row)
    if rows > 1:
        report.targets.append(Target(f"B={rows} streams: http / in process: throughput", 0.90, ratio))
    else:
        extra = [a["ttft_ms"] - b["ttft_ms"] for a, b in zip(seen["http"], seen["in process"], strict=True)]
        report.targets.append(
            Target("time to first token that gateway and Serve add, p50 ms", TTFT_LIMIT_MS, spread(extra), at_most=True)
        )
