"""Answer shapes as masks of one backbone's tokens: compiled once per tenant, concurrently with the engine's steps.

A tenant's shapes are compiled in turn and cached for that tenant only, so that response times do not reveal other
tenants' shapes. The first compilation, which might explode, runs in a process with limits.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from llguidance import LLMatcher, LLTokenizer
from llguidance.hf import from_tokenizer

from pedro.errors import PedroError
from pedro.serving.prompts import Turns, to_its_end
from pedro.serving.shape_worker import ShapeWorker, limits, too_much

if TYPE_CHECKING:
    from pedro.engine.token_mask import TokenMask
    from pedro.gateway.backend import AnswerShape
    from pedro.model_protocols import Tokenizer

MAX_SHAPES = 16  # per tenant
MAX_TENANTS = 64
FIRST_S, EACH_S = 0.1, 0.002  # compute time for the masks of one answer, while others wait
CHEAP_S = 0.02  # a shape that is parsed faster may be parsed again between two steps
NewMask = Callable[[], "TokenMask"]
Key = tuple["AnswerShape", bool]


class AnswerShapes:
    """The shapes of one replica, on its event loop. `vocabulary` is the model's, `eos_ids` end its answers."""

    def __init__(self, tokenizer: Tokenizer, vocabulary: int, eos_ids: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._vocabulary = vocabulary
        self._eos_ids = sorted(eos_ids)
        self._spaces = _puts_spaces(tokenizer)
        self._tokens: LLTokenizer | None = None  # created on first use: it takes a second
        self._unlike: frozenset[int] = frozenset()  # tokens whose spelling is unique
        self._worker = ShapeWorker()
        self._free = asyncio.Lock()  # first come, first served
        self._turns = Turns()
        self._known: OrderedDict[str, OrderedDict[Key, CompiledShape]] = OrderedDict()

    async def new_mask(self, shape: AnswerShape, tenant: str, apart: bool = False) -> NewMask:
        """Creates the mask of one answer. Raises PedroError if the shape cannot be compiled or exceeds the limits.

        `apart`: the answer is decoded on its own (`Request.apart`), so that a leading space added by some tokenizers
        is not part of it.
        """
        key = shape, apart and self._spaces
        async with self._turns.of(tenant):
            known = self._of(tenant)
            made = known.pop(key, None)
            if made is None or made.used_up:
                async with self._free:
                    made = await to_its_end(self._compile, *key)
            known[key] = made  # at the end: most recently used
            if len(known) > MAX_SHAPES:
                known.popitem(last=False)
        return made.start

    def close(self) -> None:
        """End the process."""
        self._worker.close()

    def _of(self, tenant: str) -> OrderedDict[Key, CompiledShape]:
        known = self._known.setdefault(tenant, OrderedDict())
        self._known.move_to_end(tenant)
        if len(self._known) > MAX_TENANTS:
            self._known.popitem(last=False)
        return known

    def _compile(self, shape: AnswerShape, spaced: bool) -> CompiledShape:
        """Runs on a thread; llguidance releases the GIL."""
        grammar = self._worker.grammar(shape, spaced)
        if self._tokens is None:
            self._tokens = self._llguidance_tokenizer(shape.param)
            self._unlike = _unlike(self._tokens)
        return CompiledShape(self._tokens, grammar, -(-self._vocabulary // 32), shape.param, self._unlike)

    def _llguidance_tokenizer(self, param: str) -> LLTokenizer:
        tokenizer: Any = self._tokenizer
        try:
            return from_tokenizer(tokenizer, self._vocabulary, self._eos_ids or None)
        except ValueError as error:
            raise PedroError(
                f"{param}: this backbone's tokenizer does not support answer shapes",
                param=param,
                code="unsupported_parameter",
            ) from error


class CompiledShape:
    """A shape's grammar, parsed by llguidance for one tokenizer. Raises PedroError if that exceeds the limits.

    Answers share the lexer's states, and their limit. Beyond that limit, an answer continues with a separate lexer, so
    that its result is the same as alone; the shape is `used_up`.
    """

    def __init__(self, tokens: LLTokenizer, grammar: str, words: int, param: str, unlike: frozenset[int]) -> None:
        self.words, self.param, self.unlike = words, param, unlike
        self._tokens, self._grammar = tokens, grammar
        self.used_up = self.is_cheap = False
        began = time.thread_time()
        self.matcher = self.read()
        self.start().bits()  # the first mask is the most expensive, and the same for all answers
        self.is_cheap = time.thread_time() - began < CHEAP_S

    def read(self) -> LLMatcher:
        """Parse the grammar again."""
        return LLMatcher(self._tokens, self._grammar, log_level=0, limits=limits())

    def start(self) -> Matcher:
        """The mask of a new answer."""
        return Matcher(self)


class Matcher:
    """The mask of one answer. Implements `pedro.engine.token_mask.TokenMask`."""

    def __init__(self, shape: CompiledShape) -> None:
        self._shape = shape
        self._matcher = shape.matcher.deep_copy()
        self._is_own = False
        self._taken: list[int] = []
        self._bits = torch.zeros(shape.words, dtype=torch.int32)
        self._cpu_left_s = FIRST_S

    def bits(self) -> torch.Tensor:
        """The tokens that may come next."""
        began = time.thread_time()
        self._compute()
        if self._matcher.is_error() and not self._is_own:
            self._shape.used_up = self._is_own = True
            if self._shape.is_cheap:
                self._matcher = self._shape.read()
                self._matcher.consume_tokens(self._taken)
                self._compute()
        self._cpu_left_s += EACH_S + began - time.thread_time()
        if self._cpu_left_s < 0 or self._matcher.is_error():
            raise too_much(self._shape.param)
        return self._bits

    def lets(self, token_id: int) -> bool:
        """Whether the token may come next. A mask may exclude some of several tokens with the same spelling."""
        if token_id not in self._shape.unlike:
            return False
        began = time.thread_time()
        good = not self._matcher.is_error() and self._matcher.validate_tokens([token_id]) == 1
        self._cpu_left_s += (EACH_S if good else 0) + began - time.thread_time()
        return good and self._cpu_left_s >= 0

    def accept(self, token_id: int) -> bool:
        """Advance by the chosen token; True if nothing can follow. Errors are reported by `bits`."""
        self._taken.append(token_id)
        return bool(self._matcher.consume_token(token_id) and self._matcher.is_stopped())

    def _compute(self) -> None:
        self._matcher.unsafe_compute_mask_ptr(self._bits.data_ptr(), self._bits.nbytes)


def _unlike(tokens: LLTokenizer) -> frozenset[int]:
    """The tokens whose text is unique; special tokens have no text."""
    first: dict[bytes, int] = {}
    twice: set[bytes] = {b""}
    for token in (token for token in range(tokens.vocab_size) if not tokens.is_special_token(token)):
        text = tokens.decode_bytes([token])
        if first.setdefault(text, token) != token:
            twice.add(text)
    return frozenset(token for text, token in first.items() if text not in twice)


def _puts_spaces(tokenizer: Tokenizer) -> bool:
    """Whether a text's first token has a leading space that is only shown after another token."""
    ids = tokenizer("a", add_special_tokens=False).input_ids
    alone = tokenizer.decode(ids)
    return tokenizer.decode([*ids, *ids]) == f"{alone} {alone}"
