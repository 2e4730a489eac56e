"""Turns a request into sequences, and refuses at once what can never run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from pedro.engine.beam import BeamSequence
from pedro.engine.sequence import Request, Sequence
from pedro.errors import PedroError
from pedro.methods.architectures import config_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from pedro.engine.config import EngineConfig
    from pedro.model_protocols import ModelConfig, TokenDecoder

SHORT_ANSWER = 64  # tokens


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
