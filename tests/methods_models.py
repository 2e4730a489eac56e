"""Tiny random backbones of every supported architecture, and adapters with random weights, for the methods tests."""

from __future__ import annotations

from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from pedro import PedroConfig
from pedro.methods import get_method

VOCABULARY = 64
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 8, "sliding_window": 8},
    "gemma3_text": {"head_dim": 8, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt2": {"num_key_value_heads": None, "intermediate_size": None, "n_inner": 48},
    "gpt_neox": {"num_key_value_heads": None},
}
MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "gpt2", "gpt_neox")


def tiny_backbone(model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """The same tiny causal LM each time it is asked for, with biases that are not zero, in eval mode."""
    options = {k: v for k, v in {**SIZES, **SPECIAL.get(model_type, {}), **changes}.items() if v is not None}
    if model_type == "gemma3_text":
        options["layer_types"] = options["layer_types"][: options["num_hidden_layers"]]
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(8)  # far from linear, so that a wrong position or row shows
    model.eval()
    return model


def randomize(model: nn.Module, seed: int = 1, std: float = 0.3, adapter: str = "default") -> nn.Module:
    """Give an adapter weights as after a long training: vectors far from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".pedro_" in name and name.endswith(f".{adapter}"):
                scale = std if "pedro_a" not in name and "pedro_b" not in name else 0.02
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.device), alpha=scale)
    return model


def tuned(model_type: str = "llama", seed: int = 1, changes: dict[str, Any] | None = None, **options: Any) -> nn.Module:
    """A tiny backbone with one random PEDRO adapter, in eval mode."""
    model = get_peft_model(tiny_backbone(model_type, **(changes or {})), PedroConfig(task_type="CAUSAL_LM", **options))
    return randomize(model, seed).eval()


def late_prompt(model_type: str = "llama", attention: str = "sdpa", **options: Any) -> nn.Module:
    """A tiny backbone with soft tokens that matter, in eval mode."""
    backbone = tiny_backbone(model_type)
    backbone.set_attn_implementation(attention)
    model = get_method("lpt").apply(backbone, {"r": 8, "tokens": 4, **options}).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, p in get_method("lpt").parameter_groups(model)[0]:
            p.add_(torch.randn(p.shape, generator=generator), alpha=0.3)
    return model


def tokens(rows: int = 2, length: int = 9, seed: int = 3) -> torch.Tensor:
    """Random token ids [rows, length], none of them special."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))
