"""Loads a saved adapter and scores it on a file: shared by `pedro eval` and the gate.

It is handed a directory, wherever that came from.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import Backbone, context_length, load_config, load_model, load_tokenizer, resolve_backbone
from pedro.errors import AdapterError, BackboneError, ConfigError, DataError, PedroError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

    from pedro.data import PromptFormat
    from pedro.model_protocols import Tokenizer


def open_saved(directory: Path, name: str | None = None) -> tuple[Backbone, dict[str, Any], PromptFormat]:
    """The backbone of a saved adapter, its manifest and its prompt format, all checked before anything is loaded.

    `name` is where the backbone is now, where it was renamed or moved since; its digest must be the same.
    Raises AdapterError for a damaged adapter or one of another backbone, BackboneError if the backbone is not to be
    had, DataError for a manifest without a prompt format.
    """
    from pedro.adapter_directory import read_manifest, verify_adapter
    from pedro.data.prompt_format import PromptFormat, check_format

    trained_on = read_manifest(directory)["backbone"]["id"]
    try:
        backbone = resolve_backbone(name or trained_on)
    except BackboneError as error:
        if name is not None:
            raise
        moved = f"{error.message} (the adapter's own; if it was moved, say where it is with --backbone)"
        raise BackboneError(moved, param="backbone") from error
    manifest = verify_adapter(directory, backbone.digest, backbone.tokenizer_digests)
    _read_config(directory, manifest, backbone)
    return backbone, manifest, check_format(PromptFormat.from_dict(manifest.get("prompt_format") or {}))


def load_saved(
    directory: Path,
    manifest: Mapping[str, Any],
    backbone: Backbone,
    dtype: str,
    device: str,
    bare: nn.Module | None = None,
) -> nn.Module:
    """A saved adapter on `bare`, a model of the backbone, or on a fresh one; for `full`, the saved model itself.

    Raises AdapterError if the config is not one of the manifest's method or the weights do not fit it.
    """
    from pedro.methods.registry import get_method

    config = _read_config(directory, manifest, backbone)
    model: nn.Module
    if config is None:
        model = load_model(Backbone(backbone.id, directory, "", ""), dtype, device)
    else:
        model = _attach(bare if bare is not None else load_model(backbone, dtype, device), directory, config)
    return get_method(manifest["method"]["name"]).wrap(model).eval()


def take_weights(model: nn.Module, directory: Path, backbone: Backbone) -> None:
    """Give a fresh adapter the weights of the saved one in `directory`.

    Raises AdapterError if that is damaged or of another backbone, ConfigError if it is of another kind or shape.
    """
    from peft import PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    from pedro.adapter_directory import CONFIG, WEIGHTS, verify_adapter

    verify_adapter(directory, backbone.digest, backbone.tokenizer_digests)
    if not isinstance(model, PeftModel) or not (directory / CONFIG).is_file():
        raise ConfigError("parent: a whole model is no adapter to start from; take another method", param="parent")
    saved = load_file(directory / WEIGHTS)
    fresh = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {name: tensor.shape for name, tensor in saved.items()} != {name: tensor.shape for name, tensor in fresh.items()}:
        raise ConfigError("parent: its weights do not fit this spec's method; leave `method` out", param="parent")
    set_peft_model_state_dict(model, saved)


def backbone_of(model: nn.Module) -> nn.Module | None:
    """The backbone of `model`, its adapter taken off, so `model` itself is spent. None where the backbone would not be
    as it was: training changed it, or the adapter's tuner leaves something of its own behind.
    """
    from peft import PeftModel
    from peft.tuners.tuners_utils import BaseTuner

    from pedro.methods.method import stop_ignoring_prompt

    if not isinstance(model, PeftModel) or any(changes_backbone(config) for config in model.peft_config.values()):
        return None
    bare: nn.Module = model.get_base_model()
    if isinstance(model.base_model, BaseTuner):
        try:
            bare = model.base_model.unload()
        except (AttributeError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            return None  # not every tuner of PEFT can be taken off
    stop_ignoring_prompt(bare)
    return None if any(_left_behind(module) for module in bare.modules()) else bare


def changes_backbone(config: PeftConfig) -> bool:
    """Whether the backbone's own parameters are trained beside the adapter's."""
    return getattr(config, "bias", "none") != "none"


def trains_backbone(model: nn.Module) -> bool:
    """Whether the backbone's own weights are trained in `model`, so that it is gone afterwards."""
    configs: Mapping[str, PeftConfig] = getattr(model, "peft_config", {})
    return not configs or any(changes_backbone(config) for config in configs.values())


def _left_behind(module: nn.Module) -> bool:
    """Whether a module of a backbone is an adapter's, or would call one."""
    from pedro.quantised_linear import QuantisedProjection

    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    own = "" if isinstance(module, QuantisedProjection) else type(module).__module__
    origins = [own, *(getattr(getattr(h, "func", h), "__module__", "") for h in hooks)]
    return any(name.startswith(("peft.", "pedro.")) for name in origins) or "forward" in vars(module)


def release(model: nn.Module) -> None:
    """Give the memory of a model's parameters back, whoever refers to them; it cannot be used afterwards."""
    for parameter in model.parameters():
        parameter.data = parameter.data.new_empty(0)


