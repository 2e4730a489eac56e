"""Imports an adapter that PEFT alone wrote: its two files are copied, and a manifest is written beside the copy."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.adapter_check import check_adapter
from pedro.adapter_directory import CONFIG, MANIFEST, MAX_JSON_BYTES, WEIGHTS, write_manifest
from pedro.errors import AdapterError
from pedro.methods.adapter_files import read_config
from pedro.methods.registry import METHODS
from pedro.methods.servable import check_declared, check_servable

if TYPE_CHECKING:
    from pedro.backbone import Backbone

PYREFT_CONFIG = "config.json"


def is_stock(directory: Path) -> bool:
    """Whether a directory is an adapter of PEFT without a manifest."""
    return (directory / CONFIG).is_file() and not (directory / MANIFEST).exists()


def refuse_pyreft(directory: Path) -> None:
    """Raise AdapterError for what pyreft saved: it writes interventions as pickles."""
    file = directory / PYREFT_CONFIG
    try:
        saved = json.loads(file.read_text(encoding="utf-8")) if file.stat().st_size <= MAX_JSON_BYTES else None
    except (OSError, ValueError, RecursionError):  # whoever reads it for what it is says what is wrong with it
        return
    if isinstance(saved, dict) and "intervention_types" in saved:
        raise AdapterError(
            f"{PYREFT_CONFIG}: is one of pyreft, whose .bin files may contain code (pickle) and are refused; load them "
            "where you trust them and save them as an adapter of loreft: docs/methods.md#reft shows how"
        )


@contextmanager
def adopted(
    directory: Path, backbone: Backbone, prompt_format: dict[str, Any], tell: Callable[[str], None]
) -> Iterator[Path]:
    """A copy of a stock PEFT adapter that may be registered, there while the block runs.

    Only its config and its safetensors are read; both are opened as the engine would, over this backbone's shapes, the
    header first: nothing is copied that the config does not explain.
    `tell` is given what cannot be known. Raises AdapterError that names the file, field or tensor at fault; the folder
    itself is left as it is.
    """
    for name in (CONFIG, WEIGHTS):
        _refuse_what_is_no_file(directory / name)
    if (size := (directory / CONFIG).stat().st_size) > MAX_JSON_BYTES:
        raise AdapterError(f"{CONFIG}: has {size:,} bytes, more than {MAX_JSON_BYTES:,}; fetch the adapter again")
    method = _method_of(directory)
    check_declared(directory, backbone)
    with tempfile.TemporaryDirectory(prefix="pedro-import-") as folder:
        copy = Path(folder)
        for name in (CONFIG, WEIGHTS):
            shutil.copyfile(directory / name, copy / name)
        manifest = {
            "backbone": {
                "id": backbone.id,
                "digest": backbone.digest,
                "tokenizer_digest": backbone.tokenizer_digest,
            },
            "method": {"name": method, "options": {}},
            "prompt_format": prompt_format,
        }
        write_manifest(copy, manifest)
        check_adapter(copy, backbone.digest)
        check_servable(copy, backbone)
        named = read_config(copy).base_model_name_or_path or "no base model"
        tell(
            f"the adapter names {named}, and {backbone.id} is taken for it: shapes fit, but whether the weights and "
            "the prompt's format are those it was trained with cannot be known"
        )
        yield copy


def _method_of(directory: Path) -> str:
    """The registry's method that reads this adapter's type."""
    kind = str(getattr(peft_type := read_config(directory).peft_type, "value", peft_type))
    for method in METHODS.values():
        if any(reader.peft_type == kind for reader in method.readers):
            return method.name
    raise AdapterError(f"{CONFIG}: peft_type: the engine serves no {kind} adapters", param="peft_type")


def _refuse_what_is_no_file(path: Path) -> None:
    if path.is_symlink():
        raise AdapterError(f"{path.name}: is a link, which may lead out of the adapter; copy the file instead")
    if path.name == WEIGHTS and path.with_suffix(".bin").exists() and not path.exists():
        raise AdapterError(
            "adapter_model.bin: may contain code (pickle) and is refused; load it where you trust it and save it again "
            "with model.save_pretrained(directory, safe_serialization=True)"
        )
    if not path.is_file():
        raise AdapterError(f"{path.name}: not found in {path.parent}; fetch the adapter again")
