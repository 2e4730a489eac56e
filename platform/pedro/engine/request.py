"""A request: its prompt, how it is sampled, and the sequences that answer it; what can never run is refused at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pedro.engine.beam import BeamSequence
from pedro.engine.sequence import Sequence
from pedro.errors import PedroError
from pedro.methods.architectures import config_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from pedro.engine.config import EngineConfig
    from pedro.engine.token_mask import TokenMask
    from pedro.model_protocols import ModelConfig, TokenDecoder

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_BEAMS = 64
POOLINGS = ("last", "mean")
SHORT_ANSWER = 64  # tokens


def _require(good: bool, name: str, expected: str, value: object) -> None:
    if not good:
        raise PedroError(f"{name}: expected {expected}, got {value!r}", param=name)


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are sampled and when to stop. Raises PedroError naming the field that is out of range.

    Temperature 0 is greedy. `max_tokens=None` means as many as the context allows. Log-probabilities are the model's
    own, before penalties and temperature. With `num_beams` above 1 the answers come from beam search, with
    transformers' meaning of `length_penalty` and `early_stopping`, and are returned when all are done. With `pooling`
    only the prompt's embedding is computed: its last hidden state, of the last token or the mean over all.
    """

    max_tokens: int | None = None
    temperature: float = 0.0
    top_k: int = 0  # 0 keeps every token
    top_p: float = 1.0
    min_p: float = 0.0  # share of the likeliest token's probability
    repetition_penalty: float = 1.0  # over prompt and answer
    presence_penalty: float = 0.0  # over the answer
    frequency_penalty: float = 0.0  # over the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0  # until then stop tokens cannot be sampled, and stop texts are ignored
    logprobs: int | None = None  # how many alternatives besides the sampled token
    prompt_logprobs: int | None = None
    pooling: str | None = None  # "last" or "mean"
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "stop", (self.stop,) if isinstance(self.stop, str) else tuple(self.stop))
        object.__setattr__(self, "stop_token_ids", tuple(self.stop_token_ids))
        nothing = self.prompt_logprobs is not None or self.pooling is not None
        least = 0 if nothing and self.num_beams == 1 else 1
        _require(self.max_tokens is None or self.max_tokens >= least, "max_tokens", f"≥ {least}", self.max_tokens)
        most, range_ = (math.inf, "≥ 0") if self.max_tokens is None else (self.max_tokens, f"0 to {self.max_tokens}")
        _require(0 <= self.min_tokens <= most, "min_tokens", f"{range_} (max_tokens)", self.min_tokens)
        _require(0 <= self.temperature <= 100, "temperature", "0 to 100", self.temperature)
        _require(self.top_k >= 0, "top_k", "≥ 0 (0 keeps every token)", self.top_k)
        _require(0 < self.top_p <= 1, "top_p", "above 0, up to 1", self.top_p)
        _require(0 <= self.min_p <= 1, "min_p", "0 to 1", self.min_p)
        _require(0.01 <= self.repetition_penalty <= 10, "repetition_penalty", "0.01 to 10", self.repetition_penalty)
        _require(abs(self.presence_penalty) <= 2, "presence_penalty", "-2 to 2", self.presence_penalty)
        _require(abs(self.frequency_penalty) <= 2, "frequency_penalty", "-2 to 2", self.frequency_penalty)
        _require(len(self.stop) <= MAX_STOPS and all(self.stop), "stop", f"≤ {MAX_STOPS} non-empty texts", self.stop)
        biases = all(math.isfinite(bias) and abs(bias) <= 100 for bias in self.logit_bias.values())
        _require(biases, "logit_bias", "values from -100 to 100", dict(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            _require(value is None or 0 <= value <= MAX_LOGPROBS, name, f"0 to {MAX_LOGPROBS}", value)
        _require(self.pooling in (None, *POOLINGS), "pooling", " or ".join(POOLINGS), self.pooling)
        _require(not self.pooling or self.max_tokens == 0, "max_tokens", "0 with pooling", self.max_tokens)
        _require(1 <= self.num_beams <= MAX_BEAMS, "num_beams", f"1 to {MAX_BEAMS}", self.num_beams)
        _require(abs(self.length_penalty) <= 10, "length_penalty", "-10 to 10", self.length_penalty)
        if self.num_beams > 1:
            _require(self.temperature == 0, "temperature", "0 where num_beams is above 1", self.temperature)
            _require(self.logprobs is None, "logprobs", "none where num_beams is above 1", self.logprobs)
            both = self.min_tokens and self.stop
            _require(not both, "min_tokens", "0 where num_beams is above 1 and stop is given", self.min_tokens)

    @cached_property
    def penalised(self) -> bool:
        """Whether scores differ from the model's own."""
        return bool(self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty or self.logit_bias)

    @cached_property
    def plain(self) -> bool:
        """Whether each token is the model's likeliest and the logits are not needed otherwise."""
        return self.temperature == 0 and self.logprobs is None and not self.penalised


@dataclass(frozen=True)
class Request:
    """One call: a prompt, an adapter and how to sample. `n` answers are sampled independently, indexed 0 to n-1; with
    beams they are the best n of `num_beams`, best first.

    `adapter` is the ref passed to the engine's `load` (None: the bare backbone); it must name one immutable version.
    `conditioning_length` is how many leading prompt tokens condition the vectors (None: the whole prompt).
    `apart` decodes an answer on its own, as chat answers are trained; else its text continues the prompt's, with the
    space that some tokenizers put in between. `resumed_ids` are answer tokens generated before a failover: they do not
    condition the vectors, are not sent again, and sampling continues at the position after them. `deadline_s` counts
    from arrival. `new_mask` creates the mask of one answer's tokens; with a mask, nothing else may decide what ends an
    answer early: neither `min_tokens`, `ignore_eos` nor beams.
    """

    id: str
    prompt_ids: list[int]
    tenant: str = ""
    adapter: str | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    conditioning_length: int | None = None
    apart: bool = False
    deadline_s: float | None = None
    n: int = 1
    resumed_ids: tuple[int, ...] = ()
    new_mask: Callable[[], TokenMask] | None = None
    cache_salt: str = ""  # prompts share a cached prefix only if their salts are equal

    def __post_init__(self) -> None:
        _require(len(self.prompt_ids) > 0, "prompt", "at least one token", self.prompt_ids)
        length, prompt = self.conditioning_length, len(self.prompt_ids)
        _require(length is None or 1 <= length <= prompt, "conditioning_length", f"1 to {prompt} (the prompt)", length)
        _require(self.deadline_s is None or self.deadline_s > 0, "deadline_s", "above 0", self.deadline_s)
        _require(1 <= self.n <= 128, "n", "1 to 128", self.n)
        _require(self.n == 1 or not self.resumed_ids, "n", "1 where an answer is resumed", self.n)
        beams = self.params.num_beams
        _require(beams == 1 or self.n <= beams, "n", f"up to num_beams = {beams}", self.n)
        _require(beams == 1 or not self.resumed_ids, "num_beams", "1 where an answer is resumed", beams)
        if self.new_mask is not None:
            for name, rest in (("num_beams", 1), ("min_tokens", 0), ("ignore_eos", False)):
                value = getattr(self.params, name)
                _require(value == rest, name, f"{rest} where tokens are masked", value)

    @property
    def text_before(self) -> list[int]:
        """The tokens after which the answer's text is decoded."""
        return [] if self.apart else self.prompt_ids


class RequestProcessor:
    """Checks requests against the backbone's vocabulary and context, and the engine's sizes."""

    def __init__(self, model: PreTrainedModel, tokenizer: TokenDecoder, config: EngineConfig) -> None:
        context = _context_length(config_of(model))
        self.context = self.max_length = min(config.max_length or context, context)
        self._blocks, self._block = config.max_batch, self.max_length
        self._max_batch = config.max_batch
        self._tokenizer = tokenizer
        embedding: Any = model.get_input_embeddings()
        self.vocab_size: int = embedding.num_embeddings
        self._eos_ids = eos_ids(model, tokenizer)

    def limit(self, blocks: int, block: int) -> None:
        """Limit requests to `blocks` of the KV cache, of `block` tokens."""
        self._blocks, self._block = blocks, block
        self.max_length = min(self.context, blocks * block)

    def process(self, request: Request) -> list[Sequence]:
        """The request's sequences. Raises PedroError if it can never run."""
        prompt, wanted = len(request.prompt_ids), request.params.max_tokens
        beams = request.params.num_beams
        if beams > self._max_batch:
            raise PedroError(
                f"num_beams: {beams} beams exceed the engine's {self._max_batch} sequences; request fewer",
                param="num_beams",
            )
        most = min(self.max_length, self._blocks // beams * self._block)
        room = most - prompt
        least = max(1, request.params.min_tokens)
        if room < (least if wanted is None else wanted):
            asked = f"max_tokens = {wanted}"
            if wanted is None:
                asked = f"min_tokens = {least}" if request.params.min_tokens else "at least one token of answer"
            with_asked, lower = (f"with {asked} ", " or lower max_tokens") if wanted != 0 else ("", "")
            text = (
                f"the prompt has {prompt} tokens and {with_asked}exceeds the context of {most} tokens; "
                f"shorten the prompt{lower}"
            )
            if most < self.context:
                each = f" for each of {beams} beams" if beams > 1 else ""
                text = (
                    f"the prompt has {prompt} tokens and {with_asked}exceeds the {most} tokens that the server's "
                    f"memory for keys and values holds{each}; shorten the prompt{lower}, or ask for a server with more "
                    "(--kv-memory)"
                )
            raise PedroError(
                text,
                param="max_tokens" if prompt < most else "prompt",
                code="context_length_exceeded",
            )
        self._check_vocabulary("prompt", (*request.prompt_ids, *request.resumed_ids))
        self._check_vocabulary("logit_bias", request.params.logit_bias)
        tokens = self._default_tokens(prompt, room, least, beams) if wanted is None else wanted
        if request.resumed_ids and len(request.resumed_ids) >= tokens:
            raise PedroError(f"resumed_ids: all {tokens} tokens of the answer are already there", param="resumed_ids")
        if beams > 1:
            return [BeamSequence(request, tokens, self._tokenizer, self._eos_ids)]
        sequences = [Sequence(request, i, tokens, self._tokenizer, self._eos_ids) for i in range(request.n)]
        for sequence in sequences:
            sequence.siblings = tuple(other for other in sequences if other is not sequence)
        return sequences

    def _default_tokens(self, prompt: int, room: int, least: int, beams: int) -> int:
        """The most tokens of an answer without `max_tokens`: what fits. Beams, whose blocks are all reserved at the
        start, share one context or a quarter of all blocks, but may each have a short answer."""
        if beams == 1:
            return room
        together = max(-(-self.max_length // self._block), self._blocks // 4)
        return min(room, max(together // beams * self._block - prompt, least, SHORT_ANSWER))

    def _check_vocabulary(self, param: str, token_ids: Iterable[int]) -> None:
        bad = next((t for t in token_ids if not 0 <= t < self.vocab_size), None)
        if bad is not None:
            raise PedroError(f"{param}: token {bad} is outside the vocabulary of {self.vocab_size}", param=param)


def _context_length(config: ModelConfig) -> int:
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 2048)


def eos_ids(model: nn.Module, tokenizer: TokenDecoder) -> frozenset[int]:
    """Every id that ends an answer: the tokenizer's and those in the model's generation config."""
    generation = getattr(model, "generation_config", None)
    ids = getattr(generation, "eos_token_id", None)
    ids = ids if isinstance(ids, (list, tuple)) else [ids]
    return frozenset(int(i) for i in (*ids, tokenizer.eos_token_id) if i is not None)