def _read_config(directory: Path, manifest: Mapping[str, Any], backbone: Backbone) -> PeftConfig | None:
    """The PEFT config of a saved adapter, None for a whole model. Raises AdapterError if its method makes another."""
    from pedro.adapter_directory import CONFIG, CONFIGS
    from pedro.methods.adapter_files import read_config
    from pedro.methods.registry import get_method

    if not any((directory / name).is_file() for name in CONFIGS):
        raise AdapterError(f"{directory.name}: neither an adapter nor a model; fetch it again")
    saved = read_config(directory) if (directory / CONFIG).is_file() else None
    name, options = manifest["method"]["name"], manifest["method"].get("options")
    made = get_method(name).config(load_config(backbone), options)
    if type(saved) is not type(made):
        wanted, given = ("no config" if each is None else type(each).__name__ for each in (made, saved))
        raise AdapterError(f"{CONFIG}: {name} makes {wanted}, but there is {given}; fetch the adapter again")
    return saved


def _attach(model: nn.Module, directory: Path, config: PeftConfig) -> nn.Module:
    """The adapter on `model`. Raises AdapterError where its tensors are not those that its config asks for."""
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    from pedro.adapter_directory import CONFIG, WEIGHTS
    from pedro.methods.patterns import check_patterns

    with safe_open(directory / WEIGHTS, "pt") as file:
        saved = set(file.keys())
    try:
        check_patterns(config, (name for name, _ in model.named_modules()))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Found missing adapter keys")  # told below
            tuned = PeftModel.from_pretrained(model, directory, config=config)
        asked = set(get_peft_model_state_dict(tuned, tuned.state_dict(), save_embedding_layers=False))
    except PedroError:
        raise
    except Exception as error:  # PEFT's methods raise whatever their formulas meet first
        reason = " ".join(str(error).split())[:300]
        raise AdapterError(f"{CONFIG}: the weights do not fit it ({reason}); fetch the adapter again") from error
    if asked != saved:
        what = (
            f"lack {min(asked - saved)}" if asked - saved else f"hold {min(saved - asked)}, which it does not explain"
        )
        raise AdapterError(f"{CONFIG}: the weights do not fit it: they {what}; fetch the adapter again")
    return tuned


def score_file(
    directory: Path,
    file: Path,
    cache: Path,
    max_rows: int | None = None,
    backbone_name: str | None = None,
    fields: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Accuracy and loss of a saved adapter and of its bare backbone on a data file, prompts as it was trained on.

    Of a file of preferences, the accuracy on pairs and DPO's loss, with the β that the adapter was trained with (else
    0.1); the backbone's are then 0.5 and log 2, as it is the reference.
    `fields` names the file's columns where they are not ours. A loss of NaN is None.
    Raises DataError for a file that cannot be used or is of another shape, AdapterError for another backbone.
    """
    from pedro.data import format_for_shape, load_rows, shape_of
    from pedro.evaluation.scoring import finite, majority, score

    backbone, manifest, form = open_saved(directory, backbone_name)
    tokenizer = load_tokenizer(backbone)
    shape = shape_of(file, fields)
    fresh = format_for_shape(shape, tokenizer)
    if fresh.id != form.id or (fresh.id != "raw" and fresh.template != form.template):  # raw may have a text around it
        raise DataError(
            f"{file}: holds {shape}, but the adapter was trained on prompts of the format {form.id!r}; "
            "bring the rows in the shape of its training data",
            param="data",
        )
    dataset = load_rows(file, tokenizer, form, context_length(backbone), cache / "rows", fields)
    rows = list(dataset.select(range(min(len(dataset), max_rows or len(dataset)))))
    if shape.is_preference:
        return _score_preferences(directory, manifest, backbone, tokenizer, rows)
    adapted = score(load_saved(directory, manifest, backbone, "float32", "cpu"), tokenizer, rows)
    bare = score(load_model(backbone), tokenizer, rows)
    guess = majority(row["completion"] for row in rows)
    return {
        "rows": adapted.rows,
        "accuracy": adapted.accuracy,
        "backbone_accuracy": bare.accuracy,
        "majority_accuracy": sum(row["completion"].strip() == guess for row in rows) / len(rows),
        "loss": finite(adapted.loss),
        "backbone_loss": finite(bare.loss),
    }


def _score_preferences(
    directory: Path, manifest: Mapping[str, Any], backbone: Backbone, tokenizer: Tokenizer, rows: list[Any]
) -> dict[str, Any]:
    from pedro.evaluation.preference import pair_likelihoods, score_pairs
    from pedro.evaluation.scoring import finite

    beta = ((manifest.get("spec") or {}).get("dpo") or {}).get("beta", 0.1)
    reference = pair_likelihoods(load_model(backbone), tokenizer, rows)
    policy = pair_likelihoods(load_saved(directory, manifest, backbone, "float32", "cpu"), tokenizer, rows)
    adapted, bare = (score_pairs(likelihoods, reference, beta) for likelihoods in (policy, reference))
    return {
        "rows": len(rows),
        "preference_accuracy": adapted.accuracy,
        "backbone_preference_accuracy": bare.accuracy,
        "loss": finite(adapted.loss),
        "backbone_loss": finite(bare.loss),
    }
