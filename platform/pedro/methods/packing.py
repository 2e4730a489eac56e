"""Rows of unequal length one behind the other, so that a pass computes nothing for padding.

A packed pass is one row [1, N] whose positions begin anew with each row of the batch. What all rows of one job begin
with stands in it once, ahead of their rests, wherever an adapter makes the same of it in every row. All that acts token
by token, projections, norms and most adapters, needs no change; attention pads for itself alone, and what knows rows
finds them in the argument `packing`, which transformers' models hand down. Numbers are those of the padded batch, to
rounding. Legend: B rows, T tokens of the longest, P of a prefix in the cache, N of the packed pass, H heads, d width of
a head, W of a vector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import torch
from peft import PrefixTuningConfig
from peft.tuners.adalora import AdaLoraModel
from peft.tuners.ia3 import IA3Model
from peft.tuners.lora import LoraModel
from peft.tuners.miss import MissModel
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface

from pedro.cpu_attention import NAME as FLOAT32

NAME = "pedro_packed"
CHECKPOINTING = "gradient_checkpointing"  # what transformers sets in modules that it repeats
TOKENWISE = (LoraModel, AdaLoraModel, IA3Model, MissModel)  # of PEFT's tuners; ours say so (`BlockTuner.packs`)
WIDTH = 256  # of a model: in a narrower one what is saved is no more than what packing takes
SAVED = 0.05  # of a batch's tokens: less is not worth a packed pass


class _Padded(torch.autograd.Function):
    """`Packing.pad` of tokens [N, …], with as few passes back."""

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        padded = tokens.new_zeros(packing.mask.numel(), *tokens.shape[1:])
        padded.index_copy_(0, packing.places, tokens)
        padded = padded.view(*packing.mask.shape, *tokens.shape[1:])
        for job in packing.sharing:
            padded[job.rows, : job.shared] = tokens[job.beginning]
        return padded

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        packing: Packing = ctx.packing
        back = grad.flatten(0, 1).index_select(0, packing.places)
        for job in packing.sharing:
            torch.sum(grad[job.rows, : job.shared], dim=0, out=back[job.beginning])
        return back, None


class _Packed(torch.autograd.Function):
    """`Packing.pack` of a batch [B · T, …]. No place is taken twice, so gradients are copied, not added."""

    @staticmethod
    def forward(ctx: Any, padded: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return padded.index_select(0, packing.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        packing: Packing = ctx.packing
        back = grad.new_zeros(packing.mask.numel(), *grad.shape[1:])
        return back.index_copy_(0, packing.places, grad), None


class _Spread(torch.autograd.Function):
    """`Packing.spread` of vectors [B, W]. Back, each job's are summed for themselves: NaN of one stays its own."""

    @staticmethod
    def forward(ctx: Any, vectors: torch.Tensor, packing: Packing) -> torch.Tensor:
        ctx.packing = packing
        return vectors.index_select(0, packing.owners)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        packing: Packing = ctx.packing
        back = grad.new_empty(len(packing.mask), grad.shape[1])
        for job, ones in zip(packing.jobs, packing.ones, strict=True):
            torch.mm(ones, grad[job.tokens], out=back[job.rows])
        return back, None


class JobOfBatch(NamedTuple):
    """The rows of one job, which are neighbours, and its packed tokens, which are, too."""

    rows: slice
    tokens: slice
    shared: int
    """How many of the first tokens are the beginning of all rows."""

    @property
    def beginning(self) -> slice:
        """The packed tokens that all rows begin with."""
        return slice(self.tokens.start, self.tokens.start + self.shared)


