"""Loads a backbone sharded by ZeRO-3: each worker reads only its piece of every tensor from the files.

A piece is a contiguous range of a tensor's numbers in memory, as ZeRO-3 partitions tensors. This requires files that
contain the model's tensors with the same names and shapes; `can_be_cut` checks that.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from pedro.backbone import Backbone, load_config
from pedro.backbone_tensors import StoredTensor, stored_tensors
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

READ_AT_ONCE = 2**22  # numbers
GENERATION = "generation_config.json"


class Piece(NamedTuple):
    """A worker's part of one tensor: `numbers` [N] are those from `start` on, with padding past the tensor's end."""

    name: str
    size: int
    start: int
    numbers: torch.Tensor


def can_be_cut(backbone: Backbone) -> bool:
    """Whether workers can read pieces of this backbone; else each must load it whole. Only reads file headers."""
    return bool(stored_tensors(backbone))


def load_in_pieces(
    backbone: Backbone, dtype: str, device: torch.device, partitioning: AbstractContextManager[None]
) -> PreTrainedModel:
    """The backbone as `load_model` returns it, but without weights, which `fill` reads: no worker ever has all of them.

    Modules created within `partitioning` are sharded at once; every worker must take part.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    config: Any = load_config(backbone)
    with no_init_weights(), partitioning:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model.tie_weights()
    if (backbone.directory / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(backbone.directory, local_files_only=True)
    model.requires_grad_(False).eval().to(device)
    return model


def fill(backbone: Backbone, pieces: Iterable[Piece]) -> None:
    """Read the pieces from the files. Raises BackboneError for unreadable files and non-finite numbers."""
    stored = stored_tensors(backbone)
    if not stored:
        raise BackboneError(
            f"backbone: the files of {backbone.id!r} changed while they were read; submit the job again",
            param="backbone",
        )
    for piece in pieces:
        wanted = piece.numbers[: max(0, piece.size - piece.start)]
        if not len(wanted):
            continue
        _read(stored[piece.name], piece.start, wanted, backbone.id)
        if not all(bound.isfinite() for bound in torch.aminmax(wanted)):
            raise BackboneError(
                f"backbone: {backbone.id!r} contains numbers in {piece.name} that are not finite (NaN or infinite); "
                "copy or save the directory again",
                param="backbone",
            )


def _read(tensor: StoredTensor, start: int, out: torch.Tensor, name: str) -> None:
    """Fill `out` [N] with the tensor's numbers from `start` on."""
    width = tensor.dtype.itemsize
    try:
        with tensor.file.open("rb") as stream:
            stream.seek(tensor.first_byte + start * width)
            for part in out.split(READ_AT_ONCE):
                data = bytearray(part.numel() * width)
                if stream.readinto(data) < len(data):
                    raise OSError(f"{tensor.file.name} ends too early")
                part.copy_(torch.frombuffer(data, dtype=tensor.dtype))
    except OSError as error:
        raise BackboneError(
            f"backbone: the model of {name!r} cannot be loaded ({error}); copy or save the directory again",
            param="backbone",
        ) from error
