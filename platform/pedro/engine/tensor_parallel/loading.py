"""Loads a rank's part of a backbone: only the rank's part of every tensor is read from the files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open

from pedro.backbone import load_config
from pedro.backbone_tensors import StoredTensor, stored_tensors
from pedro.engine.tensor_parallel.collectives import Group, SplitEmbedding, SplitHead
from pedro.engine.tensor_parallel.shards import Cut, Shard, check_split, cuts_of, local_config, summed_biases
from pedro.errors import BackboneError
from pedro.methods.architectures import Architecture, describe

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.backbone import Backbone

HEAD = "lm_head.weight"
GENERATION = "generation_config.json"


def whole_architecture(backbone: Backbone) -> Architecture:
    """The whole backbone's shapes, for adapters; no weights."""
    from transformers import AutoModelForCausalLM

    config: Any = load_config(backbone)
    with torch.device("meta"):
        return describe(AutoModelForCausalLM.from_config(config))


def load_shard(backbone: Backbone, dtype: str, device: str, shard: Shard) -> PreTrainedModel:
    """The rank's model, on `device`: its heads and channels, and its part of the vocabulary. Call `join` before
    running.

    Raises BackboneError if the backbone cannot be split so, or its files cannot be read in parts.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    config: Any = load_config(backbone)
    check_split(config, shard.size, backbone.id)
    stored = stored_tensors(backbone)
    if not stored:
        raise BackboneError(
            f"tensor_parallel_size: the files of {backbone.id!r} are damaged or contain other tensors than the model, "
            "so that no rank can read its part of them; save the model again with save_pretrained",
            param="tensor_parallel_size",
        )
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(local_config(config, shard), dtype=getattr(torch, dtype))
    embedding = SplitEmbedding(config.vocab_size, config.hidden_size, shard, getattr(torch, dtype))
    tied = HEAD not in stored
    weight = embedding.weight if tied else torch.nn.Parameter(torch.zeros_like(embedding.weight), requires_grad=False)
    model.set_input_embeddings(embedding)
    model.set_output_embeddings(SplitHead(config.vocab_size, weight))
    architecture = whole_architecture(backbone)
    cuts, biases = cuts_of(architecture, config, shard), summed_biases(architecture, config)
    vocabulary = Cut(rows=(embedding.own,))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in biases and shard.rank:
                parameter.zero_()
            elif parameter is embedding.weight or parameter is weight:
                _fill(
                    parameter[: embedding.own.stop - embedding.own.start], stored[name], vocabulary, name, backbone.id
                )
            else:
                _fill(parameter, stored[name], cuts.get(name, Cut()), name, backbone.id)
    if (backbone.directory / GENERATION).is_file():
        model.generation_config = GenerationConfig.from_pretrained(backbone.directory, local_files_only=True)
    made: PreTrainedModel = model.requires_grad_(False).eval().to(device)
    return made


def join(model: PreTrainedModel, group: Group) -> None:
    """Connect the model to those of the other ranks."""
    for module in model.modules():
        if isinstance(module, SplitEmbedding | SplitHead):
            module.group = group


def _fill(parameter: torch.Tensor, stored: StoredTensor, cut: Cut, name: str, backbone: str) -> None:
    """Read the parts of the stored tensor into `parameter`, in the parameter's dtype."""
    if not parameter.numel():
        return
    try:
        with safe_open(stored.file, framework="pt") as file:
            lies = file.get_slice(stored.key)
            start = 0
            for run in cut.rows:
                part = lies[run] if cut.columns is None else lies[run, cut.columns]
                parameter[start : start + len(part)] = part
                start += len(part)
    except Exception as error:  # safetensors raises its own types and OSError
        raise BackboneError(
            f"backbone: the model of {backbone!r} cannot be loaded ({error}); copy or save the directory again",
            param="backbone",
        ) from error
    assert start == len(parameter), f"{name} is {len(parameter)} rows long, and {start} were read"
    if not all(bound.isfinite() for bound in torch.aminmax(parameter)):
        raise BackboneError(
            f"backbone: {backbone!r} contains numbers in {name} that are not finite (NaN or infinite); copy or save "
            "the directory again",
            param="backbone",
        )
