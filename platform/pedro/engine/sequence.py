"""A request, its sequences and their outputs.

Every change of a sequence's state goes through `Sequence.to`, which holds the whole state machine:
waiting → prefilling → running → finished; finished from any state, and back to waiting when preempted.
"""

from __future__ import annotations

import enum
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from pedro.engine.detokenizer import Detokenizer
from pedro.errors import PedroError

if TYPE_CHECKING:
    import torch

    from pedro.engine.modulation import PreemptedState
    from pedro.engine.prefix_cache import Prefix, Reuse
    from pedro.engine.speculation import DraftHistory
    from pedro.engine.token_mask import TokenMask
    from pedro.model_protocols import TokenDecoder

MAX_LOGPROBS = 20
MAX_STOPS = 16
MAX_BEAMS = 64
POOLINGS = ("last", "mean")
NOTHING: frozenset[int] = frozenset()
MIN_TURN_TOKENS = 16  # that a sequence generates before it may be preempted (again)


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


@dataclass(frozen=True)
class Logprob:
    """A token, its log-probability, and the likeliest tokens at its position with theirs, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Timing:
    """Seconds since arrival: `queue_s` until prefill began, `first_token_s` until the first token, `total_s` so far."""

    queue_s: float
    first_token_s: float
    total_s: float


@dataclass(slots=True)
class Output:
    """One step's output for one answer. `text` may lag behind `token_ids` while a character or stop text is incomplete.

    The last Output of an answer has `finish_reason` ("stop", "length", "cancelled" or "error") and `timing`;
    `error` is set with "error" only. Its `prompt_tokens` are 0 if the prompt was never read. `prompt_logprobs` is set
    once, first entry None. `embedding` is [D] in little-endian float32, of length 1, if `pooling` is set.
    """

    request_id: str
    index: int = 0
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    logprobs: list[Logprob] | None = None
    prompt_logprobs: list[Logprob | None] | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0  # of these, found in the prefix cache
    completion_tokens: int = 0
    error: PedroError | None = None
    timing: Timing | None = None
    embedding: bytes | None = None


class SequenceState(enum.Enum):
    """State of a sequence."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    RUNNING = "running"
    FINISHED = "finished"


_NEXT = {
    SequenceState.WAITING: {SequenceState.PREFILLING, SequenceState.FINISHED},
    SequenceState.PREFILLING: {SequenceState.RUNNING, SequenceState.FINISHED},
    SequenceState.RUNNING: {SequenceState.WAITING, SequenceState.FINISHED},
    SequenceState.FINISHED: set(),
}