@dataclass(frozen=True, eq=False)
class Packing:
    """Where the tokens of a padded batch lie; every row has some of its own."""

    mask: torch.Tensor
    """[B, T] bool: what is no padding, which is on the right."""
    places: torch.Tensor
    """[N]: of the packed tokens among B · T; of shared ones in their job's first row."""
    jobs: tuple[JobOfBatch, ...]
    """Whose rows the batch has, in their order."""

    @classmethod
    def of(cls, batch: Mapping[str, torch.Tensor], share: bool = False, rows: Sequence[int] = ()) -> Packing:
        """For `input_ids` and `attention_mask` [B, T], padded on the right, and `prompt_lens` [B], of jobs with so many
        `rows` each, or of one. With `share`, what all rows of a job begin with is taken once, up to where a prompt has
        but its last token left."""
        mask, ids = batch["attention_mask"].bool(), batch["input_ids"]
        taken, jobs, first, start = mask.clone(), list[JobOfBatch](), 0, 0
        for count in rows or (len(ids),):
            mine, shared = slice(first, first + count), 0
            if share and count > 1:
                same = (ids[mine] == ids[first]).all(0).long().cumprod(0).sum()
                shared = max(0, min(int(same), int(batch["prompt_lens"][mine].min()) - 1))
                taken[first + 1 : first + count, :shared] = False
            tokens = int(taken[mine].sum())
            jobs.append(JobOfBatch(mine, slice(start, start + tokens), shared))
            first, start = first + count, start + tokens
        return cls(mask, taken.flatten().nonzero().flatten(), tuple(jobs))

    @property
    def saved(self) -> float:
        """The share of the padded batch that need not be computed."""
        return 1 - len(self.places) / self.mask.numel()

    @property
    def shared(self) -> int:
        """How many of the packed tokens stand for several rows."""
        return sum(job.shared for job in self.jobs)

    @cached_property
    def sharing(self) -> tuple[JobOfBatch, ...]:
        """The jobs whose rows share a beginning."""
        return tuple(job for job in self.jobs if job.shared)

    def lengthened(self, count: int) -> Packing:
        """That of rows with `count` more tokens each, in front."""
        assert not self.shared, "what is put in front of each row makes different tokens of the same beginning"
        mask = functional.pad(self.mask, (count, 0), value=True)
        jobs = [
            JobOfBatch(rows, slice(tokens.start + count * rows.start, tokens.stop + count * rows.stop), 0)
            for rows, tokens, _ in self.jobs
        ]
        return Packing(mask, mask.flatten().nonzero().flatten(), tuple(jobs))

    def pad(self, packed: torch.Tensor) -> torch.Tensor:
        """[1, N, …] -> [B, T, …], zeros for padding."""
        function: Any = _Padded
        padded: torch.Tensor = function.apply(packed.squeeze(0), self)  # a view; back from [0] would be a copy
        return padded

    def pack(self, padded: torch.Tensor) -> torch.Tensor:
        """[B, T, …] -> [1, N, …]; of what is shared, the first row's."""
        function: Any = _Packed
        packed: torch.Tensor = function.apply(padded.flatten(0, 1), self)
        return packed[None]

    def spread(self, vectors: torch.Tensor) -> torch.Tensor:
        """Of each row's vector [B, W], float32, one for each of its tokens [1, N, W], where none is shared."""
        assert not self.shared, "vectors that differ by row make different tokens of the same beginning"
        function: Any = _Spread
        spread: torch.Tensor = function.apply(vectors, self)
        return spread[None]

    def at(self, columns: torch.Tensor) -> torch.Tensor:
        """The packed tokens [B] of each row's column [B], where none is shared and none padding."""
        assert not self.shared, "a shared token is of several rows"
        rows, width = self.mask.shape
        return torch.searchsorted(self.places, torch.arange(rows, device=columns.device) * width + columns)

    @cached_property
    def owners(self) -> torch.Tensor:
        """[N]: the row of each token."""
        return self.places // self.mask.shape[1]

    @cached_property
    def ones(self) -> list[torch.Tensor]:
        """By job, [rows, tokens] float32: one where the token is the row's."""
        whose = functional.one_hot(self.owners, len(self.mask)).float()
        return [whose[job.tokens, job.rows].T for job in self.jobs]

    def packed(self, batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """A model's arguments for the batch; what is not of tokens, as `prompt_lens`, stays."""
        positions = torch.arange(self.mask.shape[1], device=self.mask.device).expand(self.mask.shape)
        rest = {name: value for name, value in batch.items() if name not in ("input_ids", "attention_mask")}
        ids = {"input_ids": self.pack(batch["input_ids"]), "position_ids": self.pack(positions)}
        return {**rest, **ids, "packing": self}

    def unpacked(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """`packed` undone, for who asks what a row is."""
        return {**given, "input_ids": self.pad(given["input_ids"]), "attention_mask": self.mask}


class Packer(Protocol):
    """Says of a batch how it is packed, None where it is not."""

    def __call__(self, batch: Mapping[str, torch.Tensor], rows: Sequence[int] = ()) -> Packing | None:
        """`rows`: of each job, where the batch is of several."""


def packer_of(model: Any, narrowest: int | None = None) -> Packer:
    """What packs batches for this model: neither where that would change anything, nor where it would save little, as
    in models that are not `narrowest` wide (WIDTH). For as long as the model's modules stay.
    """
    least = WIDTH if narrowest is None else narrowest
    able = can_pack(model) and int(getattr(model.config, "hidden_size", 0) or 0) >= least
    share = able and (shares_beginnings(model) or _keeps_prefix(model))

    def pack(batch: Mapping[str, torch.Tensor], rows: Sequence[int] = ()) -> Packing | None:
        if not able or batch["input_ids"].device.type != "cpu":  # elsewhere a pass does not take what it computes
            return None
        packing = Packing.of(batch, share and not (model.training and _drops(model)), rows)
        return packing if packing.saved >= SAVED else None

    return pack


def can_pack(model: Any) -> bool:
    """Whether a packed pass through a model, with its adapter, is the padded one.

    Not where anything in it looks at rows and does not know of `packing`, nor where gradient checkpointing repeats
    blocks, when the pass is over, without `AttendAgain`.
    """
    config, tuner = model.config, _tuner(model)
    kinds = getattr(config, "layer_types", None) or ()
    windows = "sliding_attention" in kinds if kinds else getattr(config, "sliding_window", None)
    return (
        getattr(config, "_attn_implementation", "") in ("sdpa", FLOAT32)
        and not windows
        and getattr(config, "attn_logit_softcapping", None) is None
        and all(_attends_again(module) for module in model.modules() if getattr(module, CHECKPOINTING, False))
        and (tuner is None or _keeps_prefix(model) or _is_tokenwise(tuner) or bool(getattr(tuner, "packs", False)))
    )


def shares_beginnings(model: Any) -> bool:
    """Whether rows that begin alike are alike there, whatever follows: not where vectors are made of whole prompts."""
    tuner = _tuner(model)
    return tuner is None or _is_tokenwise(tuner) or bool(getattr(tuner, "shares_beginnings", False))


def _attends_again(module: nn.Module) -> bool:
    how: dict[str, Any] = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
    return isinstance(how.get("context_fn"), AttendAgain)


def _tuner(model: Any) -> Any:
    """PEFT's tuner; soft prompts have none, and the backbone itself stands there."""
    return model.base_model if hasattr(model, "peft_config") else None


def _keeps_prefix(model: Any) -> bool:
    """Whether all that the adapter does is a prefix in the KV cache, the same for every row."""
    configs = getattr(model, "peft_config", {})
    return bool(configs) and all(isinstance(config, PrefixTuningConfig) for config in configs.values())


def _is_tokenwise(tuner: Any) -> bool:
    if not isinstance(tuner, TOKENWISE):
        return False
    across = ("alora_invocation_tokens", "velora_config")  # these look at other tokens, too
    return not any(getattr(config, name, None) for config in tuner.peft_config.values() for name in across)


def _drops(model: Any) -> bool:
    """Whether units are dropped at random, in each row others."""
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return modules or bool(getattr(model.config, "attention_dropout", 0.0))


def attending_in_rows(model: Any) -> AbstractContextManager[None]:
    """Within it, the model's attention is that of packed passes."""
    AttentionInterface.register(NAME, attend)
    return _Attention(model.config, NAME)


class AttendAgain:
    """Gradient checkpointing's `context_fn`: a block that is computed again, when the pass is over, attends as it did
    the first time."""

    def __init__(self, model: Any) -> None:
        self._config: Any = model.config

    def __call__(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _Attention(self._config, self._config._attn_implementation)


class _Attention(AbstractContextManager[None]):
    """Within it, models of this configuration attend by the function of this name."""

    def __init__(self, config: Any, name: str) -> None:
        self._config, self._name, self._before = config, name, name

    def __enter__(self) -> None:
        self._before = self._config._attn_implementation
        self._config._attn_implementation = self._name

    def __exit__(self, *_: object) -> None:
        self._config._attn_implementation = self._before


def attend(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: None,
    dropout: float = 0.0,
    scaling: float | None = None,
    packing: Packing | None = None,
    **_kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Each row's causal attention, in float32: query [1, H, N, d], key and value [1, H, P + N, d] -> [1, N, H, d].

    Padding lies behind every token that is asked for, so causality alone hides it and no mask is needed, unless every
    row reads the prefix.
    """
    assert packing is not None, "a packed pass has a packing"
    prefix, rows = key.shape[2] - query.shape[2], len(packing.mask)
    q, k, v = (
        packing.pad(part[:, :, before:].transpose(1, 2).float()).transpose(1, 2)
        for part, before in ((query, 0), (key, prefix), (value, prefix))
    )  # [B, H, T, d]
    seen = None
    if prefix:
        k, v = (
            torch.cat([part[:, :, :prefix].float().expand(rows, -1, -1, -1), own], dim=2)
            for part, own in ((key, k), (value, v))
        )
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
    if (groups := q.shape[1] // k.shape[1]) > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    made = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=seen is None, scale=scaling
    )
    return packing.pack(made.transpose(1, 2)).to(query.dtype), None
