"""Tokens per second beside the peers, and time to the first token.

Each contender runs the same prompts in turn, round by round (A B A B, every other round backwards), and every ratio is
taken within a round. Contenders of one engine share its process.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, EngineProcessError, Log, peer_environment
from jobs.benchmarks.model_sizes import (
    MODEL_SIZES,
    NEW_TOKENS,
    PROMPT_TOKENS,
    ModelSize,
    default_dtype,
    saved_model,
)
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import Ratio, paired_ratio

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options

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
class PeerComparison:
    """What to measure. `peers`: Pythons of engines that live in one of their own, by name."""

    batches: Mapping[str, Sequence[int]] = field(default_factory=lambda: FULL)
    rounds: int = 7
    prompt: int = PROMPT_TOKENS
    new: int = NEW_TOKENS
    threads: int = 2
    device: str = "cpu"
    peers: Mapping[str, str] = field(default_factory=dict)
    engines: Sequence[str] = ("generate", "ours", "peft", "vllm")
    roofline: bool = True
    most_s: float | None = None  # no round begins after so long, once one was counted

    @property
    def hosts(self) -> list[str]:
        """The processes to start."""
        hosts = [name for name in self.engines if name != "vllm"]
        return hosts + (["vllm", "vllm+lora"] if "vllm" in self.engines and "vllm" in self.peers else [])


def run(options: Options, log: Log) -> BenchmarkReport:
    """The comparison that the command line asks for; `--quick` is S at batch 8 with what is installed here."""
    quick = options.quick
    usual = QUICK if quick else FULL
    models = {name: usual.get(name, (1, 8)) for name in options.models or usual}
    return measure(
        PeerComparison(
            batches={name: options.batches or batches for name, batches in models.items()},
            rounds=options.rounds or (3 if quick else 7),
            threads=options.threads,
            device=options.device,
            peers=options.peers,
            engines=options.engines or PeerComparison.engines,
            roofline=not quick,
            most_s=QUICK_S if quick else None,
        ),
        log,
    )


def measure(comparison: PeerComparison, log: Log) -> BenchmarkReport:
    """Measure every model of the comparison and judge the targets that its rows cover."""
    report = BenchmarkReport("serving", {**vars(comparison), "peers": sorted(comparison.peers)})
    if "vllm" in comparison.engines and "vllm" not in comparison.peers:
        report.skipped["vllm"] = "not asked for; give --peer vllm=/path/to/python"
    if comparison.roofline:
        report.facts["roofline"] = measure_roofline(comparison, log)
    for name, batches in comparison.batches.items():
        with EnginePool(log) as pool:
            _measure(pool, MODEL_SIZES[name], batches, comparison, report, log)
        report.skipped |= pool.skipped
    return report


def measure_roofline(comparison: PeerComparison, log: Log) -> dict[str, Any]:
    """What the machine can read, copy and multiply."""
    with EnginePool(log) as pool:
        pool.start("roofline", "roofline", _setup(comparison))
        pool.wait()
        roofline = pool.run("roofline", {})
    log("machine: {read_gb_s:.1f} GB/s read, {copy_gb_s:.1f} GB/s copied, {gemm_gflops:.0f} GFLOP/s".format(**roofline))
    return roofline


def roofline_row(
    size: ModelSize, batch: int, comparison: PeerComparison, roofline: Mapping[str, float]
) -> dict[str, Any]:
    """The rates that bytes and FLOPs allow: a step reads weights and KV cache once and multiplies by all weights."""
    value_bytes = 4 if default_dtype(comparison.device) == "float32" else 2
    kv_bytes = value_bytes * batch * size.kv_values * (comparison.prompt + comparison.new / 2)
    flop_s = roofline["gemm_gflops"] * 1e9
    step_s = max(
        (value_bytes * size.read_parameters + kv_bytes) / (roofline["read_gb_s"] * 1e9),
        2 * size.read_parameters * batch / flop_s,
    )
    prompt_s = 2 * (size.read_parameters - size.vocab * size.hidden) * batch * comparison.prompt / flop_s
    return {
        "engine": "roofline",
        "adapters": "none",
        "model": size.name,
        "batch": batch,
        "tenants": 0,
        "tok_s": batch * comparison.new / (prompt_s + step_s * (comparison.new - 1)),
        "decode_tok_s": batch / step_s,
        "ttft_ms": prompt_s * 1000,
    }


def _setup(comparison: PeerComparison) -> dict[str, Any]:
    return {"device": comparison.device, "dtype": default_dtype(comparison.device), "threads": comparison.threads}


def _start(pool: EnginePool, size: ModelSize, batches: Sequence[int], comparison: PeerComparison) -> None:
    """Start the engines for one model, all at once."""
    most = max(batches)
    common = {
        **_setup(comparison),
        "size": size.name,
        "max_batch": most,
        "length": comparison.prompt + comparison.new + 8,
    }
    pedro = [str(path) for path in adapter_directories(size, "pedro", most)]
    lora = [str(path) for path in adapter_directories(size, "lora", most)]
    few = lora[: min(most, LORA_TENANTS)]
    omp = {"OMP_NUM_THREADS": str(comparison.threads)}
    for host in comparison.hosts:
        if host.startswith("vllm"):
            python = comparison.peers["vllm"]
            chosen = few if host == "vllm+lora" else []
            setup = {**common, "directory": str(saved_model(size)), "adapters": chosen}
            pool.start(host, "vllm", setup, python, **peer_environment(python, comparison.threads))
        elif host == "ours":
            pool.start(host, host, {**common, "adapters": {"pedro": pedro, "lora": lora}}, **omp)
        else:
            pool.start(host, host, {**common, "adapters": few}, **omp)


def _measure(
    pool: EnginePool,
    size: ModelSize,
    batches: Sequence[int],
    comparison: PeerComparison,
    report: BenchmarkReport,
    log: Log,
) -> None:
    log(f"{size.name} ({size.title}): starting {', '.join(comparison.hosts)}")
    _start(pool, size, batches, comparison)
    facts = pool.wait()
    report.facts.setdefault("peer_versions", {}).update(
        {name: said["version"] for name, said in facts.items() if "version" in said}
    )
    field_ = [contender for contender in CONTENDERS if contender.host in facts]
    for batch in batches:
        runs = _rounds(pool, field_, size, batch, comparison, report, log)
        report.rows += _rows(runs, size, batch)
        if "roofline" in report.facts:
            report.rows.append(roofline_row(size, batch, comparison, report.facts["roofline"]))
        report.targets += _targets(runs, size, batch)


def _rounds(
    pool: EnginePool,
    field_: Sequence[Contender],
    size: ModelSize,
    batch: int,
    comparison: PeerComparison,
    report: BenchmarkReport,
    log: Log,
) -> dict[Contender, list[dict[str, Any]]]:
    """The figures of every contender, round by round; the first round warms up and does not count."""
    runs: dict[Contender, list[dict[str, Any]]] = {contender: [] for contender in field_}
    began = time.monotonic()
    rounds = comparison.rounds * (SHORT_ROUNDS if size.read_parameters * batch < SHORT_WORK else 1)
    for number in range(rounds + 1):
        if comparison.most_s is not None and number > 1 and time.monotonic() - began > comparison.most_s:
            break
        for contender in list(runs)[:: -1 if number % 2 else 1]:
            order = {
                "batch": batch,
                "tenants": min(batch, contender.most_tenants or batch),
                "adapters": None if contender.adapters == "none" else contender.adapters,
                "prompt": comparison.prompt,
                "new": comparison.new,
                "seed": 1000 * batch + number,
            }
            try:
                figures = pool.run(contender.host, order)
            except EngineProcessError as error:
                report.skipped[contender.key] = str(error)
                log(f"  skipped {contender.key}: {error}")
                del runs[contender]
                continue
            if number:
                runs[contender].append({**figures, "tenants": order["tenants"] if order["adapters"] else 0})
        said = f"  {size.name} B={batch} round {number} of {rounds}, {time.monotonic() - began:.0f} s"
        log(said + "".join(f", {c.key} {r[-1]['tok_s']:.0f}/{r[-1]['decode_tok_s']:.0f}" for c, r in runs.items() if r))
    return runs


def _rows(runs: Mapping[Contender, list[dict[str, Any]]], size: ModelSize, batch: int) -> list[dict[str, Any]]:
    """A line a contender: medians, and ratios to `generate()` of the same round."""
    rows = []
    for contender, rounds in runs.items():
        row: dict[str, Any] = {
            "engine": contender.engine,
            "adapters": contender.adapters,
            "model": size.name,
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


def _targets(runs: Mapping[Contender, list[dict[str, Any]]], size: ModelSize, batch: int) -> list[Target]:
    """The targets of this model and batch whose contenders ran."""
    by_key = {contender.key: contender for contender in runs}
    pedro = by_key.get("ours+pedro")
    if pedro is None or size.name not in ("S", "M"):
        return []
    small, few = size.name == "S", batch <= 8
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
            name = f"{size.name} B={batch} {what}: pedro / {key}{stretch}"
            targets.append(Target(name, least, _ratio(runs, pedro, by_key[key], figure)))
    if batch == 1 and BASE in runs:
        ratio = _ratio(runs, pedro, BASE, "ttft_ms")
        targets.append(Target(f"{size.name} B=1 time to first token: pedro / generate", 1.0, ratio, at_most=True))
    return targets
