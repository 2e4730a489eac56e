"""Finds the frozen backbone and identifies it. Independent of adapters, training and serving.

A backbone is named by an embedded name (`stories260K`), the name of one that PEDRO_HOME keeps (`pedro backbones`), a
transformers directory, or a hub id; where a name could be several of these, the first of them. Whatever the name, it
resolves to a local directory and two digests, so that an adapter can refuse any other backbone.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from pedro.backbone_files import VOCABULARIES, check_files, read_json
from pedro.config import backbones_folder, home_directory
from pedro.errors import BackboneError, ConfigError
from pedro.refs import NAME

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from pedro.model_protocols import ModelConfig, Tokenizer

EMBEDDED = Path(__file__).parent / "assets" / "backbones"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "config.json")
TOKENIZER_V1 = ("tokenizer.json", "tokenizer.model", "chat_template.jinja")
TOKENIZER = (*TOKENIZER_V1, "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json")
HUB_FILES = (*WEIGHTS, *TOKENIZER, "*.json")
"""What of a repository of the hub, or of a directory, is read."""
TOKENIZER_FIELDS = (
    *("tokenizer_class", "bos_token", "eos_token", "pad_token", "unk_token", "add_bos_token"),
    *("additional_special_tokens", "extra_special_tokens", "added_tokens_decoder", "legacy", "split_special_tokens"),
    *("add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "chat_template"),
)
"""What of tokenizer_config.json decides which ids a text gets, or how messages become a prompt."""
BUFFERS = re.compile(r"(rotary_emb\.inv_freq|masked_bias|attn\.bias|attention\.bias|position_ids)$")
"""What older releases of transformers saved beside the weights, and compute today."""
PLAIN_TOKENIZERS = ("TokenizersBackend", "PreTrainedTokenizerFast", "GPT2Tokenizer", "Qwen2Tokenizer")
"""Classes of transformers that are what tokenizer.json and tokenizer_config.json say, and nothing more."""
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Backbone:
    """A backbone on local disk. `digest` covers the weights and the config, `tokenizer_digest` all that makes ids."""

    id: str
    directory: Path
    digest: str
    tokenizer_digest: str
    tokenizer_digest_v1: str = ""
    """As adapters of release 0.1 name it: without the tokens of tokenizer_config.json and without vocabulary files."""

    @property
    def tokenizer_digests(self) -> tuple[str, ...]:
        """Both of the tokenizer, this release's first."""
        return self.tokenizer_digest, self.tokenizer_digest_v1


def embedded_backbones() -> list[str]:
    """Names of the backbones that the package carries."""
    return sorted(path.name for path in EMBEDDED.iterdir() if (path / "config.json").is_file())


def kept_backbones() -> list[str]:
    """Names of the backbones that the home keeps."""
    folder = backbones_folder(home_directory())
    return sorted(path.parent.name for path in folder.glob("*/config.json") if NAME.fullmatch(path.parent.name))


def named_directory(name: str) -> Path | None:
    """Where an embedded or a kept backbone lies; None for a path, a hub id, and a name that there is not."""
    if name in embedded_backbones():
        return EMBEDDED / name
    kept = backbones_folder(home_directory()) / name
    return kept if NAME.fullmatch(name) and (kept / "config.json").is_file() else None


def resolve_backbone(name: str) -> Backbone:
    """The backbone called `name`: an embedded name, one that the home keeps, a directory, or a hub id, in this order.

    Raises BackboneError if there is none, it cannot be downloaded, or its files show that it cannot be used.
    """
    directory = _directory(str(name))
    check_files(directory, str(name))
    return _describe(str(name), directory.resolve(), _stamp(directory))


def locate_backbone(name: str, *bases: Path) -> str:
    """`name` as it means the same in every process: a path is taken from the first of `bases` that has it.

    Embedded and kept names and hub ids stay as they are.
    """
    if named_directory(name) is not None:
        return name
    places = [base.absolute() / Path(name).expanduser() for base in bases]
    found = next((place for place in places if place.is_dir()), None)
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    return str(found or places[0]) if found or is_path else name


def load_config(backbone: Backbone) -> ModelConfig:
    """The backbone's transformers config. Raises BackboneError for one that transformers does not take."""
    from transformers import AutoConfig

    with _reading(backbone.id, "config.json"):
        config = AutoConfig.from_pretrained(backbone.directory, local_files_only=True, trust_remote_code=False)
    return cast("ModelConfig", config)


