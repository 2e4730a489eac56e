"""What lm-eval asks, as token ids with a prompt boundary: the context alone conditions the vectors, never the answer.

A subclass tokenises, scores and generates. A request is a context and a continuation
(`loglikelihood`), a text alone (`loglikelihood_rolling`) or a context to be continued (`generate_until`).
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.model import LM
from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from pedro.errors import ConfigError

log = logging.getLogger(__name__)
ANSWERS = ("joined", "trained")
WITHOUT_EFFECT = ("top_p", "top_k", "min_p")  # on greedy decoding


@dataclass(frozen=True)
class ScoringRequest:
    """Ids of a context and what follows it; the first `conditioning_length` of them condition the vectors."""

    ids: tuple[int, ...]
    conditioning_length: int


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt to be continued greedily by at most `max_tokens`, up to the first of `stops`."""

    ids: tuple[int, ...]
    max_tokens: int
    stops: tuple[str, ...]


class HarnessModel(LM):
    """`answers`: how a continuation becomes ids.

    `joined`, lm-eval's own way: context and continuation are tokenised as one text, and the end of the answer is not
    scored. `trained`, as adapters learn them: tokenised apart, without white space around it, EOS at its end.
    """

    bos: int | None
    max_length: int

    def __init__(self, answers: str = "joined") -> None:
        super().__init__()
        if answers not in ANSWERS:
            raise ConfigError(f"answers: expected {' or '.join(ANSWERS)}, got {answers!r}", param="answers")
        self.answers = answers
        self._shortened = 0

    @abstractmethod
    def tokenise(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, no special tokens added."""

    @abstractmethod
    def completions(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text as an answer that was trained, EOS at its end."""

    @abstractmethod
    def score(self, rows: Sequence[ScoringRequest]) -> list[tuple[float, bool]]:
        """The log-likelihood (nats) of what follows each context, and whether it is the greedy answer."""

    @abstractmethod
    def generate(self, rows: Sequence[GenerationRequest]) -> list[str]:
        """A greedy continuation of each prompt; it may run past a stop. All rows have equal limits."""

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """For each (context, continuation) of the requests."""
        pairs = [request.args for request in requests]
        contexts, answers = self._encode(pairs)
        scores = self.score([self._bounded(*row) for row in zip(contexts, answers, strict=True)])
        for pair, value in zip(pairs, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, value)
        return scores

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Of whole texts, each token once. A window is conditioned by what it does not score: BOS, or one token."""
        texts = [request.args[0] for request in requests]
        rows, owners = [], []
        for number, ids in enumerate(self.tokenise(texts)):
            prefix = self.bos if self.bos is not None else self._no_bos()
            windows = get_rolling_token_windows(ids, prefix, self.max_length - 1, 1)
            for context, answer in map(make_disjoint_window, windows):
                rows.append(ScoringRequest((*context, *answer), len(context)))
                owners.append(number)
        totals = [0.0] * len(texts)
        for number, (nats, _) in zip(owners, self.score(rows), strict=True):
            totals[number] += nats
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """For each (context, generation arguments). Raises ConfigError for what greedy decoding cannot do."""
        asked = [(request.args[0], generation_limits(request.args[1])) for request in requests]
        groups: dict[tuple[tuple[str, ...], int], list[int]] = defaultdict(list)
        for index, (_, limit) in enumerate(asked):
            groups[limit].append(index)
        prompts = self._prompts([context for context, _ in asked])
        texts = [""] * len(asked)
        for (stops, max_tokens), indices in groups.items():
            room = min(max_tokens, self.max_length // 2)
            rows = [
                GenerationRequest(self._shorten(prompts[index], self.max_length - room), room, stops)
                for index in indices
            ]
            for index, text in zip(indices, self.generate(rows), strict=True):
                texts[index] = postprocess_generated_text(text, list(stops), None)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _prompts(self, contexts: Sequence[str]) -> list[list[int]]:
        """BOS once in front, as `pedro.data.prompt_format.encode_prompt` has it."""
        rows = self.tokenise(contexts)
        return [ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids] for ids in rows]

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[list[int]], list[list[int]]]:
        """Contexts and continuations as ids. White space between the two belongs to the continuation."""
        if self.answers == "trained":
            return self._prompts([context for context, _ in pairs]), self.completions(
                [text.strip() for _, text in pairs]
            )
        stems = [context.rstrip() for context, _ in pairs]
        contexts = self._prompts(stems)
        wholes = self._prompts([context + text for context, text in pairs])
        return contexts, [whole[len(ids) :] for whole, ids in zip(wholes, contexts, strict=True)]

    def _bounded(self, context: Sequence[int], answer: Sequence[int]) -> ScoringRequest:
        """A row that fits: the oldest of a long context goes, BOS stays."""
        if not answer:
            raise ConfigError("continuation: an empty one has no likelihood; look at the task's doc_to_choice")
        kept = self._shorten(context, self.max_length - len(answer))
        if not kept:
            self._no_bos()
        return ScoringRequest((*kept, *answer), len(kept))

    def _shorten(self, ids: Sequence[int], room: int) -> tuple[int, ...]:
        if len(ids) <= room:
            return tuple(ids)
        if room < 2:
            raise ConfigError(f"context: no room for a prompt before an answer in {self.max_length} tokens")
        if not self._shortened:
            log.warning("a prompt has %d tokens and there is room for %d: the oldest are left out", len(ids), room)
        self._shortened += 1
        first = [] if self.bos is None else [self.bos]
        return (*first, *ids[len(ids) - room + len(first) :])

    def _no_bos(self) -> int:
        raise ConfigError("context: it is empty, and this tokenizer has no BOS to stand for it")


def generation_limits(arguments: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop strings and the most tokens. Raises ConfigError for an argument that greedy decoding does not support."""
    try:
        wanted: dict[str, Any] = dict(normalize_gen_kwargs(dict(arguments)))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"generation_kwargs: expected numbers for max_gen_toks and temperature, got {dict(arguments)}",
            param="generation_kwargs",
        ) from error
    stops = tuple(stop for stop in wanted.pop("until") if stop)
    max_tokens = whole(wanted.pop("max_gen_toks"), "generation_kwargs.max_gen_toks")
    if wanted.pop("do_sample") or wanted.pop("temperature", 0.0):
        raise ConfigError("generation_kwargs: this model decodes greedily; set do_sample=False", param="do_sample")
    for name in WITHOUT_EFFECT:
        wanted.pop(name, None)
    if wanted:
        raise ConfigError(f"generation_kwargs: not supported: {', '.join(sorted(wanted))}", param=min(wanted))
    return stops, max_tokens


def whole(value: Any, name: str) -> int:
    """A number from lm-eval's command line, where everything may be text. Raises ConfigError."""
    try:
        number = int(str(value))
    except ValueError:
        number = 0
    if number < 1:
        raise ConfigError(f"{name}: expected a whole number above 0, got {value!r}", param=name)
    return number


def check_generation_prompt(wanted: bool) -> None:
    if not wanted:
        raise ConfigError("gen_prefix: an answer cannot be begun for a model that reads chats", param="gen_prefix")
