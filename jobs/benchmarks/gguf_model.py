"""A benchmark's random Llama as a GGUF file for llama.cpp, float32 or quantised; each token is a word of its own. Its
LoRA adapters, too."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.model_sizes import FIRST_TOKEN_ID, ModelSize, bench_folder, make_model

if TYPE_CHECKING:
    import torch

NORMAL, UNKNOWN, CONTROL = 1, 2, 3  # llama.cpp's types of tokens
NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def saved_gguf(size: ModelSize, kind: str = "F32") -> Path:
    """The file; made once. Its weights are those of `saved_model`, in llama.cpp's `kind`: F32, Q8_0 or Q4_1, the last
    with embedding and head in Q8_0."""
    path = bench_folder() / size.name / ("backbone.gguf" if kind == "F32" else f"backbone-{kind}.gguf")
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        making = path.with_name(f"backbone.{os.getpid()}.tmp")
        _write(making, size, kind)
        making.rename(path)
    return path


def saved_lora_gguf(directory: Path, size: ModelSize) -> Path:
    """The LoRA adapter in `directory` (of `adapter_directories`) as a file of its own beside it, float32; made once."""
    path = directory.with_name(f"{directory.name}.gguf")
    if not path.is_file():
        making = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        _write_lora(making, directory, size)
        making.rename(path)
    return path


def _write_lora(path: Path, directory: Path, size: ModelSize) -> None:
    import gguf
    from safetensors.torch import load_file

    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    alpha = json.loads((directory / "adapter_config.json").read_text())["lora_alpha"]
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)  # the rank is the tensors' own
    for name, tensor in load_file(directory / "adapter_model.safetensors").items():
        module, factor = name.removeprefix("base_model.model.").removesuffix(".weight").rsplit(".lora_", 1)
        ordered = _ordered(module, tensor, size) if factor == "B" else tensor
        writer.add_tensor(f"{_named(module)}.lora_{factor.lower()}", ordered.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write(path: Path, size: ModelSize, kind: str) -> None:
    import gguf
    from gguf.quants import quantize

    model = make_model(size)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name(size.title)
    writer.add_context_length(size.context)
    writer.add_embedding_length(size.hidden)
    writer.add_block_count(size.layers)
    writer.add_feed_forward_length(size.ffn)
    writer.add_head_count(size.heads)
    writer.add_head_count_kv(size.kv_heads)
    writer.add_layer_norm_rms_eps(float(model.config.rms_norm_eps))
    writer.add_rope_dimension_count(size.hidden // size.heads)
    writer.add_vocab_size(size.vocab)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(["<unk>", "<s>", "</s>", *(f"▁w{token}" for token in range(FIRST_TOKEN_ID, size.vocab))])
    writer.add_token_scores([0.0] * size.vocab)
    writer.add_token_types([UNKNOWN, CONTROL, CONTROL, *[NORMAL] * (size.vocab - FIRST_TOKEN_ID)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight" or not size.tied:
            outer = name.removesuffix(".weight") in OUTER and kind != "F32"
            wanted = gguf.GGMLQuantizationType["F32" if tensor.dim() < 2 else "Q8_0" if outer else kind]
            values = _ordered(name, tensor, size).contiguous().numpy()
            writer.add_tensor(_named(name), quantize(values, wanted), raw_dtype=wanted)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _named(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in OUTER:
        return f"{OUTER[stem]}.weight"
    _, _, number, inner = stem.split(".", 3)
    return f"blk.{number}.{NAMES[inner]}.weight"


def _ordered(name: str, tensor: torch.Tensor, size: ModelSize) -> torch.Tensor:
    """Queries and keys in llama.cpp's order of rotary halves."""
    heads = size.heads if "q_proj" in name else size.kv_heads if "k_proj" in name else 0
    if not heads:
        return tensor
    return tensor.reshape(heads, 2, -1, tensor.shape[1]).swapaxes(1, 2).reshape(tensor.shape)
