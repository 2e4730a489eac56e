"""What a job would take, before it starts: parameters, memory by part, steps and time. Starts no cluster.

Counts are exact; what activations take and how long a step lasts are estimates, and the report says which. A model
of at most 100 M parameters, its adapter included, is timed on this machine; of a larger one only the shapes are made.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import Backbone, load_config, load_tokenizer, resolve_backbone
from pedro.training.memory import Sizes, training_memory
from pedro.training.prepare import PreparedData, make_training_plan, notes, prepare_data

if TYPE_CHECKING:
    from pedro.model_protocols import ModelConfig
    from pedro.training.spec import FineTuneSpec

TIMED_PARAMETERS = 100_000_000
# Measured with Ray 2 jobs of stories260K on two cores that were busy otherwise too (load 3 to 5), 1 and 2 workers, ZeRO
# 0, 1 and 3: 45 to 60 s beside training and scoring; resident memory of a worker, whose tensors take 2 MB.
STARTUP_S = 45.0
PROCESS_BYTES = {0: 770_000_000, 1: 790_000_000, 2: 790_000_000, 3: 810_000_000}
ROLES = {"theta": "theta (for the steps on Θ)"}
SCORED_ROWS = 8  # that are timed
ASSUMED_FLOPS = {"cpu": 5e10, "gpu": 1e14}  # sustained; only for backbones that are not timed here


@dataclass(frozen=True)
class DryRun:
    """The report of `pedro submit --dry-run`. Memory is bytes on each worker."""

    spec: dict[str, Any]
    trainable_parameters: int
    trainable_without_bias: int
    backbone_parameters: int
    rows: dict[str, int]
    tokens_per_row: float
    memory_bytes: dict[str, int]
    process_bytes: int
    """What a worker's process takes beside its tensors: libraries, and DeepSpeed's own for a ZeRO stage."""
    steps: int
    optimizer_steps: int
    ends_by: str
    """Which of `epochs` and `max_steps` ends training, unless it stops improving before."""
    seconds_per_step: float
    seconds: float
    """Of the whole job: start-up, steps, validations, scoring."""
    seconds_by_part: dict[str, float]
    time_from: str
    notes: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        spec, share = self.spec, 100 * self.trainable_parameters / max(1, self.backbone_parameters)
        rows = ", ".join(f"{count:,} {ROLES.get(name, name)}" for name, count in self.rows.items())
        trainable = f"{self.trainable_parameters:,} parameters, {self.trainable_without_bias:,} without biases"
        training = spec["training"]
        steps = f"{self.steps:,} of {training['batch_size']} rows, ended by {self.ends_by}"
        if (theta := self.optimizer_steps - self.steps) > 0:
            steps = f"{self.steps:,} on Ω and {theta:,} on Θ ({self.optimizer_steps:,} optimizer steps)" + (
                f" of {training['batch_size']} rows, ended by {self.ends_by}"
            )
        parts = ", ".join(f"{_duration(value)} {name}" for name, value in self.seconds_by_part.items())
        tensors = sum(self.memory_bytes.values())
        lines = [
            f"{spec['tenant']}.{spec['adapter']}: {spec['method']['name']} on {spec['backbone']}",
            f"trainable    {trainable}; {share:.2f} % of the backbone's {self.backbone_parameters:,}",
            f"rows         {rows}; {self.tokens_per_row:.0f} tokens each",
            f"steps        {steps}",
            f"time         about {_duration(self.seconds)}: {parts}",
            f"             {self.seconds_per_step:.3f} s a step, {self.time_from}",
            f"memory       of each worker: {_size(tensors)} of tensors, "
            f"about {_size(tensors + self.process_bytes)} as a process",
        ]
        for name, size in self.memory_bytes.items():
            lines.append(f"  {name:<12}{_size(size):>10}{' (estimate)' if name == 'activations' else ''}")
        lines.append(f"  {'process':<12}{_size(self.process_bytes):>10} (estimate)")
        if spec["resources"]["zero_stage"] == 3:
            lines.append("  stage 3 saves no memory of a worker's process here: each loads the whole backbone first")
        return "\n".join([*lines, *(f"note         {note}" for note in self.notes)])


def dry_run(spec: FineTuneSpec) -> DryRun:
    """Resolve a spec completely, data and method options included, and say what it would take.

    Raises the same errors as the job would.
    """
    backbone = resolve_backbone(spec.backbone)
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare_data(spec.data, spec.training, backbone, load_tokenizer(backbone), Path(cache))
        return _estimate(spec, backbone, prepared, Path(cache))


def _estimate(spec: FineTuneSpec, backbone: Backbone, prepared: PreparedData, cache: Path) -> DryRun:
    from pedro.methods.registry import count_parameters, get_method

    model = _shapes(spec, backbone)
    method = get_method(spec.method.name)
    _, theta = method.parameter_groups(model)
    counts = count_parameters(model)
    frozen = counts["total"] - counts["trainable"]
    backbone_parameters = counts["total"] if method.name == "full" else frozen
    bilevel = bool(theta) and spec.training.bilevel
    train, theta_rows, validation = prepared.splits(bilevel)
    plan = make_training_plan(spec.training, len(train), bilevel)
    method.training_hook(model, spec.method.options, plan.steps)
    tokens, longest, longest_answer = prepared.lengths()
    split, scored = prepared.scored(spec.gate.max_rows)
    validations = -(-plan.steps // plan.validate_every) if validation is not None else 0
    validated = validations * min(len(validation), spec.training.eval_rows) if validation is not None else 0
    to_score = 2 * len(scored) if scored is not None else 0  # with the adapter and without
    small = counts["total"] <= TIMED_PARAMETERS and not spec.resources.gpus_per_worker
    if small:
        (per_step, a_validated, a_scored), time_from = _timed(spec, cache, plan.batch_size), "timed on this machine"
    else:
        device = "gpu" if spec.resources.gpus_per_worker else "cpu"
        work = (6 if method.name == "full" else 4) * backbone_parameters * tokens * plan.batch_size
        rate = ASSUMED_FLOPS[device] * spec.resources.workers
        per_step = work / rate * (1 + (1 / plan.theta_every if bilevel else 0))
        a_validated = a_scored = 2 * backbone_parameters * tokens / ASSUMED_FLOPS[device]
        time_from = f"from {work:.1e} operations a step at an assumed {ASSUMED_FLOPS[device]:.0e}/s for each worker"
    rows = {"train": len(train)}
    if theta_rows is not None:
        rows["theta"] = len(theta_rows)
    if validation is not None:
        rows["validation"] = len(validation)
    if split == "test" and scored is not None:
        rows["test"] = len(scored)
    workers = spec.resources.workers
    parts = {
        "to start": STARTUP_S,
        "of steps": per_step * plan.steps,
        "of validation": a_validated * validated / workers,
        "of scoring": a_scored * to_score / workers,
    }
    return DryRun(
        spec=spec.to_dict(),
        trainable_parameters=counts["trainable"],
        trainable_without_bias=counts["trainable_without_bias"],
        backbone_parameters=backbone_parameters,
        rows=rows,
        tokens_per_row=tokens,
        memory_bytes=_memory(spec, model.config, frozen, counts["trainable"], plan.batch_size, longest, longest_answer),
        process_bytes=PROCESS_BYTES[spec.resources.zero_stage],
        steps=plan.steps,
        optimizer_steps=plan.optimizer_steps(plan.steps),
        ends_by=_ends_by(spec, plan.steps),
        seconds_per_step=per_step,
        seconds=sum(parts.values()),
        seconds_by_part=parts,
        time_from=time_from,
        notes=notes(prepared, spec.training, plan),
    )


def _ends_by(spec: FineTuneSpec, steps: int) -> str:
    training = spec.training
    if training.epochs is None:
        return f"max_steps ({training.max_steps:,})"
    if training.max_steps is not None and steps == training.max_steps:
        return f"max_steps ({training.max_steps:,}), before epochs ({training.epochs:g})"
    return f"epochs ({training.epochs:g})" + (
        f", before max_steps ({training.max_steps:,})" if training.max_steps is not None else ""
    )


def _shapes(spec: FineTuneSpec, backbone: Backbone) -> Any:
    """The model with its adapter, without memory behind its parameters."""
    import torch
    from transformers import AutoModelForCausalLM

    from pedro.methods.registry import get_method

    config = load_config(backbone)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        return get_method(spec.method.name).apply(model, spec.method.options)


def _memory(
    spec: FineTuneSpec,
    config: ModelConfig,
    frozen: int,
    trainable: int,
    batch_size: int,
    longest: int,
    longest_answer: int,
) -> dict[str, int]:
    """Bytes on each worker, by part."""
    training, resources = spec.training, spec.resources
    rows = -(-batch_size // (resources.workers * training.gradient_accumulation))
    return training_memory(
        Sizes(config.hidden_size, config.num_hidden_layers, config.vocab_size),
        frozen=frozen,
        trainable=trainable,
        precision=training.precision,
        full=spec.method.name == "full",
        tokens=rows * longest,
        answer_tokens=rows * longest_answer,
        gradient_checkpointing=training.gradient_checkpointing,
        workers=resources.workers,
        zero_stage=resources.zero_stage,
    )


def _timed(spec: FineTuneSpec, cache: Path, batch_size: int) -> tuple[float, float, float]:
    """Seconds of one step (Ω, and Θ where it has its turn) on one worker's share, of one row that is validated, and of
    one that is scored, measured in this process.
    """
    from pedro.evaluation.scoring import score
    from pedro.training.batches import RowStream
    from pedro.training.bilevel import OMEGA, THETA
    from pedro.training.context import build_context
    from pedro.training.loop import batch_step, mean_loss
    from pedro.training.worker_group import ALONE

    share = max(1, batch_size // spec.resources.workers)
    accumulation = min(spec.training.gradient_accumulation, share)
    alone = spec.model_copy(
        update={
            "resources": spec.resources.model_copy(update={"workers": 1, "zero_stage": 0}),
            "training": spec.training.model_copy(update={"batch_size": share, "gradient_accumulation": accumulation}),
        }
    )
    context = build_context(alone, cache)
    plan, data, engine = context.plan, context.data, context.engine
    streams = [(OMEGA, RowStream(data.train, share, 0), 1.0)]
    if plan.bilevel:
        streams.append((THETA, RowStream(data.theta, share, 0), 1 / plan.theta_every))
    engine.mode(training=True)
    total = 0.0
    for role, stream, turns in streams:
        context.alternation.activate(*((role,) if plan.bilevel else (OMEGA, THETA)))
        batch_step(engine, stream.batch(0), plan, data.pad_id, salt=0)
        started = time.perf_counter()
        for k in (1, 2):
            batch_step(engine, stream.batch(k), plan, data.pad_id, salt=k)
        total += turns * (time.perf_counter() - started) / 2
    a_validated = a_scored = 0.0
    if len(data.validation):
        some = [data.validation[i] for i in range(min(len(data.validation), share))]
        started = time.perf_counter()
        mean_loss(engine, some, share, data.pad_id, ALONE)
        a_validated = (time.perf_counter() - started) / len(some)
    _, scored = context.scored_rows()
    if scored is not None:
        some = [scored[i] for i in range(min(len(scored), SCORED_ROWS))]
        engine.mode(training=False)
        started = time.perf_counter()
        score(context.model, context.tokenizer, some)
        a_scored = (time.perf_counter() - started) / len(some)
    return total, a_validated, a_scored


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
