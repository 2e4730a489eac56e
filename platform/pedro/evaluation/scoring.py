"""Scores a model on rows: answers generated from the prompt alone, exact match, loss per answer token.

Rows are those of `pedro.data.load_rows`. Scores of disjoint rows add up,
so workers can share the work. An accuracy is never taken from teacher-forced logits: a model that peeks at the answer
would look perfect.
"""

from __future__ import annotations

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from pedro.data.dataset import collate
from pedro.evaluation.ranking import PromptReader, common_beginning, reads_once
from pedro.methods.packing import shares_beginnings

if TYPE_CHECKING:
    import torch
    from torch import nn

    from pedro.model_protocols import Generates, Tokenizer

EncodedRow = Mapping[str, Any]
SHARED = 32  # tokens: prompts that begin with as many the same have these read once


@dataclass(frozen=True)
class Score:
    """Sums over rows; `+` joins the scores of different rows."""

    correct: float = 0
    rows: int = 0
    loss_sum: float = 0.0
    tokens: int = 0
    each: tuple[tuple[float, float, int], ...] = field(default=(), compare=False, repr=False)
    """Of every row, in their order: how far it is right (0 to 1), its loss, its answer's tokens."""
    answers: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """What was generated for every row, where it was kept."""

    def __add__(self, other: Score) -> Score:
        return Score(
            self.correct + other.correct,
            self.rows + other.rows,
            self.loss_sum + other.loss_sum,
            self.tokens + other.tokens,
            self.each + other.each,
            self.answers + other.answers,
        )

    @property
    def accuracy(self) -> float:
        """Share of rows whose generated answer is exactly the wanted one."""
        return self.correct / self.rows if self.rows else float("nan")

    @property
    def loss(self) -> float:
        """Mean cross entropy of an answer token, in nats."""
        return self.loss_sum / self.tokens if self.tokens else float("nan")


def score(model: nn.Module, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_size: int = 32) -> Score:
    """Generate and compare, and take the loss, for every row."""
    if not rows:
        return Score()
    longest = max(len(row["input_ids"]) - row["prompt_len"] for row in rows)
    answers = generate(model, tokenizer, rows, max_new_tokens=longest, batch_size=batch_size)
    right = [exact_match(answer, row["completion"]) for answer, row in zip(answers, rows, strict=True)]
    losses = answer_losses(model, tokenizer, rows, batch_size)
    each = tuple((float(good), loss, tokens) for good, (loss, tokens) in zip(right, losses, strict=True))
    return Score(sum(right), len(rows), *_total(losses), each, tuple(answers))


def generate(
    model: nn.Module,
    tokenizer: Tokenizer,
    rows: Sequence[EncodedRow],
    max_new_tokens: int,
    batch_size: int = 32,
    num_beams: int = 1,
    stops: Sequence[str] = (),
) -> list[str]:
    """Each row's answer, decoded greedily (or by beams, as in the paper) from its prompt, in the order of rows.

    Rows of like length share a batch; prompts are padded on the left, behind what all of them begin with. An answer
    ends with the first of `stops` in it.
    """
    import torch

    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: rows[i]["prompt_len"])
    texts = [""] * len(rows)
    head = _common_head(model, [row["input_ids"][: row["prompt_len"]] for row in rows]) if num_beams == 1 else 0
    cache = PromptReader(model).read(rows[0]["input_ids"][:head])[1] if head else None
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        prompts = [rows[i]["input_ids"][: rows[i]["prompt_len"]] for i in indices]
        width = max(map(len, prompts))
        pad = tokenizer.pad_token_id
        padded = [[*p[:head], *[pad] * (width - len(p)), *p[head:]] for p in prompts]
        ids = torch.tensor(padded, device=device)
        mask = torch.tensor(
            [[1] * head + [0] * (width - len(p)) + [1] * (len(p) - head) for p in prompts], device=device
        )
        begun: dict[str, Any] = {}
        if cache is not None:
            begun["past_key_values"] = copy.deepcopy(cache)
            begun["past_key_values"].batch_repeat_interleave(len(prompts))
        with torch.no_grad(), _decoding(model, tokenizer, max_new_tokens, num_beams):
            out = cast("Generates", model).generate(
                input_ids=ids,
                attention_mask=mask,
                **begun,
                **({"stop_strings": list(stops), "tokenizer": tokenizer} if stops else {}),
            )
        for index, row in zip(indices, out[:, width:].tolist(), strict=True):
            texts[index] = tokenizer.decode(row, skip_special_tokens=True)
    return texts


