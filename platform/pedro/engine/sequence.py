"""One answer to a request, as it is generated: its state, its tokens, its text and its outputs.

Every change of a sequence's state goes through `Sequence.to`, which holds the whole state machine:
waiting → prefilling → running → finished; finished from any state, and back to waiting when preempted.

Text is emitted only when it is final (`Detokenizer`): never an incomplete UTF-8 character, and never the possible
beginning of a stop text. Stop texts are found across token boundaries.
"""

from __future__ import annotations

import enum
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from pedro.errors import PedroError

if TYPE_CHECKING:
    import torch

    from pedro.engine.modulation import PreemptedState
    from pedro.engine.prefix_cache import Prefix, Reuse
    from pedro.engine.request import Request
    from pedro.engine.sampler import Logprob
    from pedro.engine.speculation import DraftHistory
    from pedro.engine.token_mask import TokenMask
    from pedro.model_protocols import TokenDecoder

NOTHING: frozenset[int] = frozenset()
MIN_TURN_TOKENS = 16  # that a sequence generates before it may be preempted (again)
REPLACEMENT = "\ufffd"
CONTEXT_TOKENS = 6  # enough context for a tokenizer to place spaces
MAX_HELD_TOKENS = 8  # more than any character has: held tokens beyond this cannot begin one
UNFINISHED_TOKENS = 3  # a UTF-8 character has at most four bytes, a token at least one


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


class Detokenizer:
    """The text of one answer, incrementally; decoded after the tail of the prompt, so that spaces come out right.

    Without a prompt the answer is decoded on its own, as it was if it was tokenised apart from its prompt. Stop texts
    are heeded after `min_tokens` tokens: they must end in a later token's text, but may begin earlier.
    """

    __slots__ = ("_context", "_decode", "_held", "_new_stream", "_passed", "_pending", "_step", "_stop", "_unstoppable")

    def __init__(
        self, tokenizer: TokenDecoder, prompt_ids: list[int], stop: tuple[str, ...] = (), min_tokens: int = 0
    ) -> None:
        self._decode, self._new_stream = _decoding(tokenizer)
        self._context, self._pending = self._whole_characters(list(prompt_ids[-CONTEXT_TOKENS:]))
        self._stop = stop
        self._held = ""  # decoded, but perhaps the beginning of a stop text
        self._passed = 0  # of these, characters of the first `min_tokens`: no stop text ends there
        self._unstoppable = min_tokens  # tokens left until stop texts count
        self._step = self._new_stream(self._context)
        for token_id in self._pending:
            self._step(token_id)

    def add(self, token_id: int) -> tuple[str, bool]:
        """Add a token. Returns the text that became final and whether a stop text was reached (which is cut off)."""
        text = self._take(token_id)
        if not self._stop:
            return text, False
        stoppable = self._unstoppable <= 0
        self._unstoppable -= 1
        return self._release(text, stoppable)

    def flush(self) -> str:
        """The text still held back, when no more tokens follow."""
        rest, self._pending = self._text_of(self._pending), []
        text, _ = self._release(rest, self._unstoppable < 0) if self._stop else (rest, False)
        text, self._held = text + self._held, ""
        return text

    def _take(self, token_id: int) -> str:
        self._pending.append(token_id)
        try:
            text = self._step(token_id)
        except Exception:  # noqa: BLE001 - raises a bare Exception, when a token changes the text of earlier ones
            text = self._text_of(self._pending)
            self._step = self._new_stream(self._pending)
        if text is not None:
            self._context, self._pending = self._pending, []
            return text
        return "" if len(self._pending) < MAX_HELD_TOKENS else self._give_up_waiting()

    def _give_up_waiting(self) -> str:
        """The text of the pending tokens, without the last ones if they may still become a character."""
        sure, unfinished = self._pending[:-UNFINISHED_TOKENS], self._pending[-UNFINISHED_TOKENS:]
        text, self._pending = self._text_of(sure), []
        self._step = self._new_stream(self._context)
        return text + "".join(map(self._take, unfinished))

    def _text_of(self, ids: list[int]) -> str:
        """The text that `ids` add after the context."""
        return self._decode([*self._context, *ids])[len(self._decode(self._context)) :] if ids else ""

    def _whole_characters(self, ids: list[int]) -> tuple[list[int], list[int]]:
        """`ids` without the last ones if these leave a character unfinished."""
        for cut in range(len(ids), max(-1, len(ids) - UNFINISHED_TOKENS - 1), -1):
            if not self._decode(ids[:cut]).endswith(REPLACEMENT):
                return ids[:cut], ids[cut:]
        return [], []

    def _release(self, text: str, stoppable: bool) -> tuple[str, bool]:
        text = self._held + text
        passed = self._passed if stoppable else len(text)
        hits = [at for at in (text.find(stop, max(0, passed - len(stop) + 1)) for stop in self._stop) if at >= 0]
        if hits and stoppable:
            self._held = ""
            return text[: min(hits)], True
        keep = max(_overlap(text, stop) for stop in self._stop)
        self._held, self._passed = text[len(text) - keep :], max(0, passed - (len(text) - keep))
        return text[: len(text) - keep], False


class _PlainStream:
    """A replacement for DecodeStream, for tokenizers without a Rust backend."""

    def __init__(self, decode: Callable[[list[int]], str], ids: list[int]) -> None:
        self._decode = decode
        self._ids = list(ids)
        self._read = len(ids)  # tokens up to here are context, already emitted

    def step(self, token_id: int) -> str | None:
        """The text completed by `token_id`, or None."""
        self._ids.append(token_id)
        before, after = self._decode(self._ids[: self._read]), self._decode(self._ids)
        if len(after) <= len(before) or after.endswith(REPLACEMENT):
            return None
        self._ids = self._ids[self._read :]
        self._read = len(self._ids)
        return after[len(before) :]


def _decoding(
    tokenizer: TokenDecoder,
) -> tuple[Callable[[list[int]], str], Callable[[list[int]], Callable[[int], str | None]]]:
    """How to decode tokens at once, and how to begin a stream after given tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if isinstance(backend, Tokenizer):
        return (
            partial(backend.decode, skip_special_tokens=True),
            lambda ids: partial(DecodeStream(ids=ids, skip_special_tokens=True).step, backend),
        )
    decode = partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return decode, lambda ids: _PlainStream(decode, ids).step


def _overlap(text: str, stop: str) -> int:
    """The length of the longest suffix of `text` that is a prefix of `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