class Sequence:
    """One answer being generated: tokens so far, its slot in the KV cache, its text."""

    width = 1  # slots that it needs

    def __init__(
        self, request: Request, index: int, max_tokens: int, tokenizer: TokenDecoder, eos_ids: frozenset[int]
    ) -> None:
        self.request = request
        self.index = index
        self.params = request.params
        self.seed = secrets.randbits(63) if request.params.seed is None else request.params.seed
        self.max_tokens = max_tokens
        self.state = SequenceState.WAITING
        self.order = -1  # order of arrival; kept when preempted
        self.slots: list[int] = []  # of the KV cache, while it runs; `slot` is the first
        self.slot = -1
        self.blocks = 0  # of the KV cache reserved for it, while it has slots
        self.siblings: tuple[Sequence, ...] = ()  # the other answers to the same request
        self.prompt_in: Sequence | None = None  # the sibling whose slot has the prompt until it is copied to this one's
        self.lends_to: list[Sequence] = []  # siblings whose `prompt_in` is this one
        self.preempted_state: PreemptedState | None = None  # saved by the runner
        self.reuse: Reuse | None = None  # who may reuse its prefix
        self.prefix: Prefix | None = None  # cached prefix of its next prefill, while its blocks are needed
        self.foreseen: tuple[int, Prefix] | None = None  # while it waits, what the cache had for it, and when
        self.borrowed = 0  # tokens of that which are read in place, not copied to its slot
        self.num_cached = 0  # tokens of that, until its prefill ends
        self.cached_tokens = 0  # prompt tokens found in the cache; the same for all answers to a request
        self.resumes = False  # whether it ran before: its vectors exist, its prompt was reported
        self.prompt_read = False  # and counted, for this answer or another to the same request
        self.drafting: DraftHistory | None = None  # source of its drafts
        self.stepped = 0  # the last step that decoded it
        self.turn_length = 0  # tokens of answer when it last started
        self.output_ids: list[int] = list(request.resumed_ids)
        self.arrived = time.monotonic()
        self.deadline = None if request.deadline_s is None else self.arrived + request.deadline_s
        self.started: float | None = None
        self.first_token: float | None = None
        self.stop_ids = frozenset(request.params.stop_token_ids) | (
            frozenset() if request.params.ignore_eos else eos_ids
        )
        self._text = Detokenizer(tokenizer, request.text_before, request.params.stop, request.params.min_tokens)
        self._mask: TokenMask | None = None  # created when it runs: masks take memory, and many requests wait
        self.fault: PedroError | None = None  # why the mask failed
        for token_id in request.resumed_ids:
            self._text.add(token_id)

    @property
    def barred(self) -> frozenset[int]:
        """Tokens that cannot be sampled next, since they would end the answer before `min_tokens`."""
        return self.stop_ids if len(self.output_ids) < self.params.min_tokens else NOTHING

    @property
    def plain(self) -> bool:
        """Whether its next token is simply the model's likeliest."""
        return self.params.plain and not self.barred and self.request.new_mask is None

    @property
    def shaped(self) -> bool:
        """Whether its next token is the likeliest that its mask allows."""
        return self.params.plain and not self.barred and self.request.new_mask is not None

    def lets(self, token_id: int) -> bool:
        """Whether its mask is known to allow this token; errors are reported by `mask_bits`."""
        try:
            return self._begun_mask().lets(token_id)
        except PedroError:
            return False

    def mask_bits(self) -> torch.Tensor | None:
        """Which tokens may come next (`TokenMask.bits`); None for all. Sets `fault` if the mask fails."""
        if self.request.new_mask is None:
            return None
        try:
            return self._begun_mask().bits()
        except PedroError as error:
            self.fault = error
            return None

    def _begun_mask(self) -> TokenMask:
        if self._mask is None:
            assert self.request.new_mask is not None, "only called if the answer has a shape"
            self._mask = self.request.new_mask()
            for token_id in self.request.resumed_ids:
                self._mask.accept(token_id)
        return self._mask

    @property
    def prefill_ids(self) -> list[int]:
        """The tokens that must be in the KV cache before the next one can be sampled."""
        return [*self.request.prompt_ids, *self.output_ids] if self.output_ids else self.request.prompt_ids

    @property
    def length(self) -> int:
        """Tokens so far, prompt and answer."""
        return len(self.request.prompt_ids) + len(self.output_ids)

    @property
    def unread(self) -> int:
        """Tokens that its prefill must read."""
        return self.length - self.num_cached

    @property
    def conditioning_length(self) -> int:
        """How many leading tokens condition the vectors: never a token of the answer."""
        return self.request.conditioning_length or len(self.request.prompt_ids)

    @property
    def awaits(self) -> str | None:
        """The adapter that must be resident before this can start; None if there is none or it is no longer needed."""
        return None if self.resumes else self.request.adapter

    @property
    def tokens_left(self) -> int:
        """How many more tokens it may generate."""
        return self.max_tokens - len(self.output_ids)

    @property
    def preemptible(self) -> bool:
        """Whether it has run long enough since its last start for a preemption to be worth its cost."""
        return len(self.output_ids) - self.turn_length >= MIN_TURN_TOKENS

    def to(self, state: SequenceState) -> None:
        """Move to `state`; any other transition is a bug of the engine."""
        assert state in _NEXT[self.state], f"sequence {self.request.id}: {self.state} → {state}"
        if state is SequenceState.PREFILLING and self.started is None:
            self.started = time.monotonic()
        self.resumes = self.resumes or state is SequenceState.WAITING
        self.state = state

    def take(self, slots: list[int]) -> None:
        """Assign these slots."""
        self.slots, self.slot = slots, slots[0]
        self.turn_length = len(self.output_ids)

    def count_prompt(self) -> int:
        """The tokens of the prompt just read: reported once for all answers to a request, then 0."""
        if self.prompt_read:
            return 0
        for sequence in (self, *self.siblings):
            sequence.prompt_read = True
        return len(self.request.prompt_ids)

    def append(self, token_id: int) -> tuple[str, str | None]:
        """Append a sampled token. Returns the text that became final and the finish reason, if it ends the answer."""
        self.output_ids.append(token_id)
        if self.first_token is None:
            self.first_token = time.monotonic()
        if token_id in self.stop_ids:
            return self._text.flush(), "stop"
        text, stopped = self._text.add(token_id)
        if stopped:
            return text, "stop"
        if self._mask is not None and self._mask.accept(token_id):
            return text + self._text.flush(), "stop"
        if len(self.output_ids) >= self.max_tokens:
            return text + self._text.flush(), "length"
        return text, None

    def last_outputs(self, finish_reason: str, **fields: Any) -> list[Output]:
        """The Output that ends this answer, with its timing."""
        return [self.output(self.index, len(self.output_ids), finish_reason, **fields)]

    def output(self, index: int, completion_tokens: int, finish_reason: str, **fields: Any) -> Output:
        """A final Output with its counts and timing."""
        now = time.monotonic()
        began, first = self.started or now, self.first_token or now
        return Output(
            request_id=self.request.id,
            index=index,
            finish_reason=finish_reason,
            prompt_tokens=len(self.request.prompt_ids) if self.prompt_read else 0,
            cached_tokens=self.cached_tokens if self.prompt_read else 0,
            completion_tokens=completion_tokens,
            timing=Timing(began - self.arrived, first - self.arrived, now - self.arrived),
            **fields,
        )