def _common_head(model: nn.Module, prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with and the model reads once for all; 0 where that is not worth it.

    Each prompt keeps a token of its own. What an adapter makes of a beginning may depend on the prompt's end.
    """
    config = getattr(model, "config", None)
    if len(prompts) < 2 or not shares_beginnings(model) or getattr(config, "sliding_window", None):
        return 0
    shared = common_beginning([list(prompt[:-1]) for prompt in prompts])
    return shared if shared >= SHARED else 0


@contextmanager
def _decoding(model: nn.Module, tokenizer: Tokenizer, max_new_tokens: int, num_beams: int) -> Iterator[None]:
    """For its length, `model` decodes as the engine does: of the backbone's generation config, its ends alone count.

    Whatever a generation config leaves open is taken from the model's own, so that one is replaced. The last token of
    each prompt goes to the output projection side by side with the others': apart, as transformers cuts them out,
    PyTorch would read the whole vocabulary's weights once for each.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    from pedro.engine.request import eos_ids

    inner: nn.Module = model.get_base_model() if isinstance(model, PeftModel) else model
    holders = [vars(each) for each in (model, inner) if "generation_config" in vars(each)]
    kept = [holder["generation_config"] for holder in holders]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=num_beams,
        use_cache=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted(eos_ids(inner, tokenizer)) or None,
    )
    for holder in holders:
        holder["generation_config"] = config
    handle = cast("Any", inner).get_output_embeddings().register_forward_pre_hook(_side_by_side)
    try:
        yield
    finally:
        handle.remove()
        for holder, own in zip(holders, kept, strict=True):
            holder["generation_config"] = own


def _side_by_side(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    hidden, *rest = inputs
    return (hidden.contiguous(), *rest)


def answer_loss(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_size: int = 32
) -> tuple[float, int]:
    """Summed cross entropy (nats) of the answers' tokens given their prompts, and how many tokens that is."""
    return _total(answer_losses(model, tokenizer, rows, batch_size))


def answer_losses(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_size: int = 32
) -> list[tuple[float, int]]:
    """Of every row the summed cross entropy (nats) of its answer's tokens given its prompt, and how many these are."""
    import torch

    found: list[tuple[float, int]] = []
    for logits, wanted, lengths in _answer_logits(model, tokenizer, rows, batch_size):
        losses = torch.nn.functional.cross_entropy(logits, wanted, reduction="none").double()
        found += [(float(part.sum()), len(part)) for part in losses.split(lengths)]
    return found


def _total(losses: Iterable[tuple[float, int]]) -> tuple[float, int]:
    total, count = 0.0, 0
    for loss, tokens in losses:
        total, count = total + loss, count + tokens
    return total, count


def answer_logprobs(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_size: int = 32, shared: bool = True
) -> list[tuple[float, bool]]:
    """Each row's log-likelihood (nats) of its answer given its prompt, and whether greedy decoding would give it.

    A prompt that several rows have is read once; with `shared=False`, the slow reference, every row by itself.
    """
    by_prompt: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        by_prompt[tuple(row["input_ids"][: row["prompt_len"]])].append(index)
    groups = by_prompt.items() if shared and reads_once(model) else ()
    together = {prompt: places for prompt, places in groups if len(places) > 1}
    apart = [index for prompt, places in by_prompt.items() if prompt not in together for index in places]
    scores = dict(zip(apart, _logprobs_apart(model, tokenizer, [rows[i] for i in apart], batch_size), strict=True))
    if together:
        reader = PromptReader(model)
        for prompt, places in together.items():
            found = reader.scores(prompt, [rows[place]["input_ids"][len(prompt) :] for place in places])
            scores |= dict(zip(places, found, strict=True))
    return [scores[index] for index in range(len(rows))]


def _logprobs_apart(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_size: int
) -> list[tuple[float, bool]]:
    scores: list[tuple[float, bool]] = []
    for logits, wanted, lengths in _answer_logits(model, tokenizer, rows, batch_size):
        picked = logits.log_softmax(-1).gather(-1, wanted[:, None]).squeeze(-1)  # [answer tokens of the batch]
        greedy = logits.argmax(-1) == wanted
        for nats, same in zip(picked.split(lengths), greedy.split(lengths), strict=True):
            scores.append((float(nats.double().sum()), bool(same.all())))
    return scores


def _answer_logits(
    model: nn.Module, tokenizer: Tokenizer, rows: Sequence[EncodedRow], batch_size: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """Batch by batch: the logits [N, V] at the answers' tokens, row after row, these tokens [N], how many a row has."""
    import torch

    from pedro.methods.output_head import logits_at, supervised

    device = next(model.parameters()).device
    for start in range(0, len(rows), batch_size):
        columns = collate(list(rows[start : start + batch_size]), tokenizer.pad_token_id)
        batch = {name: torch.tensor(values, device=device) for name, values in columns.items()}
        positions, wanted = supervised(batch.pop("labels"))
        with torch.no_grad(), logits_at(model, positions):
            logits = model(**batch).logits[0].float()
        yield logits, wanted, positions.sum(1).tolist()


def exact_match(answer: str, wanted: str) -> bool:
    """Whether two answers are the same up to white space around them."""
    return answer.strip() == wanted.strip()


def finite(value: Any) -> float | None:
    """A score as JSON can hold it: None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def majority(completions: Iterable[str]) -> str:
    """The most frequent answer (the first in the alphabet among equals): what guessing without the prompt gives."""
    counts = Counter(text.strip() for text in completions)
    return min(counts, key=lambda text: (-counts[text], text)) if counts else ""
