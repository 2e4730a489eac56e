"""Attention of half-precision models on a CPU, in float32: PyTorch's kernel for it in bfloat16 and float16 is slower
there, most of all backwards, and less exact. Imports transformers, so only who loads a model imports this.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "pedro_float32"


def attend_in_float32(model: PreTrainedModel) -> None:
    """Have a model that attends by PyTorch's `scaled_dot_product_attention` do so in float32."""
    config: Any = model.config
    if config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        config._attn_implementation = NAME


def attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers calls it: query [B, H, T, d] -> [B, T, H, d], in the model's dtype."""
    function: Any = sdpa_attention_forward
    if query.device.type != "cpu":  # the model was moved
        made, _ = function(module, query, key, value, attention_mask, **options)
        return made, None
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask.float()
    made, _ = function(module, query.float(), key.float(), value.float(), attention_mask, **options)
    return made.to(query.dtype), None
