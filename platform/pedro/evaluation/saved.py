"""Loads a saved adapter and scores it on a file: what `pedro eval` and the gate's look at the champion share.

Knows nothing of registries: it is handed a directory.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import Backbone, context_length, load_model, load_tokenizer, resolve_backbone
from pedro.errors import AdapterError, DataError

if TYPE_CHECKING:
    from torch import nn


def load_saved(directory: Path, manifest: Mapping[str, Any], backbone: Backbone, dtype: str, device: str) -> nn.Module:
    """A saved adapter on a fresh backbone; for `full`, the saved model itself. Raises AdapterError for neither."""
    from peft import PeftModel

    from pedro.methods.registry import get_method

    method = get_method(manifest["method"]["name"])
    model: nn.Module
    if (directory / "adapter_config.json").is_file():
        model = PeftModel.from_pretrained(load_model(backbone, dtype, device), directory)
    elif (directory / "config.json").is_file():
        model = load_model(Backbone(backbone.id, directory, "", ""), dtype, device)
    else:
        raise AdapterError(f"{directory.name}: neither an adapter nor a model")
    return method.wrap(model).eval()


def score_file(directory: Path, file: Path, cache: Path, max_rows: int | None = None) -> dict[str, Any]:
    """Accuracy and loss of a saved adapter and of its bare backbone on a JSONL file, prompts as it was trained on.

    Raises DataError for a file that cannot be used or is of another shape, AdapterError for another backbone.
    """
    from pedro.data import PromptFormat, format_for_shape, load_rows, shape_of
    from pedro.evaluation.scoring import majority, score
    from pedro.methods.adapter_files import read_manifest, verify_adapter

    backbone = resolve_backbone(read_manifest(directory)["backbone"]["id"])
    manifest = verify_adapter(directory, backbone.digest)
    tokenizer = load_tokenizer(backbone)
    form = PromptFormat.from_dict(manifest["prompt_format"])
    shape = shape_of(file)
    if format_for_shape(shape, tokenizer) != form:
        raise DataError(
            f"{file}: holds {shape}, but the adapter was trained on prompts of the format {form.id!r}; "
            "bring the rows in the shape of its training data",
            param="data",
        )
    dataset = load_rows(file, tokenizer, form, context_length(backbone), cache / "rows")
    rows = list(dataset.select(range(min(len(dataset), max_rows or len(dataset)))))
    adapted = score(load_saved(directory, manifest, backbone, "float32", "cpu"), tokenizer, rows)
    bare = score(load_model(backbone), tokenizer, rows)
    guess = majority(row["completion"] for row in rows)
    return {
        "rows": adapted.rows,
        "accuracy": adapted.accuracy,
        "backbone_accuracy": bare.accuracy,
        "majority_accuracy": sum(row["completion"].strip() == guess for row in rows) / len(rows),
        "loss": adapted.loss,
        "backbone_loss": bare.loss,
    }
