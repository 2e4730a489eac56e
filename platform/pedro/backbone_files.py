"""What the files of a backbone directory say before anything is loaded, and why one cannot be used. No torch.

Every check reads a few kilobytes: the configs, the head of a weights file.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pedro.errors import BackboneError

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""The architectures whose projections are known (`pedro.methods.architectures`)."""
QUANTIZERS = {
    **dict.fromkeys(("gptq", "awq"), "gptqmodel"),
    **dict.fromkeys(("bitsandbytes", "bitsandbytes_4bit", "bitsandbytes_8bit"), "bitsandbytes"),
    "compressed-tensors": "compressed-tensors",
    "quanto": "optimum-quanto",
}
"""Packages that read each `quant_method`, as transformers names them."""
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = {"config.json": 4_000_000, INDEX: 100_000_000}
MAX_OTHER_BYTES = 20_000_000  # a tokenizer_config.json may name many added tokens
MAX_DEPTH = 32
LARGEST = {  # of a config's numbers: a model that asks for more would take all memory before a weight is read
    **dict.fromkeys(("num_hidden_layers", "n_layer"), 2**10),
    **dict.fromkeys(("num_attention_heads", "num_key_value_heads", "n_head"), 2**12),
    **dict.fromkeys(("hidden_size", "n_embd", "head_dim"), 2**17),
    **dict.fromkeys(("intermediate_size", "n_inner"), 2**20),
    "vocab_size": 2**23,
    **dict.fromkeys(("max_position_embeddings", "n_positions"), 2**27),
}
LFS = b"version https://git-lfs"


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A config of the backbone `name`, {} where there is none. Raises BackboneError if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_JSON_BYTES.get(path.name, MAX_OTHER_BYTES):
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
        if _is_deeper(value, MAX_DEPTH):
            raise RecursionError
    except (OSError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)
        raise BackboneError(
            f"backbone: the {path.name} of {name!r} cannot be loaded ({reason}); copy or save the directory again",
            param="backbone",
        ) from error
    return value


def check_files(directory: Path, name: str) -> None:
    """Raise BackboneError, with the remedy, for a directory that no loader should be given."""
    if problem := _problem(directory, name):
        raise BackboneError(f"backbone: {name!r} {problem}", param="backbone")


def _problem(directory: Path, name: str) -> str | None:
    files = [path for path in sorted(directory.glob("*")) if path.is_file()]
    for path in files:
        if path.suffix in (".json", ".safetensors", ".model", ".txt", ".bin") and _starts_with(path, LFS):
            return f"holds a Git LFS pointer in place of {path.name}; run `git lfs pull` there"
    names = {path.name for path in files}
    if "adapter_config.json" in names:  # transformers would load its base, whatever else is here
        base = read_json(directory / "adapter_config.json", name).get("base_model_name_or_path") or "its own backbone"
        return f"is an adapter, not a backbone; give the backbone that it was trained on ({base})"
    return _weights_problem(directory, name, names) or config_problem(directory, name)


def _weights_problem(directory: Path, name: str, names: set[str]) -> str | None:
    if "config.json" not in names or not {SINGLE, INDEX} & names:
        if "config.json" in names and any(file.startswith("pytorch_model") for file in names):
            return (
                "holds pytorch_model.bin (pickle), which may hold code and is refused; convert it where you trust it: "
                'python -c "import sys; from transformers import AutoModelForCausalLM as M; '
                "M.from_pretrained(sys.argv[1], use_safetensors=False, dtype='auto').save_pretrained(sys.argv[1])\" "
                + shlex.quote(str(directory))
            )
        return f"holds no config.json with {SINGLE} or {INDEX}; give a transformers directory saved with safetensors"
    if SINGLE not in names:
        weight_map = read_json(directory / INDEX, name).get("weight_map")
        shards = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not shards or not names.issuperset(shards):
            lacking = next((shard for shard in shards if shard not in names), "any file")
            return f"lacks {lacking} of {INDEX}; copy all its files"
    return None


def config_problem(directory: Path, name: str) -> str | None:
    """Why the backbone whose configs are in `directory` cannot be used, as far as they say."""
    config = read_json(directory / "config.json", name)
    for file in ("config.json", "tokenizer_config.json"):
        if read_json(directory / file, name).get("auto_map"):
            return (
                f"needs code of its own (auto_map in {file}), which is never run; use a backbone of {_known()}, or "
                f"take auto_map out of a copy if transformers knows it without"
            )
    if quantization := config.get("quantization_config"):
        method = str(quantization.get("quant_method", "?")) if isinstance(quantization, dict) else "?"
        package = f", which needs {QUANTIZERS[method]}," if method in QUANTIZERS else ""
        return (
            f"is quantised by {method}{package} and not supported (quantization_config); use the float32, bfloat16 "
            "or float16 weights that it was made from"
        )
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        kind = " (an encoder-decoder)" if config.get("is_encoder_decoder") is True else ""
        return f"has the architecture {model_type!r}{kind}, which is not supported; use one of {_known()}"
    return size_problem(config)


def size_problem(config: Mapping[str, Any]) -> str | None:
    """Which size in a config no model has."""
    for field, most in LARGEST.items():
        value = config.get(field)
        if value is not None and (type(value) is not int or not 1 <= value <= most):
            return f"has {field} {value!r:.40} in config.json; expected a whole number from 1 to {most:,}"
    return None


def _is_deeper(value: Any, levels: int) -> bool:
    children = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels < 0 or any(_is_deeper(child, levels - 1) for child in children)


def _known() -> str:
    return ", ".join(MODEL_TYPES)


def _starts_with(path: Path, head: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(head)) == head
