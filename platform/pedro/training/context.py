"""Assembles what a worker trains: backbone, method, engine, rows, plan. Imports neither Ray nor a registry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PrefixTuningConfig
from torch import nn

from pedro.backbone import Backbone, load_config, load_model, load_tokenizer, resolve_backbone
from pedro.cpu_attention import attend_in_float32
from pedro.errors import ConfigError
from pedro.evaluation.saved import take_weights, trains_backbone
from pedro.methods.packing import AttendAgain
from pedro.methods.registry import count_parameters, get_method
from pedro.process import return_freed_memory_at_once
from pedro.training.backbone_pieces import can_be_cut, fill, load_in_pieces
from pedro.training.batches import objective_of
from pedro.training.bilevel import Alternation, GroupedAdamW, Named
from pedro.training.engines import StepEngine, TorchEngine
from pedro.training.loop import Data, TrainingPlan
from pedro.training.prepare import PreparedData, Tell, make_training_plan, prepare_data, sample
from pedro.training.quantised_load import load_quantised
from pedro.training.worker_group import ALONE, WorkerGroup

if TYPE_CHECKING:
    from datasets import Dataset

    from pedro.methods.method import Method
    from pedro.model_protocols import Tokenizer
    from pedro.training.spec import FineTuneSpec, TrainingSpec

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
MakeEngine = Callable[[nn.Module, GroupedAdamW, Named], StepEngine]


@dataclass(frozen=True)
class TrainingContext:
    """Everything that one worker needs for a run; every worker builds the same."""

    spec: FineTuneSpec
    backbone: Backbone
    tokenizer: Tokenizer
    method: Method
    model: nn.Module
    prepared: PreparedData
    engine: StepEngine
    alternation: Alternation
    plan: TrainingPlan
    data: Data
    trainable_parameters: int

    def scored_rows(self) -> tuple[str, Dataset | None]:
        """The rows of the gate, and their split: test, validation or none."""
        return self.prepared.scored(self.spec.gate.max_rows)


def build_context(
    spec: FineTuneSpec,
    cache: Path,
    make_engine: MakeEngine | None = None,
    group: WorkerGroup = ALONE,
    parent: Path | None = None,
    bare: nn.Module | None = None,
    tell: Tell = lambda _text: None,
) -> TrainingContext:
    """Load and build everything; `make_engine` is what `torch_engine` or `deepspeed_engine` returns for the same spec.

    `parent` is the saved adapter whose weights the new one starts with; `bare` is the backbone, where it is loaded;
    `tell` hears of what takes long.

    A mistake in the spec raises its PedroError on every worker of the group, so that none waits for the others.
    """
    backbone, tokenizer, prepared = group.together(lambda: _prepare(spec, cache, tell))
    bare = bare if bare is not None else _load_backbone(spec, backbone, group)
    method, model = group.together(lambda: _adapt(spec, bare, backbone, prepared, parent))
    omega, theta = method.parameter_groups(model)
    with_theta = bool(theta) and spec.training.bilevel
    train, theta_rows, validation = group.together(lambda: prepared.splits(with_theta))
    plan = make_training_plan(spec.training, len(train), with_theta, objective_of(spec.beta))
    optimizer = make_optimizer(spec, method, omega, theta)
    parameters = [*omega, *theta]
    engine = (make_engine or torch_engine(spec))(model, optimizer, parameters)
    engine.hook = method.training_hook(model, spec.method.options, plan.steps)
    if engine.hook is not None and spec.resources.zero_stage:
        raise ConfigError(
            f"resources.zero_stage: {method.name} changes parameters between steps, which ZeRO does not support; use 0",
            param="resources.zero_stage",
        )
    data = Data(
        train=train,
        theta=theta_rows if theta_rows is not None else [],
        validation=sample(validation, spec.training.eval_rows) if validation is not None else [],
        pad_id=tokenizer.pad_token_id,
    )
    return TrainingContext(
        spec=spec,
        backbone=backbone,
        tokenizer=tokenizer,
        method=method,
        model=model,
        prepared=prepared,
        engine=engine,
        alternation=Alternation(optimizer, omega, theta),
        plan=plan,
        data=data,
        trainable_parameters=count_parameters(model)["trainable"],
    )


def make_optimizer(spec: FineTuneSpec, method: Method, omega: Named, theta: Named) -> GroupedAdamW:
    """The spec's optimizer. Raises ConfigError if a rate is set for b_up, but the method has none."""
    training = spec.training
    if training.b_up_lr_ratio is None:
        return GroupedAdamW(omega, theta, weight_decay=training.weight_decay)
    if not any(method.is_b_up(name) for name, _ in omega):
        raise ConfigError(
            f"training.b_up_lr_ratio: {method.name} has no b_up (only PEDRO and PARA do); leave it out",
            param="training.b_up_lr_ratio",
        )
    return GroupedAdamW(
        omega,
        theta,
        weight_decay=training.weight_decay,
        ratio=training.b_up_lr_ratio,
        is_faster=method.is_b_up,
    )


def check_reference(spec: FineTuneSpec, model: nn.Module) -> None:
    """Raise ConfigError if the objective needs the original backbone but the method changes it."""
    if spec.beta is not None and trains_backbone(model):
        raise ConfigError(
            f"objective: dpo compares the adapter with its backbone, but {spec.method.name} with these options "
            "trains the backbone; use a method that keeps it frozen",
            param="objective",
        )


