"""Tokens per second beside the peers: targets 1, 2 and the time to first token of target 4.

Each contender runs the same prompts in turn, round by round (A B A B, every other round backwards), and every ratio is
taken within a round. Contenders of one engine share its process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from jobs.benchmarks.command_line import Options
from jobs.benchmarks.engine_process import RivalError, Say, Stable, peer_environment
from jobs.benchmarks.model_sizes import (
    NEW_TOKENS,
    PROMPT_TOKENS,
    SHAPES,
    Shape,
    default_dtype,
    saved_model,
)
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import Report, Target
from jobs.benchmarks.stats import Ratio, paired_ratio

QUICK_S = 22
SHORT_WORK, SHORT_ROUNDS = 20_000_000, 3  # weights times rows: a run of a few tenths of a second needs more of them
LORA_TENANTS = 8  # in a mixed batch of the peers: more only slows them further
QUICK: dict[str, Sequence[int]] = {"S": (8,)}
FULL: dict[str, Sequence[int]] = {"S": (1, 8, 32), "M": (1, 8)}


@dataclass(frozen=True)
class Contender:
    """One line of the table: which process runs it (`host`), and with which adapters."""

    engine: str
    adapters: str
    host: str
    most_tenants: int | None = None  # None: one a row

    @property
    def key(self) -> str:
        return self.engine if self.adapters == "none" else f"{self.engine}+{self.adapters}"


BASE = Contender("generate", "none", "generate")
CONTENDERS = (
    BASE,
    Contender("ours", "pedro", "ours"),
    Contender("ours", "none", "ours"),
    Contender("ours", "lora", "ours"),
    Contender("peft", "lora", "peft", LORA_TENANTS),
    Contender("continuous", "none", "continuous"),
    Contender("vllm", "none", "vllm"),
    Contender("vllm", "lora", "vllm+lora", LORA_TENANTS),
)


@dataclass(frozen=True)
class Plan:
    """What to measure. `peers`: Pythons of engines that live in one of their own, by name."""

    batches: Mapping[str, Sequence[int]] = field(default_factory=lambda: FULL)
    rounds: int = 7
    prompt: int = PROMPT_TOKENS
    new: int = NEW_TOKENS
    threads: int = 2
    device: str = "cpu"
    peers: Mapping[str, str] = field(default_factory=dict)
    engines: Sequence[str] = ("generate", "ours", "peft", "vllm")
    floor: bool = True
    most_s: float | None = None  # no round begins after so long, once one was counted

    @property
    def hosts(self) -> list[str]:
        """The processes to start."""
        hosts = [name for name in self.engines if name != "vllm"]
        return hosts + (["vllm", "vllm+lora"] if "vllm" in self.engines and "vllm" in self.peers else [])


def run(options: Options, say: Say) -> Report:
    """The comparison that the command line asks for; `--quick` is S at batch 8 with what is installed here."""
    quick = options.quick
    usual = QUICK if quick else FULL
    models = {name: usual.get(name, (1, 8)) for name in options.models or usual}
    return measure(
        Plan(
            batches={name: options.batches or batches for name, batches in models.items()},
            rounds=options.rounds or (3 if quick else 7),
            threads=options.threads,
            device=options.device,
            peers=options.peers,
            engines=options.engines or Plan.engines,
            floor=not quick,
            most_s=QUICK_S if quick else None,
        ),
        say,
    )


def measure(plan: Plan, say: Say) -> Report:
    """Measure every shape of the plan and judge the targets that its rows allow."""
    report = Report("serving", {**vars(plan), "peers": sorted(plan.peers)})
    if "vllm" in plan.engines and "vllm" not in plan.peers:
        report.skipped["vllm"] = "not asked for; give --peer vllm=/path/to/python"
    if plan.floor:
        report.facts["floor"] = measure_floor(plan, say)
    for name, batches in plan.batches.items():
        with Stable(say) as stable:
            _measure(stable, SHAPES[name], batches, plan, report, say)
        report.skipped |= stable.skipped
    return report


def measure_floor(plan: Plan, say: Say) -> dict[str, Any]:
    """What the machine can read, copy and multiply."""
    with Stable(say) as stable:
        stable.start("floor", "floor", _setup(plan))
        stable.wait()
        floor = stable.run("floor", {})
    say("machine: {read_gb_s:.1f} GB/s read, {copy_gb_s:.1f} GB/s copied, {gemm_gflops:.0f} GFLOP/s".format(**floor))
    return floor


def floor_row(shape: Shape, batch: int, plan: Plan, floor: Mapping[str, float]) -> dict[str, Any]:
    """The rates that bytes and FLOPs allow: a step reads weights and KV cache once and multiplies by all weights."""
    size = 4 if default_dtype(plan.device) == "float32" else 2
    kv_bytes = size * batch * shape.kv_values * (plan.prompt + plan.new / 2)
    flop_s = floor["gemm_gflops"] * 1e9
    step_s = max(
        (size * shape.read_parameters + kv_bytes) / (floor["read_gb_s"] * 1e9),
        2 * shape.read_parameters * batch / flop_s,
    )
    prompt_s = 2 * (shape.read_parameters - shape.vocab * shape.hidden) * batch * plan.prompt / flop_s
    return {
        "engine": "floor",
        "adapters": "none",
        "model": shape.name,
        "batch": batch,
        "tenants": 0,
        "tok_s": batch * plan.new / (prompt_s + step_s * (plan.new - 1)),
        "decode_tok_s": batch / step_s,
        "ttft_ms": prompt_s * 1000,
    }


def _setup(plan: Plan) -> dict[str, Any]:
    return {"device": plan.device, "dtype": default_dtype(plan.device), "threads": plan.threads}


def _start(stable: Stable, shape: Shape, batches: Sequence[int], plan: Plan) -> None:
    """Have the engines of one shape get ready, all at once."""
    most = max(batches)
    common = {**_setup(plan), "shape": shape.name, "max_batch": most, "length": plan.prompt + plan.new + 8}
    pedro = [str(path) for path in adapter_directories(shape, "pedro", most)]
    lora = [str(path) for path in adapter_directories(shape, "lora", most)]
    few = lora[: min(most, LORA_TENANTS)]
    omp = {"OMP_NUM_THREADS": str(plan.threads)}
    for host in plan.hosts:
        if host.startswith("vllm"):
            python = plan.peers["vllm"]
            chosen = few if host == "vllm+lora" else []
            setup = {**common, "directory": str(saved_model(shape)), "adapters": chosen}
            stable.start(host, "vllm", setup, python, **peer_environment(python, plan.threads))
        elif host == "ours":
            stable.start(host, host, {**common, "adapters": {"pedro": pedro, "lora": lora}}, **omp)
        else:
            stable.start(host, host, {**common, "adapters": few}, **omp)


def _measure(stable: Stable, shape: Shape, batches: Sequence[int], plan: Plan, report: Report, say: Say) -> None:
    say(f"{shape.name} ({shape.title}): starting {', '.join(plan.hosts)}")
    _start(stable, shape, batches, plan)
    facts = stable.wait()
    report.facts.setdefault("peer_versions", {}).update(
        {name: said["version"] for name, said in facts.items() if "version" in said}
    )
    field_ = [contender for contender in CONTENDERS if contender.host in facts]
    for batch in batches:
        runs = _rounds(stable, field_, shape, batch, plan, report, say)
        report.rows += _rows(runs, shape, batch)
        if "floor" in report.facts:
            report.rows.append(floor_row(shape, batch, plan, report.facts["floor"]))
        report.targets += _targets(runs, shape, batch)


def _rounds(
    stable: Stable, field_: Sequence[Contender], shape: Shape, batch: int, plan: Plan, report: Report, say: Say
) -> dict[Contender, list[dict[str, Any]]]:
    """The figures of every contender, round by round; the first round warms up and does not count."""
    runs: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in field_}
    began = time.monotonic()
    rounds = plan.rounds * (SHORT_ROUNDS if shape.read_parameters * batch < SHORT_WORK else 1)
    for number in range(rounds + 1):
        if plan.most_s is not None and number > 1 and time.monotonic() - began > plan.most_s:
            break
        for contender in list(runs)[:: -1 if number % 2 else 1]:
            order = {
                "batch": batch,
                "tenants": min(batch, contender.most_tenants or batch),
                "adapters": None if contender.adapters == "none" else contender.adapters,
                "prompt": plan.prompt,
                "new": plan.new,
                "seed": 1000 * batch + number,
            }
            try:
                figures = stable.run(contender.host, order)
            except RivalError as error:
                report.skipped[contender.key] = str(error)
                say(f"  skipped {contender.key}: {error}")
                del runs[contender]
                continue
            if number:
                runs[contender].append({**figures, "tenants": order["tenants"] if order["adapters"] else 0})
        said = f"  {shape.name} B={batch} round {number} of {rounds}, {time.monotonic() - began:.0f} s"
        say(said + "".join(f", {c.key} {r[-1]['tok_s']:.0f}/{r[-1]['decode_tok_s']:.0f}" for c, r in runs.items() if r))
    return runs


def _rows(runs: Mapping[Contender, list[dict[str, Any]]], shape: Shape, batch: int) -> list[dict[str, Any]]:
    """A line a contender: medians, and ratios to `generate()` of the same round."""
    rows = []
    for contender, rounds in runs.items():
        row: dict[str, Any] = {
            "engine": contender.engine,
            "adapters": contender.adapters,
            "model": shape.name,
            "batch": batch,
            "tenants": rounds[0]["tenants"],
        }
        row |= {key: round(median(r[key] for r in rounds), 2) for key in ("tok_s", "decode_tok_s", "ttft_ms")}
        for name, key in (("ratio", "tok_s"), ("decode_ratio", "decode_tok_s")):
            if BASE in runs:
                ratio = _ratio(runs, contender, BASE, key)
                row |= {name: round(ratio.value, 4), f"{name}_interval": ratio.interval}
        row |= {"rounds": len(rounds), "peak_bytes": max(r["peak_bytes"] for r in rounds)}
        rows.append(row)
    return rows


def _ratio(runs: Mapping[Contender, list[dict[str, Any]]], ours: Contender, theirs: Contender, key: str) -> Ratio:
    return paired_ratio([r[key] for r in runs[ours]], [r[key] for r in runs[theirs]])


def _targets(runs: Mapping[Contender, list[dict[str, Any]]], shape: Shape, batch: int) -> list[Target]:
    """The promises of this shape and batch whose contenders ran."""
    by_key = {contender.key: contender for contender in runs}
    pedro = by_key.get("ours+pedro")
    if pedro is None or shape.name not in ("S", "M"):
        return []
    small, few = shape.name == "S", batch <= 8
    promises = [
        ("vllm", "decode_tok_s", 1.0, True),
        ("vllm", "tok_s", 1.0 if small else 0.95, few),
        ("vllm+lora", "decode_tok_s", 3.0, True),
        ("vllm+lora", "tok_s", 3.0, small),
        ("peft+lora", "decode_tok_s", 3.0, True),
        ("peft+lora", "tok_s", 3.0, small),
        ("generate", "decode_tok_s", 2.0, few),
        ("ours", "decode_tok_s", 0.98, True),
        ("ours", "tok_s", 0.97, True),
    ]
    targets = []
    for key, figure, least, asked in promises:
        if asked and key in by_key:
            what = "decode" if figure == "decode_tok_s" else "end to end"
            stretch = ", stretch" if not few and key == "vllm" else ""
            name = f"{shape.name} B={batch} {what}: pedro / {key}{stretch}"
            targets.append(Target(name, least, _ratio(runs, pedro, by_key[key], figure)))
    if batch == 1 and BASE in runs:
        ratio = _ratio(runs, pedro, BASE, "ttft_ms")
        targets.append(Target(f"{shape.name} B=1 time to first token: pedro / generate", 1.0, ratio, at_most=True))
    return targets
