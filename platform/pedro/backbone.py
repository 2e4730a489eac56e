"""Finds the frozen backbone and says which one it is. Knows nothing of adapters, training or serving.

A backbone is named by an embedded name (`stories260K`), a transformers directory, or a hub id. Whatever the
name, it resolves to a local directory and two digests, so that an adapter can refuse any other backbone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import BackboneError, ConfigError

if TYPE_CHECKING:
    import torch

EMBEDDED = Path(__file__).parent / "assets" / "backbones"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Backbone:
    """A backbone on local disk. `digest` covers the weights and the config, `tokenizer_digest` what makes prompts."""

    id: str
    directory: Path
    digest: str
    tokenizer_digest: str


def embedded_backbones() -> list[str]:
    """Names of the backbones that the package carries."""
    return sorted(path.name for path in EMBEDDED.iterdir() if (path / "config.json").is_file())


def resolve_backbone(name: str) -> Backbone:
    """The backbone called `name`: an embedded name, a directory, or a hub id, in this order.

    Raises BackboneError if there is none such, it cannot be downloaded, or the directory holds no safetensors.
    """
    directory = _directory(str(name))
    if not (directory / "config.json").is_file() or not list(directory.glob("*.safetensors")):
        raise BackboneError(
            f"backbone: {name!r} holds no config.json with *.safetensors; give a transformers directory "
            f"saved with safetensors, a hub id, or one of {', '.join(embedded_backbones())}",
            param="backbone",
        )
    return _describe(str(name), directory.resolve(), _stamp(directory))


def load_tokenizer(backbone: Backbone) -> Any:
    """The backbone's tokenizer, padded with EOS where it has no pad token of its own. Raises BackboneError."""
    from transformers import AutoTokenizer

    with _reading(backbone.id, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(backbone.directory, local_files_only=True)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(backbone: Backbone, dtype: str = "float32", device: str = "cpu") -> torch.nn.Module:
    """The backbone as a transformers causal LM in `dtype` (one of DTYPES), in eval mode, frozen.

    Raises ConfigError for a dtype or device that there is not, BackboneError for files that cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}; choose one of them", param="dtype")
    _check_device(device)
    with _reading(backbone.id, "model"):
        model = AutoModelForCausalLM.from_pretrained(
            backbone.directory, dtype=getattr(torch, dtype), local_files_only=True, use_safetensors=True
        )
    return model.requires_grad_(False).eval().to(device)


def quiet() -> None:
    """No progress bars and deprecation notes of transformers, for processes whose output people read."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def context_length(backbone: Backbone) -> int:
    """The most tokens (prompt and answer together) that the backbone was made for."""
    with _reading(backbone.id, "config.json"):
        config = json.loads((backbone.directory / "config.json").read_text())
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)


def _directory(name: str) -> Path:
    if (EMBEDDED / name / "config.json").is_file():
        return EMBEDDED / name
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BackboneError(
            f"backbone: {name!r} is no directory and no embedded backbone; give a transformers directory, "
            f"a hub id (owner/name), or one of {', '.join(embedded_backbones())}",
            param="backbone",
        )
    from huggingface_hub import snapshot_download

    patterns = [*WEIGHTS, *TOKENIZER, "*.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises dozens of types; each means "not to be had"
        raise BackboneError(
            f"backbone: {name!r} could not be had from the hub ({type(error).__name__}); check the id, your network "
            f"and HF_TOKEN, or use one of {', '.join(embedded_backbones())}",
            param="backbone",
        ) from error


@contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a BackboneError that says what of the backbone cannot be read."""
    try:
        yield
    except Exception as error:  # transformers, tokenizers and safetensors raise any type for a damaged file
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise BackboneError(
            f"backbone: the {what} of {name!r} cannot be loaded ({reason}); copy or save the directory again",
            param="backbone",
        ) from error


def _check_device(device: str) -> None:
    """Raise ConfigError for a device that torch cannot use here."""
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"device: {device!r} cannot be used: {reason}; choose cpu, or cuda where torch has a GPU", param="device"
        ) from error


def _stamp(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files: a digest is computed again when one changes."""
    files = {f for pattern in (*WEIGHTS, *TOKENIZER, "tokenizer_config.json") for f in directory.glob(pattern)}
    return tuple(sorted((f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files))


@cache
def _describe(name: str, directory: Path, stamp: tuple[tuple[str, int, int], ...]) -> Backbone:
    template = ""
    if (directory / "tokenizer_config.json").is_file():
        with _reading(name, "tokenizer_config.json"):
            template = str(json.loads((directory / "tokenizer_config.json").read_text()).get("chat_template") or "")
    return Backbone(
        id=name,
        directory=directory,
        digest=_hash_files(directory, WEIGHTS),
        tokenizer_digest=_hash_files(directory, TOKENIZER, template),
    )


def _hash_files(directory: Path, patterns: tuple[str, ...], extra: str = "") -> str:
    """sha256 over the sorted (name, sha256) of the files, and `extra`."""
    total = hashlib.sha256(extra.encode())
    for file in sorted({f for pattern in patterns for f in directory.glob(pattern)}):
        with file.open("rb") as stream:
            total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"
