"""The capabilities of each method, as plain records, and how many parameters it trains on LLaMA-2 7B.

Only shapes are made for the counts: no memory stands behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pedro.methods.registry import METHODS, count_parameters

if TYPE_CHECKING:
    from pedro.methods.method import Method

LLAMA_2_7B: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
}


def capabilities(counts: bool = True) -> list[dict[str, Any]]:
    """One record a method, in the registry's order; a capability that depends on the options is None.

    `trained_parameters` (without bias vectors, as the paper counts) is None without `counts`, and for `peft`.
    """
    return [
        {
            "name": method.name,
            "title": method.title,
            "source": method.source,
            "equation": method.equation,
            "options": method.options,
            "paper_options": method.paper,
            "trained_parameters": (
                count_on_llama_2_7b(method, method.paper)["trainable_without_bias"]
                if counts and method.name != "peft"
                else None
            ),
            "mixed_batches": method.mixed_batches,
            "mergeable": method.mergeable,
            "identity_at_init": method.identity_at_init,
            "conditions_on_prompt": method.conditions_on_prompt,
        }
        for method in METHODS.values()
    ]


def llama_2_7b(method: Method, options: dict[str, Any] | None = None, layers: int = 32) -> torch.nn.Module:
    """LLaMA-2 7B, or its first layers, with a fresh adapter of `method`, on the meta device."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_2_7B, num_hidden_layers=layers))
        return method.apply(model.requires_grad_(False), options)


def count_on_llama_2_7b(method: Method, options: dict[str, Any]) -> dict[str, int]:
    """`count_parameters` of LLaMA-2 7B, from 2 and 4 of its layers: each pair of layers has equally many of each."""
    two, four = (count_parameters(llama_2_7b(method, options, layers)) for layers in (2, 4))
    return {kind: two[kind] + (four[kind] - two[kind]) * 15 for kind in two}
