"""Makes adapter directories with random weights by the thousand: one in full, the rest as copies with other numbers.

Every tenant's adapter differs and none is the identity.
"""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.model_sizes import ModelSize, bench_folder, make_model

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

WEIGHTS = "adapter_model.safetensors"
INVOCATION = (3, 4, 5, 6)  # tokens from which an activated LoRA acts
LINEARS = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
OPTIONS: dict[str, dict[str, Any]] = {kind: {"r": 12} for kind in ("pedro", "pedro-1", "pedro-2")} | {
    "ia3": {},
    "lora": {"r": 16, "alpha": 32},
    "alora": {
        "peft_type": "LORA",
        "r": 16,
        "lora_alpha": 32,
        "target_modules": LINEARS,
        "alora_invocation_tokens": list(INVOCATION),
    },
    "pedro-answer-1": {"r": 12, "apply_to": "answer", "tail": 1},
    "pedro-answer-9": {"r": 12, "apply_to": "answer", "tail": 9},
}
METHOD_OF = {"alora": "peft", "pedro-answer-1": "pedro", "pedro-answer-9": "pedro"}
"""Kinds that are not called as their method."""


def adapter_directories(size: ModelSize, kind: str, count: int) -> list[Path]:
    """`count` adapters of `kind` (one of OPTIONS) for a model of this size. Those of an earlier run are reused."""
    folder = bench_folder() / size.name / kind
    first = folder / "00000"
    if not (first / "pedro_adapter.json").is_file():
        _make_first(size, kind, first)
    template = _Template(first)
    directories = [folder / f"{number:05}" for number in range(count)]
    for number, directory in enumerate(directories):
        if number and not (directory / "pedro_adapter.json").is_file():
            template.copy(directory, seed=number)
    return directories


def _make_first(size: ModelSize, kind: str, directory: Path) -> None:
    bare = make_model(size, device="meta", dtype="float32")
    make_adapter(bare, kind, directory, {"backbone": {"id": size.name, "digest": size.digest}})


def make_adapter(bare: PreTrainedModel, kind: str, directory: Path, manifest: dict[str, Any], seed: int = 0) -> None:
    """Save an adapter of `kind` the ordinary way. The model, on the meta device, is changed; `manifest` lacks only the
    method."""
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from pedro.methods import get_method

    method = METHOD_OF.get(kind, kind)
    tuned = get_method(method).apply(bare, OPTIONS[kind])
    assert isinstance(tuned, PeftModel), f"{kind} is no adapter"
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: _fill(name, tuple(tensor.shape), generator) for name, tensor in get_peft_model_state_dict(tuned).items()
    }
    making = _scratch(directory)
    config = tuned.peft_config["default"]
    config.inference_mode = True
    config.save_pretrained(str(making))
    save_file(state, making / WEIGHTS, metadata={"format": "pt"})
    _finish(making, directory, {**manifest, "method": {"name": method, "options": OPTIONS[kind]}})


def _fill(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Weights that change the answers without making the numbers explode."""
    import torch

    from pedro.methods.pedro.rational import fit_gelu

    if name.endswith((".pedro_a", ".pedro_b")):
        a, b = fit_gelu(6, 5)
        return (a if name.endswith("a") else b).reshape(shape).clone()
    noise = torch.randn(shape, generator=generator) * 0.02
    return 1 + 5 * noise if name.endswith(("pedro_bias", "ia3_l")) or "ia3_l" in name else noise


class _Template:
    """An adapter's files in memory; a copy scales each weight by its own random factor from 0.9 to 1.1."""

    def __init__(self, directory: Path) -> None:
        import torch

        raw = (directory / WEIGHTS).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        self._head = raw[: 8 + length]
        self._weights = torch.frombuffer(bytearray(raw[8 + length :]), dtype=torch.float32)
        self._config = (directory / "adapter_config.json").read_bytes()
        self._manifest = json.loads((directory / "pedro_adapter.json").read_text())

    def copy(self, directory: Path, seed: int) -> None:
        """Write the copy that `seed` stands for."""
        import torch

        factors = torch.empty_like(self._weights).uniform_(0.9, 1.1, generator=torch.Generator().manual_seed(seed))
        making = _scratch(directory)
        (making / "adapter_config.json").write_bytes(self._config)
        with (making / WEIGHTS).open("wb") as out:
            out.write(self._head)
            out.write((self._weights * factors).numpy().tobytes())
        _finish(making, directory, self._manifest)


def _scratch(directory: Path) -> Path:
    making = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    making.mkdir(parents=True, exist_ok=True)
    return making


def _finish(making: Path, directory: Path, manifest: dict[str, Any]) -> None:
    """Add the manifest with the digests of what lies there and give the directory its name."""
    from pedro.adapter_directory import write_manifest

    write_manifest(making, manifest)
    making.rename(directory)
