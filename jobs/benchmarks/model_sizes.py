"""The backbones that are measured, their prompts, and where their files lie. Standard library until a model is made."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROMPT_TOKENS, NEW_TOKENS = 279, 33
FIRST_TOKEN_ID = 3  # 0 to 2 are special in Llama's vocabulary


@dataclass(frozen=True)
class Shape:
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
        """The weights that a decode step reads: all but the embedding's table, which gives one row a token."""
        kv_width = self.hidden // self.heads * self.kv_heads
        block = 2 * self.hidden * (self.hidden + kv_width) + 3 * self.hidden * self.ffn
        return self.layers * block + self.vocab * self.hidden

    @property
    def kv_values(self) -> int:
        """Numbers that the KV cache holds for a token."""
        return 2 * self.layers * self.hidden // self.heads * self.kv_heads

    @property
    def digest(self) -> str:
        """What stands for the backbone's digest in the adapters made for it."""
        return f"sha256:random-{self.name}"


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", "1 block of 64", 64, 1, 4, 4, 128, True, vocab=256, context=512),
        Shape("S", "15 M", 288, 6, 6, 6, 768, True),
        Shape("M", "125 M", 768, 12, 12, 4, 2048, False),
        Shape("7B", "LLaMA-2-7B", 4096, 32, 32, 32, 11_008, False),
    )
}


def bench_folder() -> Path:
    """Where backbones and adapters made for benchmarks stay between runs; safe to delete."""
    return Path(os.environ.get("PEDRO_HOME") or ".pedro").absolute() / "bench"


def prompts(shape: Shape, count: int, length: int, seed: int) -> list[list[int]]:
    """`count` random prompts, the same for every engine that is given the same seed."""
    draw = random.Random(seed)  # noqa: S311
    return [draw.choices(range(FIRST_TOKEN_ID, shape.vocab), k=length) for _ in range(count)]


def make_model(shape: Shape, device: str = "cpu", dtype: str | None = None) -> Any:
    """The shape as a transformers model, frozen; float32 on the CPU and bfloat16 elsewhere unless `dtype` says."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    wanted = getattr(torch, dtype or default_dtype(device))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted)
    model.generation_config.eos_token_id = None
    return model.eval().requires_grad_(False)


def default_dtype(device: str) -> str:
    """float32 on the CPU, bfloat16 elsewhere."""
    return "float32" if device == "cpu" else "bfloat16"


def saved_model(shape: Shape) -> Path:
    """The shape's directory in transformers' format, for engines that load from disk. Made once."""
    directory = bench_folder() / shape.name / "backbone"
    if not (directory / "config.json").is_file():
        making = directory.with_name(f"backbone.{os.getpid()}.tmp")
        make_model(shape).save_pretrained(making)
        making.rename(directory)
    return directory
