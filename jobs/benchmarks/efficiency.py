"""The paper's table 3: PEDRO, (IA)³ and LoRA unmerged, beam 1 and 3, tokens per second and peak memory (target 7).

Each engine and method has a process of its own, alone on the device, so that its peak memory is its own; lines of one
process run in turn, round by round, and ratios are taken within them. `bandwidth_share` says how near decoding at batch
1 comes to the limit of the measured copy bandwidth, were weights and KV cache all that is moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from jobs.benchmarks.command_line import Options
from jobs.benchmarks.engine_process import RivalError, Say, Stable
from jobs.benchmarks.model_sizes import NEW_TOKENS, PROMPT_TOKENS, SHAPES, Shape, default_dtype
from jobs.benchmarks.peers import Plan, measure_floor
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import Report, Target
from jobs.benchmarks.stats import paired_ratio, spread

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
class Sitting:
    """A process and the lines it runs."""

    engine: str
    method: str
    lines: tuple[Line, ...]


def sittings(batch: int) -> list[Sitting]:
    """Batch 1 for every engine and method; then PEDRO with a tenant a row beside the bare model, in one engine."""
    made = []
    for engine in ("ours", "peft"):
        for method in ("pedro", "ia3", "lora"):
            if (engine, method) != ("peft", "pedro"):
                bare = (Line(None, 1, 1),) if engine == "ours" else ()
                made.append(Sitting(engine, method, (Line(method, 1, 1), Line(method, 1, 3), *bare)))
    return [*made, Sitting("ours", "pedro", (Line("pedro", batch, 1), Line(None, batch, 1)))]


def run(options: Options, say: Say) -> Report:
    """Every sitting in turn, for each model."""
    quick, device = options.quick, options.device
    names = options.models or (("S",) if device == "cpu" else ("7B",))
    rounds = options.rounds or (1 if quick else 7)
    batch = (options.batches or (8 if quick else TENANTS,))[0]
    report = Report("efficiency", {"device": device, "rounds": rounds, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS})
    report.facts["paper_tok_s"] = PAPER
    floor = report.facts["floor"] = measure_floor(Plan(threads=options.threads, device=device), say)
    for name in names:
        shape = SHAPES[name]
        for sitting in sittings(batch):
            with Stable(say) as stable:
                _sit(stable, sitting, shape, rounds, options, report, floor["copy_gb_s"], say)
            report.skipped |= stable.skipped
    return report


def copy_limit_tok_s(shape: Shape, copy_gb_s: float, value_bytes: int) -> float:
    """Tokens per second at batch 1 if every byte of weights and KV cache passed once at the copy bandwidth."""
    values = shape.read_parameters + shape.kv_values * (PROMPT_TOKENS + NEW_TOKENS / 2)
    return copy_gb_s * 1e9 / (value_bytes * values)


def _sit(
    stable: Stable, sitting: Sitting, shape: Shape, rounds: int, options: Options, report: Report, copy: float, say: Say
) -> None:
    most = max(line.batch for line in sitting.lines)
    refs = [str(path) for path in adapter_directories(shape, sitting.method, most)]
    name = f"{sitting.engine}+{sitting.method} {shape.name}"
    setup: dict[str, Any] = {"shape": shape.name, "device": options.device, "dtype": default_dtype(options.device)}
    setup |= {"threads": options.threads, "length": PROMPT_TOKENS + NEW_TOKENS + 8}
    setup |= {"max_batch": most * max(line.beams for line in sitting.lines)}
    adapters = {sitting.method: refs} if sitting.engine == "ours" else refs
    stable.start(name, sitting.engine, {**setup, "adapters": adapters}, OMP_NUM_THREADS=str(options.threads))
    if name not in stable.wait():
        return
    runs: dict[Line, list[dict[str, Any]]] = {line: [] for line in sitting.lines}
    for number in range(rounds + 1):
        for line in list(runs):
            order = {"batch": line.batch, "tenants": max(1, line.tenants), "adapters": line.adapters}
            order |= {"beams": line.beams, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "seed": number}
            try:
                figures = stable.run(name, order)
            except RivalError as error:
                report.skipped[f"{name} {line.label}"] = str(error)
                say(f"  skipped {name} {line.label}: {error}")
                del runs[line]
                continue
            if number:
                runs[line].append(figures)
                say(f"  {name} {line.label}: {figures['tok_s']:.1f} tok/s")
    _report(report, sitting, shape, runs, copy, 4 if setup["dtype"] == "float32" else 2)


def _report(
    report: Report,
    sitting: Sitting,
    shape: Shape,
    runs: dict[Line, list[dict[str, Any]]],
    copy_gb_s: float,
    value_bytes: int,
) -> None:
    limit = copy_limit_tok_s(shape, copy_gb_s, value_bytes)
    for line, rounds in runs.items():
        row: dict[str, Any] = {"engine": sitting.engine, "adapters": line.adapters or "none", "model": shape.name}
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
            if sitting.engine == "ours" and line.adapters == "pedro":
                report.targets.append(Target(f"{shape.name} B=1 decode / copy bandwidth's limit", 0.65, shares))
        report.rows.append(row)
    _judge_tenants(report, shape, runs)


def _judge_tenants(report: Report, shape: Shape, runs: dict[Line, list[dict[str, Any]]]) -> None:
    """Many tenants against no adapter, where a sitting ran both."""
    lines: Sequence[Line] = [line for line in runs if line.batch > 1 and line.adapters]
    for line in lines:
        bare = runs.get(Line(None, line.batch, 1))
        if bare is not None:
            pairs = [r["decode_tok_s"] for r in runs[line]], [r["decode_tok_s"] for r in bare]
            name = f"{shape.name} B={line.batch} decode: {line.tenants} tenants / no adapter"
            report.targets.append(Target(name, 0.98, paired_ratio(*pairs)))


def _ratio(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], key: str) -> float:
    return paired_ratio([r[key] for r in ours], [r[key] for r in theirs]).value
