"""Tokens per second and peak memory of fine-tuning: our trainer's methods beside transformers' Trainer with peft.

Every contender has a process of its own and runs a few steps at a time, in turn with the others; a run goes from its
first step over a validation and a checkpoint to the adapter on disk.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool
from jobs.benchmarks.model_sizes import MODEL_SIZES, ModelSize, bench_folder, saved_model
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.stats import paired_ratio
from pedro.backbone import EMBEDDED, named_directory, resolve_backbone
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

ROWS = EMBEDDED.parent / "demo" / "acme"  # short commands and their class
TOKENIZER = EMBEDDED / "pedro-nano"  # of the random backbones
METHODS = ("pedro", "ia3", "lora", "full")
HF = "HF Trainer + peft"
OURS = "ours"
Key = tuple[str, str]  # trainer, method
Runs = dict[Key, list[dict[str, float]]]


@dataclass(frozen=True)
class Load:
    """A run's size: rows of a batch, optimizer steps of a run, and how many commands are joined to one row."""

    batch: int
    steps: int
    joined: int
    held_out: int


SMALL, LARGE = Load(16, 30, 1, 32), Load(4, 4, 6, 8)
LOADS = {"pedro-nano": SMALL, "stories260K": SMALL}
BACKBONES = ("pedro-nano", "smollm2-135m", "M")


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each backbone; `--quick` is pedro-nano in short runs."""
    quick = options.quick
    rounds = options.rounds or (2 if quick else 9)
    report = BenchmarkReport(
        "training", {"rounds": rounds, "threads": options.threads, "small": asdict(SMALL), "large": asdict(LARGE)}
    )
    for name in options.backbones or (BACKBONES[:1] if quick else BACKBONES):
        load = LOADS.get(name, LARGE)
        if quick:
            load = Load(load.batch, 2, load.joined, load.batch)
        try:
            setup = {**setup_of(name, load), "threads": options.threads, "batch": load.batch, "steps": load.steps}
        except BackboneError as error:
            report.skipped[name] = error.message
            log(f"  skipped {name}: {error.message}")
            continue
        with EnginePool(log) as pool:
            _measure(pool, name, setup, rounds, report, log)
    return report


def _measure(
    pool: EnginePool, name: str, setup: Mapping[str, Any], rounds: int, report: BenchmarkReport, log: Log
) -> None:
    keys: list[Key] = [*((OURS, method) for method in METHODS), (HF, "lora")]
    threads = {"OMP_NUM_THREADS": str(setup["threads"])}
    for trainer, method in keys:
        kind = "train" if trainer == OURS else "train-hf"
        pool.start(f"{kind}-{method}", kind, {**setup, "method": method}, **threads)
    ready = pool.wait()
    report.skipped |= pool.skipped
    runs: Runs = {key: [] for key in keys if _process(key) in ready}
    for number in range(rounds + 1):  # the first only warms up
        for key in list(runs)[:: -1 if number % 2 else 1]:
            figures = pool.run(_process(key), {})
            if number:
                runs[key].append(figures)
        told = ", ".join(f"{' '.join(key)} {taken[-1]['tok_s']:.0f}" for key, taken in runs.items() if taken)
        log(f"  {name} round {number} of {rounds}: {told}")
    report.rows += _rows(name, runs)
    report.targets += _targets(name, runs)


def _process(key: Key) -> str:
    return f"{'train' if key[0] == OURS else 'train-hf'}-{key[1]}"


def _rows(name: str, runs: Runs) -> list[dict[str, Any]]:
    """A line a contender: medians, and ratios to transformers' Trainer of the same round."""
    base, rows = runs.get((HF, "lora")), []
    for (trainer, method), taken in runs.items():
        row: dict[str, Any] = {
            "backbone": name,
            "trainer": trainer,
            "method": method,
            "tok_s": round(median(figures["tok_s"] for figures in taken), 1),
            "step_ms": round(median(1000 * figures["seconds"] / figures["steps"] for figures in taken), 2),
            "peak_mb": round(max(figures["peak_bytes"] for figures in taken) / 1e6, 1),
        }
        if base:
            ratio = paired_ratio(_speeds(taken), _speeds(base))
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
        rows.append(row)
    return rows


def _targets(name: str, runs: Runs) -> list[Target]:
    pedro, lora, base = (runs.get(key) for key in ((OURS, "pedro"), (OURS, "lora"), (HF, "lora")))
    targets = []
    if pedro and lora:
        ratio = paired_ratio(_speeds(pedro), _speeds(lora))
        targets.append(Target(f"{name}: PEDRO / LoRA, both ours, tokens/s", 1.0, ratio))
    if lora and base:
        ratio = paired_ratio(_speeds(lora), _speeds(base))
        targets.append(Target(f"{name}: LoRA, ours / {HF}, tokens/s", 1.0, ratio))
        ours, theirs = (max(figures["peak_bytes"] for figures in taken) for taken in (lora, base))
        memory = exactly(ours / theirs)
        targets.append(Target(f"{name}: LoRA, ours / {HF}, peak memory", 1.0, memory, at_most=True))
    return targets


def _speeds(taken: Sequence[Mapping[str, float]]) -> list[float]:
    return [figures["tok_s"] for figures in taken]


def setup_of(name: str, load: Load) -> dict[str, Any]:
    """Directory of the backbone, and files of rows. Raises BackboneError for a backbone that is not here."""
    folder = bench_folder() / "training" / name
    directory = random_backbone(MODEL_SIZES[name], folder / "backbone") if name in MODEL_SIZES else named(name)
    return {"backbone": str(directory), **row_files(folder, load)}


def row_files(folder: Path, load: Load) -> dict[str, str]:
    """Files of rows in `folder`, by role."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {}
    for role, source, most in (("train", "train", 512), ("validation", "test", load.held_out)):
        file = files[role] = folder / f"{role}.jsonl"
        file.write_text("".join(f"{json.dumps(row)}\n" for row in _joined(ROWS / f"{source}.jsonl", load.joined, most)))
    return {role: str(file) for role, file in files.items()}


def named(name: str) -> Path:
    """The directory of a backbone by name. Raises BackboneError for one that is not here."""
    if named_directory(name) is None:
        raise BackboneError(f"backbone: {name} is not kept here; `pedro backbones pull {name}`", param="backbone")
    return resolve_backbone(name).directory


def random_backbone(size: ModelSize, directory: Path) -> Path:
    """A random backbone of this size with a tokenizer beside it."""
    directory.mkdir(parents=True, exist_ok=True)
    for file in saved_model(size).iterdir():
        if not (directory / file.name).exists():
            (directory / file.name).hardlink_to(file)
    for file in TOKENIZER.glob("tokenizer*.json"):
        shutil.copy(file, directory / file.name)
    return directory


def _joined(source: Path, count: int, most: int) -> list[dict[str, str]]:
    """At most so many rows of `count` commands each."""
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    parts = [rows[start : start + count] for start in range(0, len(rows) - count + 1, count)][:most]
    return [
        {
            "prompt": "\n".join(row["prompt"] for row in part),
            "completion": ", ".join(row["completion"] for row in part),
        }
        for part in parts
    ]
