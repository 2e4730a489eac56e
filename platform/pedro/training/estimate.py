"""Estimates a job before it starts: parameters, memory by part, steps and time. Starts no cluster.

Counts are exact; activation memory and step time are measured in a few real steps (`calibrate.py`), or else estimated;
the report says which.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import Backbone, load_config, load_tokenizer, resolve_backbone
from pedro.refs import ModelRef
from pedro.training.batches import objective_of
from pedro.training.calibrate import BOUND_S, Calibration, calibrate
from pedro.training.memory import BYTES, Footprint, Sizes, training_memory
from pedro.training.prepare import PreparedData, make_training_plan, notes, prepare_data

if TYPE_CHECKING:
    from torch import nn

    from pedro.training.spec import FineTuneSpec

# Measured with Ray 2 jobs of stories260K and pedro-nano, whose tensors take 2 and 10 MB: seconds besides training and
# scoring, and resident memory of a worker. DeepSpeed's by ZeRO stage, 1 and 2 workers, on two busy cores.
STARTUP_S, DEEPSPEED_STARTUP_S = 14.0, 45.0
PROCESS_BYTES = 650_000_000
DEEPSPEED_PROCESS_BYTES = {0: 770_000_000, 1: 790_000_000, 2: 790_000_000, 3: 810_000_000}
ROLES = {"theta": "theta (for the steps on Θ)"}
DPO_READS = "two sequences per row; the backbone reads both first, which leaves two numbers, then the adapter"
ASSUMED_FLOPS = {"cpu": 5e10, "gpu": 1e14}  # sustained; only used without timing


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
    memory_from: str
    """Whether activation memory was measured or estimated; the rest is counted."""
    process_bytes: int
    """Memory of a worker's process besides its tensors: libraries, including DeepSpeed's for a ZeRO stage."""
    steps: int
    optimizer_steps: int
    ends_by: str
    """Whether `epochs` or `max_steps` ends training, unless it stops improving earlier."""
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
            f"{ModelRef(spec['tenant'], spec['adapter'])}: {spec['method']['name']} on {spec['backbone']}",
            f"trainable    {trainable}; {share:.2f} % of the backbone's {self.backbone_parameters:,}",
            f"rows         {rows}; {self.tokens_per_row:.0f} tokens each",
            f"steps        {steps}",
            f"time         about {_duration(self.seconds)}: {parts}",
            f"             {self.seconds_per_step:.3f} s per step, {self.time_from}",
            f"memory       of each worker: {_size(tensors)} of tensors, "
            f"about {_size(tensors + self.process_bytes)} as a process",
        ]
        for name, size in self.memory_bytes.items():
            told = f" ({self.memory_from})" if name == "activations" else ""
            lines.append(f"  {name:<12}{_size(size):>10}{told}")
        lines.append(f"  {'process':<12}{_size(self.process_bytes):>10} (estimate)")
        if spec.get("objective") == "dpo":
            lines.insert(2, f"objective    dpo, β {spec['dpo']['beta']:g}: {DPO_READS}")
        resources = spec["resources"]
        if resources["zero_stage"] == 3 and resources["workers"] > 1 and "gathered" not in self.memory_bytes:
            lines.append("  each worker loads the whole backbone first: its files contain other tensors than the model")
        return "\n".join([*lines, *(f"note         {note}" for note in self.notes)])


def dry_run(spec: FineTuneSpec, calibrated: bool = True, bound_s: float = BOUND_S) -> DryRun:
    """Resolve a spec completely, data and method options included, and estimate the job.

    `calibrated`: load the backbone and time steps, for about `bound_s` at most. Raises the job's errors.
    """
    backbone = resolve_backbone(spec.backbone)
    with tempfile.TemporaryDirectory() as cache:
        prepared = prepare_data(spec, backbone, load_tokenizer(backbone), Path(cache))
        return _estimate(spec, backbone, prepared, Path(cache), bound_s if calibrated else None)


def _estimate(
    spec: FineTuneSpec, backbone: Backbone, prepared: PreparedData, cache: Path, bound_s: float | None
) -> DryRun:
    from pedro.methods.registry import count_parameters, get_method
    from pedro.training.backbone_pieces import can_be_cut
    from pedro.training.context import check_reference, check_repeatable, make_optimizer, needs_deepspeed

    model, held = _shapes(spec, backbone)
    method = get_method(spec.method.name)
    omega, theta = method.parameter_groups(model)
    check_reference(spec, model)
    check_repeatable(spec, model)
    make_optimizer(spec, method, omega, theta)  # raises the job's errors
    counts = count_parameters(model)
    frozen = counts["total"] - counts["trainable"]
    backbone_parameters = counts["total"] if method.name == "full" else frozen
    bilevel = bool(theta) and spec.training.bilevel
    train, theta_rows, validation = prepared.splits(bilevel)
    plan = make_training_plan(spec.training, len(train), bilevel, objective_of(spec.beta))
    method.training_hook(model, spec.method.options, plan.steps)
    tokens, longest, longest_answer = prepared.lengths()
    split, scored = prepared.scored(spec.gate.max_rows)
    validations = -(-plan.steps // plan.validate_every) if validation is not None else 0
    validated = validations * min(len(validation), spec.training.eval_rows) if validation is not None else 0
    to_score = 2 * len(scored) if scored is not None else 0  # with the adapter and without
    device = "gpu" if spec.resources.gpus_per_worker else "cpu"
    work = (6 if method.name == "full" or spec.beta is not None else 4) * backbone_parameters * tokens * plan.batch_size
    per_worker = work / spec.resources.workers / ASSUMED_FLOPS[device]
    in_pieces = spec.resources.zero_stage == 3 and can_be_cut(backbone)
    found: Calibration | str = "not asked for"
    if bound_s is not None:
        row_s = per_worker / max(1, plan.batch_size // spec.resources.workers)
        found = calibrate(
            spec,
            cache,
            plan.batch_size,
            parameters=counts["total"],
            trained=counts["trainable"],
            row_s=row_s,
            bound_s=bound_s,
            in_pieces=in_pieces,
            held=held.total if held and can_be_cut(backbone) else None,
        )
    if isinstance(found, Calibration):
        per_step, a_validated, a_scored = found.per_step, found.per_validated, found.per_scored
        time_from = f"timed on this machine ({found.steps} steps of {found.rows} rows)"
    else:
        per_step = per_worker * (1 + (1 / plan.theta_every if bilevel else 0))
        a_validated = a_scored = 2 * backbone_parameters * tokens / ASSUMED_FLOPS[device]
        speed = f"{work:.1e} operations per step at an assumed {ASSUMED_FLOPS[device]:.0e}/s for each worker"
        time_from = f"from {speed}; not timed: {found}"
    rows = {"train": len(train)}
    if theta_rows is not None:
        rows["theta"] = len(theta_rows)
    if validation is not None:
        rows["validation"] = len(validation)
    if split == "test" and scored is not None:
        rows["test"] = len(scored)
    largest = max(p.numel() for p in model.parameters()) if in_pieces else 0
    shape = model.config
    sizes = Sizes(shape.hidden_size, shape.num_hidden_layers, shape.vocab_size, largest, _block(model))
    memory = _memory(spec, sizes, (frozen, counts["trainable"], held), plan.batch_size, longest, longest_answer)
    measured = isinstance(found, Calibration) and found.activation_bytes is not None
    if isinstance(found, Calibration) and found.activation_bytes is not None:
        memory["activations"] = found.activation_bytes
    workers, deepspeed = spec.resources.workers, needs_deepspeed(spec)
    parts = {
        "to start": DEEPSPEED_STARTUP_S if deepspeed else STARTUP_S,
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
        memory_bytes=memory,
        memory_from="measured" if measured else "estimate",
        process_bytes=DEEPSPEED_PROCESS_BYTES[spec.resources.zero_stage] if deepspeed else PROCESS_BYTES,
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


def _shapes(spec: FineTuneSpec, backbone: Backbone) -> tuple[Any, Footprint | None]:
    """The model with its adapter, without memory for its parameters, and the bytes of a backbone in 8 or 4 bit."""
    import torch
    from transformers import AutoModelForCausalLM

    from pedro.methods.registry import get_method
    from pedro.training.quantised_load import footprint

    config, kind = load_config(backbone), spec.training.backbone_dtype
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
        held = footprint(model, kind, BYTES[spec.training.precision]) if kind else None
        return get_method(spec.method.name).apply(model, spec.method.options), held


def _block(model: nn.Module) -> int:
    """Parameters of the largest block, what an adapter has in it included."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    blocks = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    return max((sum(p.numel() for p in block.parameters()) for block in blocks), default=0)


def _memory(
    spec: FineTuneSpec,
    sizes: Sizes,
    counts: tuple[int, int, Footprint | None],
    batch_size: int,
    longest: int,
    longest_answer: int,
) -> dict[str, int]:
    """Bytes on each worker, by part. `counts`: frozen and trained parameters, and bytes of a backbone in fewer bits."""
    frozen, trainable, held = counts
    training, resources = spec.training, spec.resources
    rows = -(-batch_size // (resources.workers * training.gradient_accumulation))
    rows *= 1 if spec.beta is None else 2  # sequences; the reference's pass precedes theirs and needs less
    return training_memory(
        sizes,
        frozen=frozen,
        trainable=trainable,
        precision=training.precision,
        full=spec.method.name == "full",
        tokens=rows * longest,
        answer_tokens=rows * longest_answer,
        gradient_checkpointing=training.gradient_checkpointing,
        workers=resources.workers,
        zero_stage=resources.zero_stage,
        on_gpu=resources.gpus_per_worker > 0,
        held=held,
    )


def _size(size: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    return f"{seconds:.0f} s" if minutes < 2 else f"{minutes:.0f} min" if hours < 2 else f"{hours:.1f} h"
