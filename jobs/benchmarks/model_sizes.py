"""Sizes of the backbones that are measured, their prompts and files. Standard library until a model is made."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROMPT_TOKENS, NEW_TOKENS = 279, 33
FIRST_TOKEN_ID = 3  # 0 to 2 are special in Llama's vocabulary


@dataclass(frozen=True)
class ModelSize:
    """A Llama: `hidden` wide, with random weights, so that only its size matters."""

    name: str
    title: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    tied: bool
    vocab: int = 32_000
    context: int = 4096

    @property
    def read_parameters(self) -> int:
        """The weights that a decode step reads: all but the embedding table, of which it reads a row per token."""
        kv_width = self.hidden // self.heads * self.kv_heads
        block = 2 * self.hidden * (self.hidden + kv_width) + 3 * self.hidden * self.ffn
        return self.layers * block + self.vocab * self.hidden

    @property
    def kv_values(self) -> int:
        """Values that the KV cache holds per token."""
        return 2 * self.layers * self.hidden // self.heads * self.kv_heads

    @property
    def digest(self) -> str:
        """Stands in for the backbone's digest in adapters made for it."""
        return f"sha256:random-{self.name}"


MODEL_SIZES = {
    size.name: size
    for size in (
        ModelSize("tiny", "1 block of 64", 64, 1, 4, 4, 128, True, vocab=256, context=512),
        ModelSize("S", "15 M", 288, 6, 6, 6, 768, True),
        ModelSize("M", "125 M", 768, 12, 12, 4, 2048, False),
        ModelSize("SmolLM2", "SmolLM2-135M", 576, 30, 9, 3, 1536, True, vocab=49_152, context=8192),
        ModelSize("7B", "LLaMA-2-7B", 4096, 32, 32, 32, 11_008, False),
    )
}


def bench_folder() -> Path:
    """Where backbones and adapters made for benchmarks stay between runs; safe to delete."""
    return Path(os.environ.get("PEDRO_HOME") or ".pedro").absolute() / "bench"


def prompts(size: ModelSize, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` random prompts, the same for every engine that is given the same seed."""
    rng = random.Random(seed)  # noqa: S311
    return [rng.choices(range(FIRST_TOKEN_ID, size.vocab), k=length) for _ in range(count)]


def make_model(size: ModelSize, device: str = "cpu", dtype: str | None = None) -> PreTrainedModel:
    """A frozen transformers model of this size; float32 on the CPU and bfloat16 elsewhere unless `dtype` says."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.ffn,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=size.context,
        tie_word_embeddings=size.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    wanted = getattr(torch, dtype or default_dtype(device))
    with torch.device(device):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=wanted)
    model.generation_config.eos_token_id = None
    model.eval().requires_grad_(False)
    return model


def default_dtype(device: str) -> str:
    """float32 on the CPU, bfloat16 elsewhere."""
    return "float32" if device == "cpu" else "bfloat16"


def saved_model(size: ModelSize) -> Path:
    """Directory of a model of this size in transformers' format, for engines that load from disk. Made once."""
    directory = bench_folder() / size.name / "backbone"
    if not (directory / "config.json").is_file():
        making = directory.with_name(f"backbone.{os.getpid()}.tmp")
        make_model(size).save_pretrained(making)
        making.rename(directory)
    return directory
