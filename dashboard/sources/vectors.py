"""The vectors l (eq. 6) that an adapter generates from a prompt, layer by layer, run on its backbone.

Loads PyTorch and the backbone into this process, on the CPU.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

LONGEST = 2000  # characters of a prompt
BINS = 40
NAMES = {"q": "l_q", "k": "l_k", "v": "l_v", "gate": "l_gate", "up": "l_up (l_u)"}


@dataclass(frozen=True)
class PromptVectors:
    """One prompt's vectors {layer: {target: values}}, and what each layer's activation was given."""

    tokens: int
    vectors: Mapping[int, Mapping[str, np.ndarray]]
    inputs: Mapping[int, np.ndarray]


class VectorReader:
    """An adapter on its backbone, ready to read prompts. One prompt at a time; safe to share between sessions.

    Raises AdapterError or BackboneError for what cannot be loaded, or would take more memory than is free.
    """

    def __init__(self, directory: Path) -> None:
        from pedro.adapter_directory import read_manifest, verify_adapter
        from pedro.backbone import context_length, load_tokenizer, quiet, resolve_backbone
        from pedro.data.prompt_format import PromptFormat
        from pedro.evaluation.saved import load_saved

        quiet()
        backbone = resolve_backbone(read_manifest(directory)["backbone"]["id"])
        _check_room(backbone.id, backbone.directory)
        manifest = verify_adapter(directory, backbone.digest, backbone.tokenizer_digests)
        self._tokenizer = load_tokenizer(backbone)
        self._form = PromptFormat.from_dict(manifest.get("prompt_format") or {})
        self._model = load_saved(directory, manifest, backbone, "float32", "cpu")
        self._longest = context_length(backbone)
        self._lock = threading.Lock()

    def read(self, prompt: str, *, chat: bool = True) -> PromptVectors:
        """The vectors of one prompt: as a chat message in the adapter's own format, or as it stands.

        Of a prompt beyond the context only the last tokens are read.
        """
        import torch

        from pedro.data.prompt_format import encode_prompt
        from pedro.methods.pedro.activation_inputs import recorded
        from pedro.methods.prompt import KEPT

        messages = [{"role": "user", "content": prompt}]
        text = self._form.prompt(messages, self._tokenizer) if chat else prompt
        ids = encode_prompt(self._tokenizer, text)[-self._longest :]
        with self._lock, torch.inference_mode(), recorded(self._model) as seen:
            output = self._model(input_ids=torch.tensor([ids]), use_cache=True)
        kept = getattr(output.past_key_values, KEPT)
        vectors = {
            layer: {target: made[0].float().numpy() for target, made in of_layer.items()}
            for layer, of_layer in kept.items()
        }
        return PromptVectors(len(ids), vectors, {layer: given[0][0].numpy() for layer, given in seen.items()})


def spread_rows(readings: Sequence[PromptVectors], names: Sequence[str]) -> list[dict[str, Any]]:
    """Where the values of each vector lie: extremes, 5 %, quartiles, median, 95 %; one row a prompt, target, layer."""
    rows = []
    for name, reading in zip(names, readings, strict=True):
        for layer, of_layer in sorted(reading.vectors.items()):
            for target, values in of_layer.items():
                low, p5, p25, p50, p75, p95, high = np.quantile(values, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]).tolist()
                rows.append(
                    {
                        "prompt": name, "layer": layer, "target": NAMES[target], "low": low, "p5": p5, "p25": p25,
                        "p50": p50, "p75": p75, "p95": p95, "high": high, "width": len(values),
                    }
                )  # fmt: skip
    return rows


def histogram_rows(
    readings: Sequence[PromptVectors], names: Sequence[str], layer: int, target: str, bins: int = BINS
) -> list[dict[str, Any]]:
    """The values of one vector, counted in equal bins that all prompts share: shares of the vector's width."""
    held = [reading.vectors[layer][target] for reading in readings]
    edges = np.histogram_bin_edges(np.concatenate(held), bins=bins)
    return [
        {"prompt": name, "left": float(left), "right": float(right), "share": float(count) / len(values)}
        for name, values in zip(names, held, strict=True)
        for left, right, count in zip(edges[:-1], edges[1:], np.histogram(values, edges)[0], strict=True)
    ]


def dependence_rows(readings: Sequence[PromptVectors]) -> list[dict[str, Any]]:
    """Of each layer and target: how far the vectors lie from 1, and how far from each other's mean over the prompts.

    Both are root mean squares; the second is zero where the prompt changes nothing.
    """
    rows = []
    for layer in sorted(readings[0].vectors):
        for target in readings[0].vectors[layer]:
            stacked = np.stack([reading.vectors[layer][target] for reading in readings])  # [prompts, width]
            rows.append(
                {
                    "layer": layer,
                    "target": NAMES[target],
                    "from_one": float(np.sqrt(np.mean((stacked - 1) ** 2))),
                    "between_prompts": float(np.sqrt(np.mean((stacked - stacked.mean(axis=0)) ** 2))),
                }
            )
    return rows


def _check_room(name: str, directory: Path) -> None:
    """The backbone becomes float32 here: from 16 bits, twice its files."""
    from pedro.errors import BackboneError

    needed, free = 2 * sum(file.stat().st_size for file in directory.glob("*.safetensors")), free_memory()
    if needed > free:
        raise BackboneError(
            f"backbone: {name} would take up to {needed / 1e9:,.1f} GB here and {free / 1e9:,.1f} GB are free; run the "
            "dashboard where there is more",
            param="backbone",
        )


def free_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this process may still take: of the machine, and of its container where that has a limit."""
    import psutil

    free: int = psutil.virtual_memory().available
    try:
        limit, used = ((cgroup / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        return min(free, int(limit) - int(used))
    except (OSError, ValueError):  # no cgroup here, or "max": no limit
        return free
