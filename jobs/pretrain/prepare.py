"""What a run's folder holds before it trains: tokenizer, ids of an epoch, and what they were made with.

`run.json` is written last and atomically, so a folder that was left unfinished is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from jobs.pretrain import corpus
from jobs.pretrain.atomic_files import replacing
from jobs.pretrain.pretrain_loop import CHECKPOINT
from jobs.pretrain.token_windows import load_ids, pack, save_ids, train_tokenizer
from pedro.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

RUN = "run.json"
DATA = "data"  # the folder of the tokenizer and the ids


@dataclass(frozen=True)
class PretrainData:
    """The tokenizer, the ids of an epoch, the sources that they were made from, and the settings of the run."""

    tokenizer: Tokenizer
    ids: Any
    sources: list[dict[str, Any]]
    made_with: dict[str, Any]


def prepare_data(data: Path, out: Path, made_with: Mapping[str, Any], vocabulary: int, context: int) -> PretrainData:
    """What `out` holds, made now unless it is there. `made_with` is all that decides a run, its seed included.

    Raises ConfigError if `out` was made with anything else, DataError for sources or an `out` that cannot be read.
    """
    if not (out / RUN).is_file():
        _make(data, out, made_with, vocabulary, context)
    prepared = _read(out)
    others = [field for field, value in made_with.items() if prepared.made_with.get(field) != value]
    if others:
        was, wanted = _words(prepared.made_with, others), _words(made_with, others)
        raise ConfigError(f"out: {str(out)!r} was made with {was}, not {wanted}; use a new --out", param="out")
    return prepared


def _make(data: Path, out: Path, made_with: Mapping[str, Any], vocabulary: int, context: int) -> None:
    if (out / CHECKPOINT).exists():
        raise ConfigError(
            f"out: {str(out)!r} holds a checkpoint, but no {RUN} that says what it was made with; use a new --out",
            param="out",
        )
    documents = corpus.documents(data)
    picked = [source.picked(documents[source.name]) for source in corpus.SOURCES]
    tokenizer = train_tokenizer((text for texts in picked for text in texts), vocabulary)
    ids, counts = pack(tokenizer, picked, made_with["seed"])
    if len(ids) <= context:
        raise DataError(
            f"data: {str(data)!r} has {len(ids)} tokens, but a window takes {context + 1}; give more text", param="data"
        )
    (out / DATA).mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(out / DATA)
    save_ids(ids, out / DATA / "ids.npy")
    sources = [
        {
            **{name: getattr(source, name) for name in ("name", "what", "origin", "licence", "share")},
            "documents": len(documents[source.name]),
            "chars": sum(map(len, documents[source.name])),
            "tokens_per_epoch": count,
        }
        for source, count in zip(corpus.SOURCES, counts, strict=True)
    ]
    with replacing(out / RUN) as scratch:
        scratch.write_text(json.dumps({"made_with": dict(made_with), "sources": sources}, indent=1) + "\n")


def _read(out: Path) -> PretrainData:
    from transformers import AutoTokenizer

    try:
        run = json.loads((out / RUN).read_text())
        tokenizer = AutoTokenizer.from_pretrained(out / DATA, local_files_only=True, trust_remote_code=False)
        return PretrainData(
            cast("Tokenizer", tokenizer), load_ids(out / DATA / "ids.npy"), run["sources"], run["made_with"]
        )
    except Exception as error:  # transformers and tokenizers raise any type for a damaged file
        reason = (str(error).strip() or type(error).__name__).partition("\n")[0]
        raise DataError(f"out: {str(out)!r} is damaged ({reason}); use a new --out", param="out") from error


def _words(settings: Mapping[str, Any], fields: Iterable[str]) -> str:
    return ", ".join(f"{field} {settings.get(field)!r}" for field in fields)
