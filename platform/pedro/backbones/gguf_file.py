"""Turns a GGUF file into a transformers directory in bfloat16: weights, config, tokenizer and chat template.

transformers reads the file; here stands what it takes silently and should not: tensors without a place, a rotary
scaling that it drops, a tokenizer that comes out as another one.
"""

from __future__ import annotations

import errno
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone_files import size_problem
from pedro.backbones.gguf_header import GGUFHeader, read_header
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from pedro.backbones.kept import Log

ARCHITECTURES = ("gemma2", "gemma3", "gpt2", "llama", "phi3", "qwen2", "qwen3")
"""Those of GGUF that both transformers reads and `pedro.backbone_files.MODEL_TYPES` has."""
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
"""Our name of a special token, and the file's."""
LEFT_OUT = {
    "head_dim": "attention.key_length",
    "n_inner": "feed_forward_length",
    "n_positions": "context_length",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
"""Fields of a config that transformers does not take from every architecture's metadata, and the metadata's keys."""
CONTROL, USER_DEFINED = 3, 4
PLAIN_SPLITS = ("", "default", "gpt-2", "gpt2")  # GPT-2's, which transformers takes where it is told nothing
SAMPLE = "In 2024, naïve café-goers paid 3 × £1,250 — “really?”\n\tYes."
WRITTEN_BY = ("transformers_version", "_name_or_path", "_model_name_or_path")  # not what the model is


def check_gguf(path: Path) -> GGUFHeader:
    """The header of a file that can be converted. Raises BackboneError for any other; reads no tensor."""
    header = read_header(path)
    if why := _unfit(header) or _unreadable(header):
        raise _refused(path, why)
    return header


def quantisation(header: GGUFHeader) -> str:
    """The types of its tensors, the one of most parameters first: `Q4_1, F32`."""
    from gguf import GGMLQuantizationType

    counts: dict[int, int] = {}
    for tensor in header.tensors:
        counts[tensor.type] = counts.get(tensor.type, 0) + math.prod(tensor.shape)
    return ", ".join(GGMLQuantizationType(kind).name for kind in sorted(counts, key=lambda kind: -counts[kind]))


def convert_gguf(path: Path, directory: Path, log: Log) -> None:
    """Write config, weights and tokenizer of the file into `directory`, which is empty.

    Raises BackboneError where something of the file would be lost or changed.
    """
    header = check_gguf(path)
    log(f"making bfloat16 weights of {path.name}: {header.parameters:,} parameters of {quantisation(header)}")
    try:
        _write_weights(path, header, directory)
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise _refused(path, f"does not hold what its architecture needs ({_line(error)})") from error
    log("making the tokenizer")
    _write_tokenizer(path, directory)
    for file in ("config.json", "tokenizer_config.json"):
        _drop(directory / file, WRITTEN_BY)


def _unfit(header: GGUFHeader) -> str:
    """Why a file of this kind is not read; empty for one that is."""
    known = ", ".join(ARCHITECTURES)
    facts, architecture = header.metadata, header.architecture
    if architecture not in ARCHITECTURES:
        return f"is of the architecture {architecture!r:.60}, which is not supported; take a file of {known}"
    if facts.get("split.count", 1) not in (0, 1):
        return "is one part of several; join them with llama.cpp's gguf-split --merge"
    scaling = facts.get(f"{architecture}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_f") for tensor in header.tensors):
        return (
            f"scales its rotary positions (rope.scaling {scaling!r:.40}), which is lost on the way; take the model's "
            "own weights from the hub"
        )
    return ""


def _unreadable(header: GGUFHeader) -> str:
    """Why the tensors or the tokenizer cannot be read; empty where they can."""
    import numpy as np
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize
    from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS, GGUF_TOKENIZER_TYPES

    total = 0
    for kind in {tensor.type for tensor in header.tensors}:
        try:
            form = GGMLQuantizationType(kind)
            dequantize(np.zeros((1, GGML_QUANT_SIZES[form][1]), dtype=np.uint8), form)
        except (ValueError, KeyError, NotImplementedError):
            name = next((form.name for form in GGMLQuantizationType if form.value == kind), str(kind))
            return f"is quantised as {name}, which cannot be read; take a file of Q8_0, Q4_1 or F16, for instance"
    for tensor in header.tensors:
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType(tensor.type)]
        numbers = math.prod(tensor.shape)
        if not numbers or tensor.shape[-1] % block:
            return f"is damaged: {tensor.name!r:.80} has the shape {list(tensor.shape)} in blocks of {block}"
        taken = numbers // block * size
        total += taken
        if tensor.offset + taken > header.data_bytes or total > header.data_bytes:
            return (
                f"is cut short: {tensor.name!r:.80} ends at byte {tensor.offset + taken:,} of its tensors, of which "
                f"{header.data_bytes:,} are there; download it again"
            )
    model = header.metadata.get("tokenizer.ggml.model")
    split = header.metadata.get("tokenizer.ggml.pre", "")
    if model not in GGUF_TOKENIZER_TYPES or model == "t5":
        return f"contains a tokenizer that cannot be rebuilt (of the kind {model!r:.40})"
    if model == "gpt2" and split not in (*PLAIN_SPLITS, "smollm", *GGUF_PRE_TOKENIZER_SPLITS):
        return f"contains a tokenizer that cannot be rebuilt (it splits text as {split!r:.40} does, which is not known)"
    return ""