def check_repeatable(spec: FineTuneSpec, model: nn.Module) -> None:
    """Raise ConfigError where gradient checkpointing would lose what a method hands to blocks."""
    config = getattr(model, "peft_config", {}).get("default")
    if spec.training.gradient_checkpointing and isinstance(config, PrefixTuningConfig):
        raise ConfigError(
            f"training.gradient_checkpointing: {spec.method.name} keeps its prefix in the KV cache, which blocks that "
            "are computed twice do not have; leave it false, and save memory by training.gradient_accumulation",
            param="training.gradient_checkpointing",
        )


def torch_engine(spec: FineTuneSpec) -> MakeEngine:
    """Plain torch, for one worker."""
    if spec.resources.workers > 1 or spec.resources.zero_stage:
        raise ConfigError("resources: more than one worker and ZeRO need DeepSpeed", param="resources")

    def make(model: nn.Module, optimizer: GroupedAdamW, parameters: Named) -> StepEngine:
        training = spec.training
        return TorchEngine(
            model,
            optimizer,
            parameters,
            accumulation=training.gradient_accumulation,
            clip=training.clip,
            packing=training.packing,
        )

    return make


def engine_for(spec: FineTuneSpec) -> MakeEngine:
    """The engine for a job, over the current process group: DeepSpeed's if it is needed."""
    return deepspeed_engine(spec) if needs_deepspeed(spec) else torch_engine(spec)


def needs_deepspeed(spec: FineTuneSpec) -> bool:
    """Whether DeepSpeed is needed; plain torch makes the same steps without its libraries."""
    return spec.resources.workers > 1 or spec.resources.zero_stage > 0 or _trains_in_bf16(spec)


def deepspeed_engine(spec: FineTuneSpec) -> MakeEngine:
    """DeepSpeed over the current process group."""

    def make(model: nn.Module, optimizer: GroupedAdamW, parameters: Named) -> StepEngine:
        from pedro.training.ds_engine import DeepSpeedEngine

        trained = [getattr(p, "ds_numel", p.numel()) for _, p in parameters]
        config = _deepspeed_config(spec, trained)
        return DeepSpeedEngine(model, optimizer, parameters, config, packing=spec.training.packing)

    return make


def _deepspeed_config(spec: FineTuneSpec, trained: Sequence[int] = ()) -> dict[str, Any]:
    from pedro.training.ds_config import deepspeed_config

    training, resources = spec.training, spec.resources
    return deepspeed_config(
        slice_rows=max(1, training.batch_size // (resources.workers * training.gradient_accumulation)),
        accumulation=training.gradient_accumulation,
        world=resources.workers,
        zero_stage=resources.zero_stage,
        clip=training.clip,
        bf16_masters=_trains_in_bf16(spec),
        on_gpu=device_of(spec) == "cuda",
        trained=trained,
    )


def _trains_in_bf16(spec: FineTuneSpec) -> bool:
    """Whether the trained parameters are bf16 and need float32 masters."""
    return spec.method.name == "full" and spec.training.precision == "bf16"


def device_of(spec: FineTuneSpec) -> str:
    """The device of the job's tensors."""
    return "cuda" if torch.cuda.is_available() and spec.resources.gpus_per_worker else "cpu"


def load_frozen(backbone: Backbone, training: TrainingSpec, device: str) -> nn.Module:
    """The backbone as a job trains over it: in its precision, its projections in fewer bits where it says so."""
    dtype, kind = DTYPES[training.precision], training.backbone_dtype
    return load_quantised(backbone, dtype, kind, device) if kind else load_model(backbone, dtype, device)


def _prepare(spec: FineTuneSpec, cache: Path, tell: Tell) -> tuple[Backbone, Tokenizer, PreparedData]:
    backbone = resolve_backbone(spec.backbone)
    tokenizer = load_tokenizer(backbone)
    method = get_method(spec.method.name)
    method.config(load_config(backbone), spec.method.options)  # before rows are tokenised
    if method.reads_weights and spec.resources.zero_stage == 3:
        raise ConfigError(
            f"resources.zero_stage: {method.name} needs the whole backbone, which stage 3 shards; use at most 2",
            param="resources.zero_stage",
        )
    return backbone, tokenizer, prepare_data(spec, backbone, tokenizer, cache, tell)


def _load_backbone(spec: FineTuneSpec, backbone: Backbone, group: WorkerGroup) -> nn.Module:
    """The frozen backbone; with ZeRO-3 only this worker's share, if the files can be read in pieces."""
    dtype, device = DTYPES[spec.training.precision], device_of(spec)
    if spec.resources.zero_stage < 3 or not group.together(lambda: can_be_cut(backbone)):
        return group.together(lambda: load_frozen(backbone, spec.training, device))
    from pedro.training.ds_engine import partitioning, pieces

    return_freed_memory_at_once()  # otherwise memory of whole tensors would stay allocated
    model = load_in_pieces(backbone, dtype, torch.device(device), partitioning(_deepspeed_config(spec)))
    group.together(lambda: fill(backbone, pieces(model)))
    if device == "cpu" and dtype != "float32":  # as `load_model` has it
        attend_in_float32(model)
    return model


def _adapt(
    spec: FineTuneSpec, model: nn.Module, backbone: Backbone, prepared: PreparedData, parent: Path | None
) -> tuple[Method, nn.Module]:
    """The backbone with a new adapter of the spec's method, the same on every worker and in every process."""
    method, head_end = get_method(spec.method.name), prepared.format.head_end
    torch.manual_seed(spec.training.seed)
    adapted: Any = method.apply(model, spec.method.options | ({"head_end": list(head_end)} if head_end else {}))
    check_repeatable(spec, adapted)
    if spec.training.gradient_checkpointing:
        how = {"use_reentrant": False, "context_fn": AttendAgain(adapted)}
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
    check_reference(spec, adapted)
    if parent is not None:
        take_weights(adapted, parent, backbone)
    return method, adapted
