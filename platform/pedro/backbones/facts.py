"""What the files of a backbone say of its size, without loading it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pedro.backbone_files import read_json
from pedro.errors import BackboneError


@dataclass(frozen=True)
class Facts:
    """Sizes of a backbone. What a config does not say is None."""

    architecture: str
    parameters: int
    bytes: int
    """Of the weights on disk."""
    dtype: str
    """Of most weights, as safetensors calls it."""
    layers: int | None
    width: int | None
    heads: int | None
    kv_heads: int | None
    ffn: int | None
    vocabulary: int | None
    context: int | None
    tied_embeddings: bool


def read_facts(directory: Path) -> Facts:
    """The facts of the backbone in `directory`. Raises BackboneError for files that cannot be read."""
    config = read_json(directory / "config.json", directory.name)
    tensors = _tensors(directory)
    counts: dict[str, int] = {}
    for dtype, count in tensors.values():
        counts[dtype] = counts.get(dtype, 0) + count

    def first(*names: str) -> Any:
        return next((config[name] for name in names if config.get(name) is not None), None)

    heads = first("num_attention_heads", "n_head")
    return Facts(
        architecture=str(config.get("model_type")),
        parameters=sum(counts.values()),
        bytes=sum(path.stat().st_size for path in directory.glob("*.safetensors")),
        dtype=max(counts, key=lambda dtype: counts[dtype], default="?"),
        layers=first("num_hidden_layers", "n_layer"),
        width=first("hidden_size", "n_embd"),
        heads=heads,
        kv_heads=first("num_key_value_heads") or heads,
        ffn=first("intermediate_size", "n_inner"),
        vocabulary=first("vocab_size"),
        context=first("max_position_embeddings", "n_positions"),
        tied_embeddings="lm_head.weight" not in tensors,
    )


def _tensors(directory: Path) -> dict[str, tuple[str, int]]:
    """The dtype of each tensor and how many numbers it has."""
    from safetensors import SafetensorError, safe_open

    found: dict[str, tuple[str, int]] = {}
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, framework="np") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    part = file.get_slice(name)
                    found[name] = str(part.get_dtype()), math.prod(part.get_shape())
        except SafetensorError as error:
            raise BackboneError(
                f"backbone: {path} cannot be read ({error}); copy it again", param="backbone"
            ) from error
    return found
