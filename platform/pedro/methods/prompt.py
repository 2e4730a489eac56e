"""Which tokens of a batch are prompt, and the vectors' life on the KV cache.

The answer must never condition the vectors, or training leaks it. So the boundary is, in this order: `prompt_mask`,
`prompt_lens`, the labels (a batch with labels never falls through), within `generate()` the columns that it was called
with, and only without any of them everything that is attended. That last is a guess, and warned of, unless the call
keeps a KV cache (`use_cache=True` or `past_key_values`), as one that reads a prompt does. A call that continues from a
filled cache keeps the vectors that lie with it: those of its first prompt. Shapes: B rows, T tokens of this call.
"""

from __future__ import annotations

import inspect
import warnings
from types import MethodType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pedro.errors import ConfigError
from pedro.methods.generation import check_generation, prompt_width

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from pedro.methods.packing import Packing

IGNORED = -100  # the label of a token without supervision, as in transformers
PROMPT_ARGUMENTS = ("prompt_lens", "prompt_mask")
PACKED = ("cu_seq_lens_q", "block_table")  # what comes with several sequences in one row
KEPT = "pedro_vectors"

Vectors = dict[str, torch.Tensor]  # target -> [B, width], of one layer


class PromptPass:
    """One forward pass: its prompt positions [B, T], its rows' adapters, and the vectors of each layer.

    Shared by the hooks on the model, which open and close it, and by every layer, which reads or fills it.
    """

    def __init__(self, title: str) -> None:
        self.title = title  # the method's, for messages
        self.prompt: torch.Tensor | None = None  # [B, T] bool; None while decoding with kept vectors
        self._ids: torch.Tensor | None = None  # [B, T], where the call was given tokens
        self.packing: Packing | None = None  # of a packed pass, whose tokens lie as [1, N]
        self.adapter_names: list[str] | None = None  # one a row, set for the length of a mixed-batch call
        self.vectors: dict[int, Vectors] = {}  # by layer
        self.open = False
        self._width: int | None = None  # columns of the prompt, for the length of a call of generate()
        self._guess = ""  # why `prompt` is no more than a guess
        self._handles: list[RemovableHandle] = []

    def attach(self, model: Any) -> None:
        """Follow every forward pass of `model`, from before its first module to after its last, and its generate()."""
        self._handles = [
            model.register_forward_pre_hook(self.before, with_kwargs=True),
            model.register_forward_hook(self.after, with_kwargs=True, always_call=True),
        ]
        if hasattr(model, "generate"):
            self._model, self._generate = model, model.generate
            model.generate = self.generate

    def detach(self, model: Any) -> None:
        """Take off again what `attach` put on."""
        for handle in self._handles:
            handle.remove()
        if vars(model).get("generate") == self.generate:
            del model.generate

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The model's generate(): what it is called with is the prompt, whatever is generated after it.

        A call within a call, as of a model that assists itself, keeps the outer one's prompt. Raises ConfigError for
        what reads a prompt in another way.
        """
        given = inspect.signature(type(self._model).generate).bind(self._model, *args, **kwargs).arguments
        given |= given.pop("kwargs", {})
        outer = self._width
        if outer is None:
            check_generation(self.title, given, self._model.generation_config)
            self._width = prompt_width(given)
        try:
            return self._generate(*args, **kwargs)
        finally:
            self._width = outer

    def before(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Find the prompt of this call, or the vectors kept since the prompt was read. Takes our arguments off."""
        given = dict(zip(inspect.signature(model.forward).parameters, args, strict=False)) | kwargs
        kwargs = {name: value for name, value in kwargs.items() if name not in PROMPT_ARGUMENTS}
        cache = given.get("past_key_values")
        self.open, self._guess = True, ""
        if cache is not None and cache.get_seq_length() > 0:
            self.prompt, self.vectors = None, getattr(cache, KEPT, {})
            return args, kwargs
        packed = [name for name in PACKED if given.get(name) is not None]
        if packed or _begins_anew(given):
            packed = packed or ["position_ids"]
            raise ConfigError(
                f"{packed[0]}: {self.title} takes one sequence a row, and these are packed; pad them instead "
                "(generate() in place of generate_batch())",
                param=packed[0],
            )
        self.packing = given.get("packing")
        if self.packing is not None:
            given = self.packing.unpacked(given)
        self.prompt, self.vectors = find_prompt(given, self._width), {}
        self._ids = given.get("input_ids")
        if self._width is None:
            self._guess = _guessed(model, given)
        return args, kwargs

    def read(self) -> torch.Tensor | None:
        """`prompt`, for a layer that now makes something of it; warns where it is a guess."""
        if self._guess:
            warnings.warn(self._guess, stacklevel=2)
            self._guess = ""
        return self.prompt

    def head(self, prompt: torch.Tensor, end: tuple[int, ...]) -> torch.Tensor:
        """The rows' prompts [B, T] bool up to where the tokens `end` first end in them; all of one without them.

        Raises ConfigError where the call was given embeddings, in which no tokens can be found.
        """
        if self._ids is None:
            raise ConfigError(
                f"inputs_embeds: {self.title} looks for head_end in tokens; pass input_ids", param="inputs_embeds"
            )
        ids, size = self._ids.to(prompt.device), len(end)
        if ids.shape[1] < size:
            return prompt
        found = (ids.unfold(1, size, 1) == ids.new_tensor(end)).all(-1) & prompt.unfold(1, size, 1).all(-1)
        stop = torch.where(found.any(1), found.int().argmax(1) + size, ids.shape[1])  # [B]
        return prompt & (torch.arange(ids.shape[1], device=prompt.device) < stop[:, None])

    def after(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Keep the vectors with the KV cache that they belong to, and forget this pass."""
        cache = kwargs.get("past_key_values")
        if cache is None:
            cache = getattr(output, "past_key_values", None)
        if cache is not None and self.prompt is not None and self.vectors:
            keep_vectors(cache, self.vectors)
        self.prompt, self._ids, self.packing, self.vectors, self.open = None, None, None, {}, False


def find_prompt(given: dict[str, Any], width: int | None = None) -> torch.Tensor:
    """Which positions [B, T] condition the vectors, from the arguments of a forward call, or the columns of a prompt.

    A row's first attended token always counts as prompt: nothing before it could have predicted it; in a row of
    padding only, the first token does. Raises ConfigError for a `prompt_mask` or `prompt_lens` that does not fit.
    """
    attended = find_attended(given)
    attended = attended | ((torch.arange(attended.shape[1], device=attended.device) == 0) & ~attended.any(1, True))
    mask, lens, labels = given.get("prompt_mask"), given.get("prompt_lens"), given.get("labels")
    rank = attended.cumsum(dim=1)  # [B, T], 1 at the first attended token
    if mask is not None:
        _expect_shape("prompt_mask", mask, attended.shape)
        prompt = mask.to(attended.device).bool() & attended
    elif lens is not None:
        _expect_shape("prompt_lens", lens, attended.shape[:1])
        lens = lens.to(attended.device)
        if bool(((lens < 1) | (lens > rank[:, -1])).any()):
            raise ConfigError(
                f"prompt_lens: expected between 1 and the row's attended tokens {rank[:, -1].tolist()}, "
                f"got {lens.tolist()}; count the prompt's tokens without padding",
                param="prompt_lens",
            )
        prompt = attended & (rank <= lens[:, None])
    elif labels is not None and labels.shape == attended.shape:
        supervised = (labels.to(attended.device) != IGNORED) & attended
        prompt = attended & (supervised.cumsum(dim=1) == 0)
    elif width is not None:
        prompt = attended & (torch.arange(attended.shape[1], device=attended.device) < width)
    else:
        return attended
    marked: torch.Tensor = prompt | (attended & (rank == 1))
    return marked


def _begins_anew(given: dict[str, Any]) -> bool:
    """Whether one row holds several sequences, as collators without padding lay them: by positions, without a mask."""
    positions = given.get("position_ids")
    if (
        positions is None
        or positions.shape[0] != 1
        or any(given.get(n) is not None for n in ("attention_mask", "packing"))
    ):
        return False
    return bool((positions.diff() != 1).any())


def _guessed(model: nn.Module, given: dict[str, Any]) -> str:
    """What to say of a call that takes all of a row for the prompt though nobody said so; empty where it is clear.

    A model without generate(), as a classifier, has no answer in its rows, and who keeps a cache reads a prompt.
    """
    told = any(given.get(name) is not None for name in (*PROMPT_ARGUMENTS, "labels", "past_key_values"))
    if told or given.get("use_cache") or not getattr(model, "can_generate", lambda: False)():
        return ""
    learning = model.training and torch.is_grad_enabled()
    return (
        f"{'training' if learning else 'a forward call'} without labels, prompt_lens or prompt_mask: every attended "
        "token conditions the vectors, the answer's too if there is one; pass prompt_lens"
        + ("" if learning else " (or use_cache=True where all of it is prompt)")
    )


def find_attended(given: dict[str, Any]) -> torch.Tensor:
    """Which positions [B, T] are no padding: from a mask [B, T], a prepared 4-D mask or a dict of them, or none."""
    tokens = given.get("input_ids")
    if tokens is None:
        tokens = given["inputs_embeds"]
    shape, device = tokens.shape[:2], tokens.device
    mask = given.get("attention_mask")
    if isinstance(mask, dict):  # one mask a kind of layer; padding is the same in each
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(shape, dtype=torch.bool, device=device)
    if mask.dim() == 4:  # [B, 1, T, S]: a token that is no padding attends to itself
        itself = mask[:, 0].diagonal(dim1=1, dim2=2)[:, : shape[1]]
        attended: torch.Tensor = (itself if itself.dtype == torch.bool else itself == 0).expand(shape)
        return attended
    _expect_shape("attention_mask", mask, shape)
    attended = mask.to(device).bool()
    return attended


def keep_vectors(cache: Any, vectors: dict[int, Vectors]) -> None:
    """Put the vectors on the KV cache and make them follow its rows (beams, selected or repeated rows)."""
    if not hasattr(cache, KEPT):
        cache.reorder_cache = MethodType(_reorder_cache, cache)
        cache.batch_select_indices = MethodType(_batch_select_indices, cache)
        cache.batch_repeat_interleave = MethodType(_batch_repeat_interleave, cache)
    setattr(cache, KEPT, vectors)


def _reorder_cache(cache: Any, beam_idx: torch.Tensor) -> None:
    type(cache).reorder_cache(cache, beam_idx)
    _change_rows(cache, lambda v: v.index_select(0, beam_idx.to(v.device)))


def _batch_select_indices(cache: Any, indices: torch.Tensor) -> None:
    type(cache).batch_select_indices(cache, indices)
    _change_rows(cache, lambda v: v[indices])


def _batch_repeat_interleave(cache: Any, repeats: int) -> None:
    type(cache).batch_repeat_interleave(cache, repeats)
    _change_rows(cache, lambda v: v.repeat_interleave(repeats, dim=0))


def _change_rows(cache: Any, change: Any) -> None:
    kept = {i: {target: change(v) for target, v in vectors.items()} for i, vectors in getattr(cache, KEPT).items()}
    setattr(cache, KEPT, kept)


def _expect_shape(name: str, tensor: torch.Tensor, shape: torch.Size) -> None:
    if tensor.shape != shape:
        raise ConfigError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}", param=name)
