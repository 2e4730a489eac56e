"""What the files of a backbone directory say before anything is loaded, and why one cannot be used. No torch.

Every check reads a few kilobytes: the configs, the head of a weights file.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pedro.errors import BackboneError

MODEL_TYPES = ("gemma", "gemma2", "gemma3_text", "gpt2", "gpt_neox", "llama", "mistral", "phi3", "qwen2", "qwen3")
"""The architectures whose projections are known (`pedro.methods.architectures`)."""
QUANTIZERS = {
    "gptq": "gptqmodel",
    "awq": "autoawq",
    "bitsandbytes": "bitsandbytes",
    "compressed-tensors": "llm-compressor",
}
"""Packages by the `quant_method` of what they write."""
MAX_CONFIG_BYTES = 4_000_000
LFS = b"version https://git-lfs"


def read_json(path: Path, name: str) -> dict[str, Any]:
    """A config of the backbone `name`, {} where there is none. Raises BackboneError if it is no JSON object."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError(f"{path.stat().st_size:,} bytes are too many")
        value = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(value, dict):
            raise ValueError(f"expected an object, got {type(value).__name__}")
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
    weights = sorted(directory.glob("*.safetensors"))
    if (directory / "adapter_config.json").is_file() and not (directory / "config.json").is_file():
        base = read_json(directory / "adapter_config.json", name).get("base_model_name_or_path") or "its own backbone"
        return f"is an adapter, not a backbone; give the backbone that it was trained on ({base})"
    if (directory / "config.json").is_file() and not weights and list(directory.glob("pytorch_model*.bin")):
        return (
            "holds pytorch_model.bin (pickle), which may hold code and is refused; convert it where you trust it: "
            f'python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('NEW_DIRECTORY')\" and copy its tokenizer files"
        )
    if not (directory / "config.json").is_file() or not weights:
        return "holds no config.json with *.safetensors; give a transformers directory saved with safetensors"
    for path in (*weights, directory / "tokenizer.json"):
        if path.is_file() and _starts_with(path, LFS):
            return f"holds a Git LFS pointer in place of {path.name}; run `git lfs pull` there"
    config = read_json(directory / "config.json", name)
    for file in ("config.json", "tokenizer_config.json"):
        if read_json(directory / file, name).get("auto_map"):
            return f"needs code of its own (auto_map in {file}), which is never run; use a backbone of {_known()}"
    if quantization := config.get("quantization_config"):
        method = quantization.get("quant_method", "?") if isinstance(quantization, dict) else "?"
        package = f" by {QUANTIZERS[method]}" if method in QUANTIZERS else ""
        return (
            f"is quantised{package} (quantization_config: {method}), which is not supported; use the float32, bfloat16 "
            "or float16 weights that it was made from"
        )
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        return f"has the architecture {model_type!r}, which is not supported; use one of {_known()}"
    return None


def _known() -> str:
    return ", ".join(MODEL_TYPES)


def _starts_with(path: Path, head: bytes) -> bool:
    with path.open("rb") as stream:
        return stream.read(len(head)) == head
