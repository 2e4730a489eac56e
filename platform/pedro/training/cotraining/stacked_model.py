"""One model over the frozen backbone that applies to each row the adapter of the row's job. torch only.

It uses the method's own tuner, so that options act as in a single job; but where the tuner would read one adapter's
parameters, it gets those of all jobs in the pass, stacked. A pass is packed where a lone job's could be, whatever the
backbone's width: the more rows, the more of a padded batch is padding. Legend: S jobs in the pass, b rows of each, B
all rows, T tokens, N tokens of a packed pass, D width of an input, W of an output, R bottleneck or rank.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.ia3 import Linear as IA3Linear
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional

from pedro.adapter_kinds import rational
from pedro.adapter_kinds.generator import FIXED_ACTIVATIONS
from pedro.errors import ConfigError
from pedro.methods.constants.layer import ConstantLayer
from pedro.methods.output_head import logits_at
from pedro.methods.packing import packer_of
from pedro.methods.pedro.layer import PedroLayer
from pedro.training.cotraining import each_job
from pedro.training.engines import packed_logits

if TYPE_CHECKING:
    from pedro.training.cotraining.coordinator import Reading

NAME = "default"  # PEFT's, of the only adapter
DROPOUTS = ("dropout", "pdrop", "layerdrop")


def tied_copy(model: nn.Module) -> nn.Module:
    """A second tree of modules over the same weights; adapters added to one tree do not affect the other."""
    memo: dict[int, Any] = {id(p): nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, memo)


def check_repeatable(model: nn.Module) -> None:
    """Raise ConfigError for a backbone with dropout: other jobs' rows would change a job's random numbers."""
    config: Any = model.config
    names = [name for name in config.to_dict() if any(part in name for part in DROPOUTS)]
    drops = [name for name in names if isinstance(value := getattr(config, name, 0), (int, float)) and value > 0]
    if drops:
        raise ConfigError(
            f"resources.share: the backbone trains with {drops[0]}, whose random numbers would depend on other jobs; "
            "leave it false",
            param="resources.share",
        )


@dataclass
class RowsOfJobs:
    """The owners of the current pass's rows and tokens."""

    owners: list[int] = field(default_factory=list)
    """The jobs' numbers, in the order of their rows."""
    counts: list[int] = field(default_factory=list)
    """Rows of each."""
    tokens: list[int] = field(default_factory=list)
    """Tokens of each, padding among them unless the pass is packed."""
    packed: bool = False

    def by_owner(self, x: torch.Tensor) -> torch.Tensor:
        """[B, …] as [S, b, …]; jobs with fewer rows are padded with zeros."""
        if _alike(self.counts):
            return x.reshape(len(self.counts), self.counts[0], *x.shape[1:])
        return nn.utils.rnn.pad_sequence(list(x.split(self.counts)), batch_first=True)

    def in_order(self, x: torch.Tensor) -> torch.Tensor:
        """`by_owner` undone."""
        if _alike(self.counts):
            return x.flatten(0, 1)
        return torch.cat([part[:count] for part, count in zip(x, self.counts, strict=True)])

    def each(self, vectors: torch.Tensor) -> torch.Tensor:
        """One of the vectors [S, W] for each row [B, 1, W], or, in a packed pass, for each token [1, N, W]."""
        if self.packed:
            return each_job.spread(self.tokens, vectors)[None]
        return self.in_order(vectors[:, None].expand(-1, max(self.counts), -1))[:, None]

    def scaled(self, x: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
        """x [B, T, W], or [1, N, W], times each row's or token's of the vectors [S, W]."""
        if self.packed:
            return each_job.scale(x.squeeze(0), self.tokens, vectors)[None]
        return x * self.each(vectors)


def _alike(counts: Sequence[int]) -> bool:
    return len(set(counts)) == 1


class Own:
    """The adapter modules of one place by job, whose parameters are used at this place of the stacked model."""

    def __init__(self, rows: RowsOfJobs) -> None:
        self.rows, self.modules = rows, dict[int, Any]()

    def stacked(self, parameter: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        """[S, …] of the jobs in the pass."""
        return torch.stack([parameter(self.modules[owner]) for owner in self.rows.owners])

    def first(self) -> Any:
        return self.modules[self.rows.owners[0]]


class StackedLinear(nn.Module):
    """One of LoRA's two factors."""

    def __init__(self, own: Own, factor: str) -> None:
        super().__init__()
        self._own, self._factor = own, factor

    def _of(self, layer: Any) -> torch.Tensor:
        weight: torch.Tensor = getattr(layer, self._factor)[NAME].weight
        return weight

    @property
    def weight(self) -> torch.Tensor:
        """The first job's weight, whose dtype PEFT reads."""
        return self._of(self._own.first())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [B, T, D] -> [B, T, R], or R -> W."""
        rows = self._own.rows
        if _alike(rows.tokens):
            together = x.reshape(len(rows.tokens), -1, x.shape[-1])  # [S, b·T, D]
            made = torch.bmm(together, self._own.stacked(self._of).mT)
        else:
            factors = [self._of(self._own.modules[owner]) for owner in rows.owners]
            made = each_job.linear(x.flatten(0, 1), rows.tokens, factors)
        return made.view(*x.shape[:-1], -1)


class StackedScale:
    """(IA)³'s vector, in the form of the parameter that PEFT reads: 1 · vector, by which it multiplies."""

    def __init__(self, own: Own) -> None:
        self._own = own

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self._own.first().ia3_l[NAME].dtype
        return dtype

    def flatten(self) -> StackedScale:
        return self

    def __rmul__(self, other: torch.Tensor | int) -> torch.Tensor | StackedScale:
        if not isinstance(other, torch.Tensor):
            return self
        return self._own.rows.scaled(other, self._own.stacked(lambda layer: layer.ia3_l[NAME].flatten()))


def _weave(module: nn.Module, own: Own) -> bool:
    """Make a tuner's module use the parameters of `own`; False for a module that is not a tuner's."""
    layer: Any = module
    if isinstance(module, PedroLayer):
        layer.made = partial(_vectors_made, own)
    elif isinstance(module, ConstantLayer):
        layer.vectors = partial(_constants, own)
    elif isinstance(module, LoraLinear):
        for factor in ("lora_A", "lora_B"):
            getattr(layer, factor)[NAME] = StackedLinear(own, factor)
    elif isinstance(module, IA3Linear):
        del layer.ia3_l
        layer.ia3_l = {NAME: StackedScale(own)}
    else:
        return False
    return True


def _vectors_made(own: Own, pooled: torch.Tensor, _name: str) -> torch.Tensor:
    """`PedroLayer.made`: pooled [B, D] -> [B, W], each row by the generator of its job."""
    rows = own.rows
    weights = [own.modules[owner].generator(NAME) for owner in rows.owners]
    with torch.autocast(device_type=pooled.device.type, enabled=False):
        hidden = torch.bmm(rows.by_owner(pooled.float()), torch.stack([w.down for w in weights]))  # [S, b, R]
        if weights[0].activation == "rational":
            hidden = rational(hidden, *(torch.stack([w[part] for w in weights])[:, None] for part in (4, 5)))
        else:
            hidden = FIXED_ACTIVATIONS[weights[0].activation](hidden)
        bias = torch.stack([w.bias for w in weights])[:, None]
        return rows.in_order(torch.bmm(hidden, torch.stack([w.up for w in weights])) + bias)


def _constants(own: Own, _name: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """`ConstantLayer.vectors`: [B, 1, W] instead of each [W], or [1, N, W]."""
    made = [own.modules[owner].vectors(NAME) for owner in own.rows.owners]
    scales, shifts = (
        {target: own.rows.each(torch.stack([one[kind][target] for one in made])) for target in made[0][kind]}
        for kind in (0, 1)
    )
    return scales, shifts


class StackedModel:
    """The passes of a coordinator."""

    def __init__(self, model: nn.Module, pad_id: int, packing: bool = True) -> None:
        """`model` is the backbone with a fresh adapter of the jobs' common method; without `packing`, passes are
        padded."""
        self._model, self._pad_id, self._rows = model.eval(), pad_id, RowsOfJobs()
        self._pack = packer_of(model, narrowest=0) if packing else None
        self._own: dict[str, Own] = {}
        for path, module in list(model.named_modules()):
            own = Own(self._rows)
            if _weave(module, own):
                self._own[path] = own
        assert self._own, "the stacked model does not support this method's tuner"
        self._config = _form(model)

    def join(self, number: int, model: nn.Module) -> None:
        """Apply the adapter of `model` to the rows of the job with this number."""
        assert _form(model) == self._config, "the jobs' adapters must have the same form"
        for path, own in self._own.items():
            own.modules[number] = model.get_submodule(path)

    def leave(self, number: int) -> None:
        """Forget a job."""
        for own in self._own.values():
            own.modules.pop(number, None)

    def read(self, parts: Sequence[tuple[int, Reading]]) -> list[torch.Tensor]:
        """The logits [N, V] of each part's positions, all in one pass."""
        counts = [len(reading.positions) for _, reading in parts]
        width = max(reading.positions.shape[1] for _, reading in parts)
        positions = torch.cat([_wider(reading.positions, width, False) for _, reading in parts])
        fill = {"input_ids": self._pad_id, "attention_mask": 0}
        batch = {
            name: torch.cat(
                [_wider(t, width, fill[name]) if name in fill else t for t in (r.batch[name] for _, r in parts)]
            )
            for name in parts[0][1].batch
        }
        rows, packing = self._rows, self._pack(batch, counts) if self._pack else None
        rows.owners, rows.counts, rows.packed = [number for number, _ in parts], counts, packing is not None
        if packing is not None:
            rows.tokens = [job.tokens.stop - job.tokens.start for job in packing.jobs]
            logits = packed_logits(self._model, packing, positions, batch)
        else:
            rows.tokens = [count * width for count in counts]
            with logits_at(self._model, positions):
                logits = self._model(**batch, use_cache=False).logits[0]
        return list(logits.split([int(reading.positions.sum()) for _, reading in parts]))


def _form(model: Any) -> dict[str, Any]:
    """The shapes of an adapter's parameters, and its configuration."""
    form: dict[str, Any] = model.peft_config[NAME].to_dict()
    return form


def _wider(tensor: torch.Tensor, width: int, value: float) -> torch.Tensor:
    """[B, T] with more columns on the right."""
    missing = width - tensor.shape[1]
    return functional.pad(tensor, (0, missing), value=value) if missing else tensor
