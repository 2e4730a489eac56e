"""The paper's table 3: PEDRO, (IA)³ and LoRA unmerged, beam 1 and 3, tokens per second and peak memory.

Each engine and method has a process of its own, alone on the device, so that its peak memory is its own; lines of one
process run in turn, round by round, and ratios are taken within them. `bandwidth_share` says how near decoding at batch
1 comes to the limit of the measured copy bandwidth, were weights and KV cache all that is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, EngineProcessError, Log
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, default_dtype
from jobs.benchmarks.peers import PeerComparison, measure_roofline
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio, spread

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options

PAPER = {"pedro": 32.5, "ia3": 33.1, "lora": 25.1}  # tokens/s on an A40 at beam 1, batch size not stated
TENANTS = 64


@dataclass(frozen=True)
class Line:
    """One way to run: adapters (none: the bare model), rows, tenants among them, beams."""

    adapters: str | None
    batch: int
    beams: int

    @property
    def tenants(self) -> int:
        return self.batch if self.adapters else 0

    @property
    def label(self) -> str:
        return f"{self.adapters or 'none'} B={self.batch} beams={self.beams}"


@dataclass(frozen=True)
class MethodRun:
    """A process and the lines it runs."""

    engine: str
    method: str
    lines: tuple[Line, ...]


def method_runs(batch: int) -> list[MethodRun]:
    """Batch 1 for every engine and method; then PEDRO with a tenant a row beside the bare model, in one engine."""
    made = []
    for engine in ("ours", "peft"):
        for method in ("pedro", "ia3", "lora"):
            if (engine, method) != ("peft", "pedro"):
                bare = (Line(None, 1, 1),) if engine == "ours" else ()
                made.append(MethodRun(engine, method, (Line(method, 1, 1), Line(method, 1, 3), *bare)))
    return [*made, MethodRun("ours", "pedro", (Line("pedro", batch, 1), Line(None, batch, 1)))]


def run(options: Options, log: Log) -> BenchmarkReport:
    """Every run in turn, for each model."""
    quick, device = options.quick, options.device
    names = options.models or (("S",) if device == "cpu" else ("7B",))
    rounds = options.rounds or (1 if quick else 7)
    batch = (options.batches or (8 if quick else TENANTS,))[0]
    report = BenchmarkReport(
        "efficiency", {"device": device, "rounds": rounds, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS}
    )
    report.facts["paper_tok_s"] = PAPER
    roofline = report.facts["roofline"] = measure_roofline(PeerComparison(threads=options.threads, device=device), log)
    for name in names:
        size = MODEL_SIZES[name]
        for method_run in method_runs(batch):
            with EnginePool(log) as pool:
                _measure(pool, method_run, size, rounds, options, report, roofline["copy_gb_s"], log)
            report.skipped |= pool.skipped
    return report


def copy_limit_tok_s(size: ModelSize, copy_gb_s: float, value_bytes: int) -> float:
    """Tokens per second at batch 1 if every byte of weights and KV cache passed once at the copy bandwidth."""
    values = size.read_parameters + size.kv_values * (PROMPT_TOKENS + NEW_TOKENS / 2)
    return copy_gb_s * 1e9 / (value_bytes * values)


def _measure(
    pool: EnginePool,
    method_run: MethodRun,
    size: ModelSize,
    rounds: int,
    options: Options,
    report: BenchmarkReport,
    copy: float,
    log: Log,
) -> None:
    most = max(line.batch for line in method_run.lines)
    refs = [str(path) for path in adapter_directories(size, method_run.method, most)]
    name = f"{method_run.engine}+{method_run.method} {size.name}"
    setup: dict[str, Any] = {"size": size.name, "device": options.device, "dtype": default_dtype(options.device)}
    setup |= {"threads": options.threads, "length": PROMPT_TOKENS + NEW_TOKENS + 8}
    setup |= {"max_batch": most * max(line.beams for line in method_run.lines)}
    adapters = {method_run.method: refs} if method_run.engine == "ours" else refs
    pool.start(name, method_run.engine, {**setup, "adapters": adapters}, OMP_NUM_THREADS=str(options.threads))
    if name not in pool.wait():
        return
    runs: dict[Line, list[dict[str, Any]]] = {line: [] for line in method_run.lines}
    for number in range(rounds + 1):
        for line in list(runs):
            order = {"batch": line.batch, "tenants": max(1, line.tenants), "adapters": line.adapters}
            order |= {"beams": line.beams, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "seed": number}
            try:
                figures = pool.run(name, order)
            except EngineProcessError as error:
                report.skipped[f"{name} {line.label}"] = str(error)
                log(f"  skipped {name} {line.label}: {error}")
                del runs[line]
                continue
            if number:
                runs[line].append(figures)
                log(f"  {name} {line.label}: {figures['tok_s']:.1f} tok/s")
    _report(report, method_run, size, runs, copy, 4 if setup["dtype"] == "float32" else 2)


def _report(
    report: BenchmarkReport,
    method_run: MethodRun,
    size: ModelSize,
    runs: dict[Line, list[dict[str, Any]]],
    copy_gb_s: float,
    value_bytes: int,
) -> None:
    limit = copy_limit_tok_s(size, copy_gb_s, value_bytes)
    for line, rounds in runs.items():
        row: dict[str, Any] = {"engine": method_run.engine, "adapters": line.adapters or "none", "model": size.name}
        row |= {"batch": line.batch, "tenants": line.tenants, "beams": line.beams}
        keys = ("tok_s", "decode_tok_s", "ttft_ms") if line.beams == 1 else ("tok_s",)  # beams come all at the end
        row |= {key: round(median(r[key] for r in rounds), 2) for key in keys}
        row["peak_gb"] = round(max(r["peak_bytes"] for r in rounds) / 1e9, 3)
        bare = runs.get(Line(None, line.batch, 1))
        if bare is not None and line.beams == 1:
            for name, key in (("ratio", "tok_s"), ("decode_ratio", "decode_tok_s")):
                row[name] = round(_ratio(rounds, bare, key), 4)
        if line.batch == line.beams == 1:
            shares = spread([r["decode_tok_s"] / limit for r in rounds])
            row["bandwidth_share"] = round(shares.value, 3)
            if method_run.engine == "ours" and line.adapters == "pedro":
                report.targets.append(Target(f"{size.name} B=1 decode / copy bandwidth's limit", 0.65, shares))
        report.rows.append(row)
    _judge_tenants(report, size, runs)


def _judge_tenants(report: BenchmarkReport, size: ModelSize, runs: dict[Line, list[dict[str, Any]]]) -> None:
    """Many tenants against no adapter, where one process ran both."""
    lines: Sequence[Line] = [line for line in runs if line.batch > 1 and line.adapters]
    for line in lines:
        bare = runs.get(Line(None, line.batch, 1))
        if bare is not None:
            pairs = [r["decode_tok_s"] for r in runs[line]], [r["decode_tok_s"] for r in bare]
            name = f"{size.name} B={line.batch} decode: {line.tenants} tenants / no adapter"
            report.targets.append(Target(name, 0.98, paired_ratio(*pairs)))


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    return paired_ratio([r[key] for r in ours], [r[key] for r in theirs]).value
