"""AdaLoRA's part between steps: importance, pruning, orthogonality (Zhang et al. 2023, arXiv 2303.10512).

PEFT has the layers and the allocator of ranks; this drives it: it hands it the gradients of the step, sets its
schedule by the run's number of steps, and keeps its memory for a resumed run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from peft import AdaLoraConfig
from torch import nn

from pedro.adapter_kinds import Adapter, LowRank
from pedro.errors import ConfigError
from pedro.methods.method import Method
from pedro.methods.options import Targets, expect, expect_count, expect_share, paths_of
from pedro.methods.reader import (
    LORA_FIELDS,
    MODULE_FIELDS,
    PEFT_FIELDS,
    ROOT,
    Reader,
    SavedTensors,
    input_width,
    rows_of,
    sites_by_module,
)

if TYPE_CHECKING:
    from pedro.methods.architectures import Architecture
    from pedro.model_protocols import ModelConfig

LEAST_STEPS = 4
UNKNOWN_STEPS = 1_000_000_000  # PEFT's config wants a number early; the hook sets the real one
MEMORY = ("ipt", "exp_avg_ipt", "exp_avg_unc")
PATTERN = "rank_pattern"
FIELDS = PEFT_FIELDS | MODULE_FIELDS | LORA_FIELDS | {"init_r", "target_r", "tinit", "tfinal", "deltaT"}
FIELDS |= {"beta1", "beta2", "orth_reg_weight", "total_step", PATTERN}


class AdaLora:
    """The `TrainingHook` of an AdaLoRA adapter. `start` and `end` are the shares of the steps between which it prunes.

    Without them, the config's own tinit, tfinal and deltaT hold. Raises ConfigError for a run that is too short.
    """

    def __init__(self, model: Any, steps: int, start: float | None = None, end: float | None = None) -> None:
        self.tuner = model.base_model
        self.config: AdaLoraConfig = model.peft_config["default"]
        self.allocator = self.tuner.rankallocator
        if steps < LEAST_STEPS:
            raise ConfigError(
                f"training.max_steps: AdaLoRA needs at least {LEAST_STEPS} steps to prune in, got {steps}",
                param="training.max_steps",
            )
        self.config.total_step = steps
        if start is not None and end is not None:
            last = min(steps - 1, max(2, round(end * steps)))
            self.config.tinit = min(last - 1, max(1, round(start * steps)))
            self.config.tfinal = steps - last
            self.config.deltaT = max(1, (last - self.config.tinit) // 20)
        if self.config.tinit >= steps - self.config.tfinal:
            raise ConfigError(
                f"method.tinit: tinit {self.config.tinit} and tfinal {self.config.tfinal} leave none of the {steps} "
                "steps to prune in; lower them",
                param="method.tinit",
            )
        self._named = [(n, p) for n, p in self.tuner.model.named_parameters() if "lora_" in n and p.requires_grad]
        self._grads: dict[str, torch.Tensor] = {}
        for name, parameter in self._named:
            parameter.register_post_accumulate_grad_hook(self._keeper(name))

    def penalty(self) -> torch.Tensor | None:
        """Mean distance of P Pᵀ and Qᵀ Q from the identity, times the config's weight (eq. 4)."""
        if not self.config.orth_reg_weight:
            return None
        total, count = torch.zeros((), device=self._named[0][1].device), 0
        for name, p in self._named:
            if "lora_A" in name or "lora_B" in name:
                square = p @ p.T if "lora_A" in name else p.T @ p  # [r, r]
                distance = square - torch.eye(len(square), device=p.device, dtype=p.dtype)
                total, count = total + distance.square().sum().clamp_min(1e-12).sqrt(), count + 1
        return self.config.orth_reg_weight * total / count

    def after_step(self, step: int) -> None:
        """Weigh every rank by the step's gradients and zero those beyond the budget (eq. 8 to 10)."""
        for name, parameter in self._named:
            parameter.grad = self._grads.get(name)
        self.tuner.update_and_allocate(step)
        for _, parameter in self._named:
            parameter.grad = None
        self._grads.clear()

    def settled(self, step: int) -> bool:
        """Whether ranks are pruned for good."""
        assert self.config.total_step is not None, "set at the start"
        return step >= self.config.total_step - self.config.tfinal

    def finish(self) -> None:
        """Nothing: PEFT leaves pruned ranks out when it saves."""

    def kept(self) -> int:
        """A, B and E of the ranks that are kept."""
        pattern = {name.removesuffix(".default"): ranks for name, ranks in (self.config.rank_pattern or {}).items()}
        total = 0
        for name, parameter in self._named:
            ranks = pattern.get(re.sub(r"lora_[ABE]\.default$", "lora_E", name))
            total += parameter.numel() if ranks is None else parameter.numel() // len(ranks) * sum(ranks)
        return total

    def state(self) -> dict[str, torch.Tensor]:
        """The allocator's memory, and the ranks that are kept once they are chosen."""
        state = {f"{kind}.{name}": tensor for kind in MEMORY for name, tensor in getattr(self.allocator, kind).items()}
        pattern = self.config.rank_pattern or {}
        return state | {f"{PATTERN}.{name}": torch.tensor(kept) for name, kept in pattern.items()}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over an allocator's memory and its ranks."""
        device = self._named[0][1].device
        for kind in MEMORY:
            own = {n.removeprefix(f"{kind}."): t.to(device) for n, t in state.items() if n.startswith(f"{kind}.")}
            setattr(self.allocator, kind, own)
        start = f"{PATTERN}."
        pattern = {n.removeprefix(start): t.tolist() for n, t in state.items() if n.startswith(start)}
        self.config.rank_pattern = pattern or None

    def _keeper(self, name: str) -> Any:
        def keep(parameter: nn.Parameter) -> None:
            # not a copy: clipping and the sum over workers happen in place, after this and before the step
            if parameter.grad is not None:
                self._grads[name] = parameter.grad

        return keep


