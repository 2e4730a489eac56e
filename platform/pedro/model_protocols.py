"""What the platform needs of transformers' objects: a tokenizer, a decoder, a model that generates, its config.

Types for the checker alone: nothing here is compared at run time, and no architecture has all that `ModelConfig` names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, overload

if TYPE_CHECKING:
    from pathlib import Path

    import torch
    from tokenizers import AddedToken
    from transformers import BatchEncoding


class TokenDecoder(Protocol):
    """What the engine asks: text of tokens, and which one ends an answer."""

    eos_token_id: int | None

    def decode(self, token_ids: list[int], /, **options: Any) -> str: ...


class Tokenizer(TokenDecoder, Protocol):
    """A tokenizer of transformers; `load_tokenizer` gives it a pad token."""

    bos_token_id: int | None
    pad_token_id: int
    eos_token: str | None
    chat_template: str | dict[str, str] | None
    is_fast: bool
    all_special_tokens: list[str]
    added_tokens_decoder: dict[int, AddedToken]
    init_kwargs: dict[str, Any]

    def __len__(self) -> int: ...
    def __call__(self, text: str | list[str], **options: Any) -> BatchEncoding: ...
    def get_vocab(self) -> dict[str, int]: ...
    def get_chat_template(self) -> str: ...
    def save_pretrained(self, save_directory: str | Path) -> tuple[str, ...]: ...
    @overload
    def convert_ids_to_tokens(self, ids: int) -> str | None: ...
    @overload
    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]: ...


class Generates(Protocol):
    """A causal model, bare or with PEFT's adapter on it, as far as it writes."""

    def generate(self, **options: Any) -> torch.Tensor: ...


class ModelConfig(Protocol):
    """The config of a transformers model, by the names that its `attribute_map` gives to every architecture."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    hidden_act: str
    rms_norm_eps: float