def _write_weights(path: Path, header: GGUFHeader, directory: Path) -> None:
    """Write config.json and model.safetensors."""
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
        load_gguf_checkpoint,
    )

    config = _config(path, header)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=config.to_dict())  # type: ignore[no-untyped-call]
    places = get_gguf_hf_weights_map(model, processor)
    if lost := sorted(tensor.name for tensor in header.tensors if tensor.name not in places):
        more = f" and {len(lost) - 1:,} more" if len(lost) > 1 else ""
        raise _refused(path, f"holds the tensor {lost[0]!r:.80}{more}, for which {config.model_type} has no place")
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model, torch_dtype=torch.bfloat16)[
        "tensors"
    ]
    for name, parameter in model.named_parameters():  # tied ones have one name here
        if name not in tensors:
            raise _refused(path, f"lacks the tensor {name}")
        if tensors[name].shape != parameter.shape:
            raise _refused(path, f"has {name} of shape {list(tensors[name].shape)}, not {list(parameter.shape)}")
    config.architectures = [type(model).__name__]
    directory.joinpath("config.json").write_text(_json(config.to_diff_dict()), encoding="utf-8")
    kept = {name: tensors[name].contiguous() for name, _ in model.named_parameters()}
    with _writing(directory):
        save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


def _config(path: Path, header: GGUFHeader) -> Any:
    """The config that transformers makes of the metadata, and what of them it leaves at a default."""
    import numpy as np
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    for field, key in LEFT_OUT.items():
        value = header.metadata.get(f"{header.architecture}.{key}")
        if value is not None and hasattr(config, field):
            setattr(config, field, value)
    for field in ("rms_norm_eps", "layer_norm_epsilon"):  # 32 bits in the file: 1e-05 reads as 9.999999747378752e-06
        if (value := getattr(config, field, None)) is not None:
            setattr(config, field, float(str(np.float32(value))))
    for ours, theirs in SPECIAL.items():
        if ours != "unk":
            setattr(config, f"{ours}_token_id", header.metadata.get(f"tokenizer.ggml.{theirs}_token_id"))
    config.dtype = "bfloat16"
    if why := size_problem(config.to_dict()):
        raise _refused(path, why)
    return config


def _write_tokenizer(path: Path, directory: Path) -> None:
    """Write the tokenizer's files, and read them again: what they make of the file's tokens is compared."""
    from transformers import PreTrainedTokenizerFast

    with _rebuilding(path):
        facts, tokenizer = _tokenizer(path)
    with _writing(directory):
        tokenizer.save_pretrained(directory)
    with _rebuilding(path):
        _check_tokenizer(path, facts, PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True))


def _tokenizer(path: Path) -> tuple[Mapping[str, Any], Any]:
    """What the file says of its tokenizer, and the tokenizer."""
    from tokenizers import pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.integrations.gguf import convert_gguf_tokenizer, get_gguf_tokenizer  # type: ignore[attr-defined]

    architecture, facts, config = get_gguf_tokenizer(str(path))
    backend, _ = convert_gguf_tokenizer(architecture, facts)
    if facts.get("pre_tokenizer_type") == "smollm":
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
    given = {name: value for name, value in config.items() if value is not None}
    return facts, PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **given)


def _check_tokenizer(path: Path, facts: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    """Raise BackboneError where the saved tokenizer makes other ids than the file's metadata says."""
    tokens, kinds = facts["tokens"], facts.get("token_type") or ()
    if len(tokenizer) != len(tokens):
        raise _refused(
            path, f"contains a tokenizer that cannot be rebuilt ({len(tokens):,} tokens became {len(tokenizer):,})"
        )
    whole = [index for index, kind in enumerate(kinds) if kind in (CONTROL, USER_DEFINED)]
    named = {f"{name}_token": facts.get(f"{name}_token_id") for name in SPECIAL}
    for index in [*whole, *(index for index in named.values() if index is not None)]:
        if (found := tokenizer.convert_tokens_to_ids(tokens[index])) != index:
            raise _refused(
                path,
                f"contains a tokenizer that cannot be rebuilt (token {index}, {tokens[index]!r:.60}, became {found})",
            )
    for name, index in named.items():
        if index is not None and getattr(tokenizer, f"{name}_id") != index:
            raise _refused(path, f"says its {name} is {index}, but the tokenizer made of it has another")
    if named["eos_token"] is None:
        raise _refused(path, "names no end of text (tokenizer.ggml.eos_token_id), so no answer would end")
    ids = tokenizer(SAMPLE, add_special_tokens=False).input_ids
    text = str(tokenizer.decode(ids))
    if tokenizer.unk_token_id not in ids and text.strip() != SAMPLE.strip():
        raise _refused(path, f"contains a tokenizer that cannot be rebuilt (it reads {SAMPLE!r} as {text!r:.80})")


@contextmanager
def _rebuilding(path: Path) -> Iterator[None]:
    """Whatever a tokenizer's parts make its libraries raise becomes a BackboneError."""
    try:
        yield
    except BackboneError:
        raise
    except Exception as error:  # the tokenizers library raises plain exceptions
        raise _refused(path, f"contains a tokenizer that cannot be rebuilt ({_line(error)})") from error


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    """What the libraries in Rust raise of a disk becomes an OSError, as it is elsewhere."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # plain exceptions
        raise OSError(errno.EIO, str(error), str(directory)) from error


def _drop(path: Path, keys: tuple[str, ...]) -> None:
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(_json({key: value for key, value in config.items() if key not in keys}), encoding="utf-8")


def _json(config: Mapping[str, Any]) -> str:
    return json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:200]


def _refused(path: Path, why: str) -> BackboneError:
    return BackboneError(f"backbone: {path.name!r} {why}", param="backbone")