def _build(  # noqa: PLR0913 - options
    model_config: ModelConfig,
    *,
    r: int = 8,
    target_r: int = 4,
    alpha: int = 16,
    dropout: float = 0.0,
    targets: Targets = None,
    start: float = 0.1,
    end: float = 0.5,
    orthogonality: float = 0.1,
) -> AdaLoraConfig:
    """`start` and `end`: shares of the steps between which ranks are pruned, read by the hook."""
    expect_count("r", r)
    expect_count("target_r", target_r)
    expect(target_r <= r, "target_r", f"at most r = {r}", target_r)
    expect_count("alpha", alpha)
    expect_share("dropout", dropout)
    expect_share("start", start)
    expect_share("end", end)
    expect(start < end, "end", f"more than start = {start}", end)
    good = isinstance(orthogonality, (int, float)) and orthogonality >= 0
    expect(good, "orthogonality", "a number >= 0", orthogonality)
    return AdaLoraConfig(
        init_r=r,
        target_r=target_r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        orth_reg_weight=orthogonality,
        total_step=UNKNOWN_STEPS,
        target_modules=paths_of(model_config, targets),
        fan_in_fan_out=model_config.model_type == "gpt2",
    )


def _read(config: AdaLoraConfig, tensors: SavedTensors, architecture: Architecture) -> Adapter:
    """For the engine: each module has the ranks that were kept, and singular values between its factors."""
    scaling = config.lora_alpha / (config.init_r + 1e-5)  # PEFT keeps to the first rank after pruning
    layers = []
    for block in architecture.layers:
        terms: dict[str, LowRank] = {}
        for path, sites in sites_by_module(block).items():
            prefix = f"{ROOT}{block.name}.{path}.lora_"
            if f"{prefix}A" not in tensors:
                continue
            rank, inputs = tensors.rows(f"{prefix}A"), input_width(block, sites, architecture.hidden_size)
            outputs = sum(block.linears[site].width for site in sites)
            a = tensors.take(f"{prefix}A", (rank, inputs)) * tensors.take(f"{prefix}E", (rank, 1))
            b = tensors.take(f"{prefix}B", (outputs, rank)) * scaling
            if rank:
                terms |= {site: LowRank(a.T, rows_of(b, block, site).T) for site in sites}
        layers.append(terms)
    return Adapter(low_rank=tuple(layers))


METHOD = Method(
    name="adalora",
    title="AdaLoRA",
    source="Zhang et al. 2023, arXiv 2303.10512",
    equation="y ← y + (α/r) P Λ Q x, half of Λ pruned",
    build=_build,
    readers=(Reader("ADALORA", _read, FIELDS),),
    mergeable=True,
    identity_at_init=True,
    make_hook=lambda model, steps, options: AdaLora(model, steps, options["start"], options["end"]),
)
