"""Readers of strangers' files as functions of bytes: each has a reader of ours take them, and raises what is neither an
answer nor an error of ours. For `fuzz_by_coverage.py`, which searches, and for tests, which try a few inputs."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from pedro.adapter_check import check_adapter
from pedro.adapter_directory import CONFIG, WEIGHTS, tensor_heads, write_manifest
from pedro.backbones.gguf_file import check_gguf
from pedro.backbones.gguf_header import ARRAY, MAGIC, STRING
from pedro.errors import AdapterError, BackboneError, PedroError
from pedro.methods.adapter_files import read_config

LORA = b'{"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], "rank_pattern": {"q": 1}}'
MADE = {"backbone": {"id": "tiny", "digest": "sha256:a"}, "method": {"name": "lora"}, "prompt_format": {"id": "raw"}}
NUMBERS = bytes(64)
UINT16 = 2


def weights(data: bytes, folder: Path) -> None:
    """A safetensors file; behind an even first byte, its header alone."""
    if data and not data[0] % 2:
        data = struct.pack("<Q", len(data) - 1) + data[1:] + NUMBERS
    (folder / WEIGHTS).write_bytes(data)
    (folder / CONFIG).write_bytes(LORA)
    with suppress(AdapterError):
        write_manifest(folder, MADE)
        check_adapter(folder)
        ours = {name: list(shape) for name, _, shape, *_ in tensor_heads(folder / WEIGHTS)}
        with safe_open(folder / WEIGHTS, "np") as file:
            theirs = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 (no mapping)
        assert ours == theirs, "what is checked is what a loader finds"


def gguf(data: bytes, folder: Path) -> None:
    """A GGUF file, as far as it is read before it is converted."""
    path = folder / "model.gguf"
    path.write_bytes(data)
    with suppress(BackboneError):
        check_gguf(path)


def config(data: bytes, folder: Path) -> None:
    """An adapter's config."""
    (folder / CONFIG).write_bytes(data)
    with suppress(PedroError):
        read_config(folder)


def _text(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def _gguf() -> bytes:
    """A file of one tensor that `check_gguf` takes."""
    texts = {b"general.architecture": b"llama", b"tokenizer.ggml.model": b"gpt2", b"tokenizer.ggml.pre": b"smollm"}
    entries = [_text(key) + struct.pack("<I", STRING) + _text(value) for key, value in texts.items()]
    entries.append(_text(b"split.count") + struct.pack("<IH", UINT16, 1))
    entries.append(_text(b"tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 1) + _text(b"a"))
    tensor = _text(b"token_embd.weight") + struct.pack("<IQIQ", 1, 32, 0, 0)
    head = MAGIC + struct.pack("<IQQ", 3, 1, len(entries)) + b"".join(entries) + tensor
    return head + bytes(-len(head) % 32 + 4 * 32)


TARGETS: dict[str, Callable[[bytes, Path], None]] = {"weights": weights, "gguf": gguf, "config": config}
SEEDS = {
    "weights": b' {"__metadata__": {"format": "pt"}, "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, '
    b'"b": {"dtype": "BF16", "shape": [20], "data_offsets": [24, 64]}}',
    "gguf": _gguf(),
    "config": LORA,
}
"""One input of each that is taken."""
