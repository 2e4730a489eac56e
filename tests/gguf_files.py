"""Tiny GGUF files as llama.cpp's converter writes them, and the weights that their readers should find."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from methods_models import tiny_backbone
from transformers.convert_slow_tokenizer import bytes_to_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *bytes_to_unicode().values(), "he", "hel", "Ġt"]
MERGES = ["h e", "he l", "Ġ t"]
CONTROL, NORMAL = 3, 1
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": len(TOKENS)}
HEADS = {"llama": 16, "qwen2": 16, "qwen3": 32, "gemma2": 32, "phi3": 16}
GGUF_NAMES = {"gemma3_text": "gemma3"}


def tiny(model_type: str = "llama") -> PreTrainedModel:
    """The tiny backbone of an architecture, wide enough for blocks of 32 and with a vocabulary of TOKENS."""
    changes: dict[str, Any] = {**SIZES, **({"head_dim": 32} if HEADS.get(model_type) == 32 else {})}
    if model_type == "gpt2":
        changes = {**SIZES, "intermediate_size": None, "n_inner": 96}
    tied = {"tie_word_embeddings": True} if model_type == "llama" else {}
    return tiny_backbone(model_type, bos_token_id=1, eos_token_id=2, pad_token_id=2, **changes, **tied)


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """A Llama's query or key weights in llama.cpp's order of rotary halves."""
    return (
        weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)
    )


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F16",
    *,
    skip: Sequence[str] = (),
    extra: Sequence[str] = (),
    **changes: Any,
) -> dict[str, torch.Tensor]:
    """Write `model` to `path` with its matrices quantised as `kind`; the dequantised weights by the model's names.

    `changes` are metadata keys with "__" for ".", None to leave one out; `skip` and `extra` name tensors.
    """
    config, found = model.config, {}
    arch = GGUF_NAMES.get(config.model_type, config.model_type)
    metadata = {
        f"{arch}.context_length": config.max_position_embeddings,
        f"{arch}.embedding_length": config.hidden_size,
        f"{arch}.block_count": config.num_hidden_layers,
        f"{arch}.feed_forward_length": 96,
        f"{arch}.attention.head_count": config.num_attention_heads,
        f"{arch}.attention.head_count_kv": getattr(config, "num_key_value_heads", None),
        f"{arch}.attention.layer_norm_rms_epsilon": getattr(config, "rms_norm_eps", None),
        f"{arch}.attention.layer_norm_epsilon": getattr(config, "layer_norm_epsilon", None),
        f"{arch}.attention.key_length": getattr(config, "head_dim", None),
        f"{arch}.attention.sliding_window": getattr(config, "sliding_window", None),
        f"{arch}.rope.dimension_count": HEADS.get(config.model_type),
        f"{arch}.rope.freq_base": 10000.0,
        "general.name": "tiny",
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": TOKENS,
        "tokenizer.ggml.token_type": [CONTROL] * 3 + [NORMAL] * (len(TOKENS) - 3),
        "tokenizer.ggml.merges": MERGES,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **{key.replace("__", "."): value for key, value in changes.items()},
    }
    writer = GGUFWriter(path, metadata.pop("general.architecture", arch))
    for key, value in metadata.items():
        _add(writer, key, value)
    names = gguf.get_tensor_name_map(next(a for a, n in gguf.MODEL_ARCH_NAMES.items() if n == arch), 8)
    form = GGMLQuantizationType[kind]
    for name, parameter in model.named_parameters():
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs is not None, name
        weight = parameter.detach().clone()
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            heads = config.num_attention_heads if ".q_proj" in name else config.num_key_value_heads
            weight = permuted(weight, heads)
        turned = arch == "gpt2" and any(part in theirs for part in ("attn_qkv.w", "ffn_down.w", "ffn_up.w", "output.w"))
        if turned:
            weight = weight.T
        lifted = arch in ("gemma2", "gemma3") and theirs.endswith("norm.weight")
        as_form = form if weight.dim() > 1 and weight.shape[-1] % 32 == 0 else GGMLQuantizationType.F32
        blocks = gguf.quantize((weight + lifted).float().contiguous().numpy(), as_form)
        restored = torch.from_numpy(gguf.dequantize(blocks, as_form).copy()) - float(lifted)
        if arch == "llama" and (".q_proj" in name or ".k_proj" in name):
            restored = restored.reshape(heads, -1, 2, *restored.shape[1:]).swapaxes(1, 2).reshape(restored.shape)
        found[name] = (restored.T if turned else restored).to(torch.bfloat16)
        if theirs not in skip:
            writer.add_tensor(theirs, blocks, raw_dtype=as_form)
    for name in extra:
        writer.add_tensor(name, torch.zeros(64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def _add(writer: GGUFWriter, key: str, value: object) -> None:
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, list)
        writer.add_array(key, value)