def load_tokenizer(backbone: Backbone) -> Tokenizer:
    """The backbone's tokenizer, padded with EOS where it has no pad token of its own.

    Raises BackboneError if it cannot be read, or makes ids that the backbone has no embedding for.
    """
    from transformers import AutoTokenizer

    with _reading(backbone.id, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(backbone.directory, local_files_only=True, trust_remote_code=False)
        largest = max(tokenizer.get_vocab().values(), default=-1)
    if not any((backbone.directory / file).is_file() for file in VOCABULARIES) or largest < 0:
        raise BackboneError(
            f"backbone: {backbone.id!r} has no tokenizer, or an empty one; copy the files that came with the weights "
            f"({', '.join(VOCABULARIES[:2])}, …)",
            param="backbone",
        )
    rows = read_json(backbone.directory / "config.json", backbone.id).get("vocab_size")
    if isinstance(rows, int) and largest >= rows:
        raise BackboneError(
            f"backbone: the tokenizer of {backbone.id!r} makes ids up to {largest}, but the embedding has {rows} rows; "
            "take the tokenizer that the weights were trained with, or resize the embedding and save the model again",
            param="backbone",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise BackboneError(
            f"backbone: the tokenizer of {backbone.id!r} has neither an eos_token nor a pad_token; set eos_token in "
            "tokenizer_config.json",
            param="backbone",
        )
    return cast("Tokenizer", tokenizer)


def check_tokenizer_files(backbone: Backbone) -> None:
    """Raise what `load_tokenizer` would, for a caller that needs none; most are shown to be fine by their files alone.

    Importing transformers takes seconds, which whoever starts a server waits for.
    """
    if not _is_plain_tokenizer(backbone):
        load_tokenizer(backbone)


def _is_plain_tokenizer(backbone: Backbone) -> bool:
    """Whether tokenizer.json gives all tokens ids that the embedding has rows for, and one of them ends or pads."""
    from tokenizers import Tokenizer

    told = read_json(backbone.directory / "tokenizer_config.json", backbone.id)
    rows = read_json(backbone.directory / "config.json", backbone.id).get("vocab_size")
    try:
        tokens = Tokenizer.from_file(str(backbone.directory / "tokenizer.json")).get_vocab(with_added_tokens=True)
    except Exception:  # noqa: BLE001 - the library's only type: transformers finds out what is wrong, or reads other files
        return False
    added = told.get("added_tokens_decoder") or {}
    last = told.get("pad_token") or told.get("eos_token")
    last = last.get("content") if isinstance(last, dict) else last
    return (
        told.get("tokenizer_class") in PLAIN_TOKENIZERS
        and isinstance(rows, int)
        and max(tokens.values(), default=rows) < rows
        and isinstance(added, dict)
        and added.keys() <= {str(number) for number in tokens.values()}
        and isinstance(last, str)
        and last in tokens
    )


def load_model(backbone: Backbone, dtype: str = "float32", device: str = "cpu") -> PreTrainedModel:
    """The backbone as a transformers causal LM in `dtype` (one of DTYPES), in eval mode, frozen.

    Raises ConfigError for a dtype or device that there is not, BackboneError for files that cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    check_dtype_and_device(dtype, device)
    with _reading(backbone.id, "model"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            backbone.directory,
            dtype=getattr(torch, dtype),
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told below, with the shapes
        )
    model: PreTrainedModel = loaded[0]
    _check_weights(backbone.id, model, loaded[1])
    if device == "cpu" and dtype != "float32":
        from pedro.cpu_attention import attend_in_float32

        attend_in_float32(model)
    model.requires_grad_(False).eval().to(device)
    return model


def check_dtype_and_device(dtype: str, device: str) -> None:
    """Raise ConfigError for a dtype that there is not, or a device that torch cannot use here."""
    if dtype not in DTYPES:
        raise ConfigError(f"dtype: {dtype!r} is none of {', '.join(DTYPES)}; choose one of them", param="dtype")
    _check_device(device)


def _check_weights(name: str, model: torch.nn.Module, report: Mapping[str, Any]) -> None:
    """Raise BackboneError where the files lack a tensor, hold one too many or of another shape, or NaN.

    `report` is `output_loading_info` of transformers, which leaves out tied tensors.
    """
    import torch

    def refuse(what: str) -> BackboneError:
        return BackboneError(f"backbone: {name!r} {what}; copy or save the directory again", param="backbone")

    if mismatched := sorted(report.get("mismatched_keys") or (), key=str):
        key, found, wanted = mismatched[0]
        raise refuse(f"has {key} of shape {list(found)}, but its config.json asks for {list(wanted)}")
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    extra = sorted(key for key in report.get("unexpected_keys") or () if not BUFFERS.search(key) and key not in tied)
    if missing := sorted(report.get("missing_keys") or ()):
        more = f" and {len(missing) - 1:,} more" if len(missing) > 1 else ""
        instead = f"; it holds {extra[0]}, which the model does not have" if extra else ""
        raise refuse(f"lacks the tensor {missing[0]}{more}{instead}")
    if extra:
        more = f" and {len(extra) - 1:,} more" if len(extra) > 1 else ""
        raise refuse(f"holds the tensor {extra[0]}{more}, for which the model of its config.json has no place")
    with torch.inference_mode():
        for key, tensor in model.state_dict().items():
            if tensor.is_floating_point() and tensor.numel():
                low, high = torch.aminmax(tensor)  # NaN passes through both
                if not (low.isfinite() and high.isfinite()):
                    dtype = str(tensor.dtype).removeprefix("torch.")
                    raise refuse(f"contains numbers in {key} that are not finite (NaN or infinite) as {dtype}")


def quiet() -> None:
    """No progress bars and deprecation notes of transformers, for processes whose output people read."""
    import warnings

    from transformers.utils import logging

    warnings.simplefilter("ignore", FutureWarning)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def context_length(backbone: Backbone) -> int:
    """The most tokens (prompt and answer together) that the backbone was made for."""
    config = read_json(backbone.directory / "config.json", backbone.id)
    with _reading(backbone.id, "config.json"):
        return int(config.get("max_position_embeddings") or config.get("n_positions") or 2048)


def _directory(name: str) -> Path:
    if (known := named_directory(name)) is not None:
        return known
    if Path(name).expanduser().is_dir():
        return Path(name).expanduser()
    here = ", ".join([*embedded_backbones(), *kept_backbones()])
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise BackboneError(
            f"backbone: {name!r} is neither a directory nor an embedded backbone, and "
            f"{backbones_folder(home_directory())} has none of that name; give a transformers directory, a hub id "
            f"(owner/name), or one of {here}; "
            "`pedro backbones list` says what can be pulled",
            param="backbone",
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(HUB_FILES)))
    except Exception as error:  # the hub client raises dozens of types; each means "not to be had"
        raise BackboneError(
            f"backbone: {name!r} could not be fetched from the hub ({type(error).__name__}); check the id, your "
            f"network and HF_TOKEN, or use one of {here}",
            param="backbone",
        ) from error


@contextmanager
def _reading(name: str, what: str) -> Iterator[None]:
    """Whatever goes wrong within becomes a BackboneError that says what of the backbone cannot be read."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # transformers, tokenizers and safetensors raise any type for a damaged file
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise BackboneError(
            f"backbone: the {what} of {name!r} cannot be loaded ({reason}); copy or save the directory again",
            param="backbone",
        ) from error


def _check_device(device: str) -> None:
    """Raise ConfigError for a device that torch cannot use here."""
    if device == "cpu":
        return
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
def _describe(name: str, directory: Path, _state: tuple[tuple[str, int, int], ...]) -> Backbone:
    config = read_json(directory / "tokenizer_config.json", name)
    fields = {field: config[field] for field in TOKENIZER_FIELDS if config.get(field) is not None}
    v2 = _hash_files(directory, TOKENIZER, json.dumps(fields, sort_keys=True))
    return Backbone(
        id=name,
        directory=directory,
        digest=_hash_files(directory, WEIGHTS),
        tokenizer_digest=f"v2:{v2}",
        tokenizer_digest_v1=_hash_files(directory, TOKENIZER_V1, str(config.get("chat_template") or "")),
    )


def _hash_files(directory: Path, patterns: tuple[str, ...], extra: str = "") -> str:
    """sha256 over the sorted (name, sha256) of the files, and `extra`."""
    total = hashlib.sha256(extra.encode())
    for file in sorted({f for pattern in patterns for f in directory.glob(pattern)}):
        with file.open("rb") as stream:
            total.update(f"{file.name}:{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"
