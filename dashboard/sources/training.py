"""Checks a file as `pedro data check` does, and makes and follows fine-tuning jobs through the gateway's API.

Every request carries the reader's own key, so that a job belongs to its tenant. No page is drawn here.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import context_length, load_tokenizer, named_directory, resolve_backbone
from pedro.data.check import DataReport, check_file
from pedro.data.files import ending
from pedro.data.masks import MaskedRow, show_masks
from pedro.data.row_shapes import RowShape
from pedro.errors import ConfigError, PedroError
from pedro.spec_reader import parse_yaml
from sources.gateway import GatewayError

if TYPE_CHECKING:
    from sources.gateway import GatewayClient
    from sources.sweep_space import SweepChoice

JOBS = "/v1/fine_tuning/jobs"
METHODS = {  # of `pedro methods`, what is served and what most jobs want; any other can be typed
    "pedro": "PEDRO: vectors made of the prompt",
    "lora": "LoRA: two low-rank matrices a projection",
    "ia3": "(IA)³: learned scales",
    "bitfit": "BitFit: biases alone",
    "p-tuning-v2": "P-tuning v2: learned prefixes",
}
UPLOAD_S, ESTIMATE_S = 600.0, 150.0
PAGE, MOST_EVENTS = 100, 5000
SHOWN_MASKS = 3
CURVES = {"train_loss": "Training loss", "valid_loss": "Validation loss"}
ENDED = ("succeeded", "failed", "cancelled")


@dataclass(frozen=True)
class DataFile:
    """A file as its reader chose it."""

    name: str
    content: bytes = field(repr=False)

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


@dataclass(frozen=True)
class Checked:
    """What a check found. `problem` says why a file cannot be read at all, `unmeasured` why no tokens were counted."""

    report: DataReport | None = None
    masks: tuple[MaskedRow, ...] = ()
    problem: str = ""
    unmeasured: str = ""

    @property
    def usable(self) -> bool:
        return self.report is not None and self.report.usable

    @property
    def preferences(self) -> bool:
        """Whether its rows are pairs of answers, which are learnt by DPO."""
        return self.report is not None and self.report.shape is not None and RowShape(self.report.shape).is_preference


@dataclass(frozen=True)
class JobRequest:
    """What a job is to be, without its files."""

    backbone: str
    adapter: str
    method: str = "pedro"
    options: Mapping[str, Any] = field(default_factory=dict)
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 16
    lr: float = 3e-3
    seed: int = 0
    beta: float | None = None
    """Of preference tuning; None for plain answers."""
    sweep: SweepChoice | None = None
    """What varies from trial to trial; None for one job."""

    def body(self, training_file: str, validation_file: str | None = None) -> dict[str, Any]:
        """The request for the job, of ids of uploaded files."""
        hyper = {"n_epochs": self.epochs, "batch_size": self.batch_size}
        kind = "supervised" if self.beta is None else "dpo"
        training: dict[str, Any] = {"lr": self.lr, **({"max_steps": self.max_steps} if self.max_steps else {})}
        if self.sweep:
            training["eval_every"] = self.sweep.eval_every
        return {
            "model": self.backbone,
            "training_file": training_file,
            **({"validation_file": validation_file} if validation_file else {}),
            "suffix": self.adapter,
            "seed": self.seed,
            "method": {
                "type": kind,
                kind: {"hyperparameters": hyper if self.beta is None else {**hyper, "beta": self.beta}},
                "pedro": {
                    "method": {**self.options, "name": self.method},
                    "training": training,
                    **({"sweep": self.sweep.section} if self.sweep else {}),
                },
            },
        }


def check(file: DataFile, backbone: str, validation: DataFile | None = None) -> Checked:
    """What `pedro data check` finds in a file, with the first rows as they are masked. Raises nothing."""
    tokenizer, length, unmeasured = None, None, ""
    if named_directory(backbone) is None:
        unmeasured = f"Tokens are not counted: this machine does not keep the backbone `{backbone}`."
    try:
        if not unmeasured:
            resolved = resolve_backbone(backbone)
            tokenizer, length = load_tokenizer(resolved), context_length(resolved)
        with tempfile.TemporaryDirectory() as folder:
            path = _laid(folder, "train", file)
            beside = _laid(folder, "validation", validation) if validation else None
            try:
                report = check_file(path, tokenizer, length, validation=beside)
                masks = show_masks(path, tokenizer, SHOWN_MASKS) if tokenizer and report.usable else []
            except PedroError as error:
                named = error.message.replace(str(path), file.name)
                return Checked(
                    problem=named.replace(str(beside), validation.name) if validation else named,
                    unmeasured=unmeasured,
                )
    except PedroError as error:
        return Checked(problem=error.message)
    return Checked(report, tuple(masks), "", unmeasured)


def backbones(models: Iterable[Mapping[str, Any]]) -> list[str]:
    """The backbones among the models of a gateway: what has no parent."""
    return [str(model["id"]) for model in models if model.get("id") and not model.get("parent")]


def adapter_name(file_name: str) -> str:
    """A name for the adapter, of the file's: `My rows.jsonl` makes `my-rows`."""
    stem = file_name.lower()
    for part in reversed(ending(Path(file_name))):
        stem = stem.removesuffix(part)
    return re.sub(r"[^a-z0-9]+", "-", stem.removesuffix(".jsonl")).strip("-")[:40] or "adapter"


def options_of(text: str) -> dict[str, Any]:
    """Options of a method as people type them: `r: 8, alpha: 16`. Raises ConfigError."""
    try:
        given = parse_yaml(f"{{{text}}}")
    except ValueError as error:
        raise ConfigError(f"options: {error}; write them as `r: 8, alpha: 16`", param="options") from None
    if any(value is None for value in given.values()):
        raise ConfigError("options: each has a name and a value, as in `r: 8, alpha: 16`", param="options")
    return {str(name): value for name, value in given.items()}


def upload(gateway: GatewayClient, file: DataFile) -> str:
    """The id of the file at the gateway. Raises GatewayError."""
    form: dict[str, Any] = {"files": {"file": (file.name, file.content)}, "data": {"purpose": "fine-tune"}}
    return str(gateway.ask("POST", "/v1/files", timeout_s=UPLOAD_S, **form)["id"])


def estimate(gateway: GatewayClient, body: Mapping[str, Any]) -> dict[str, Any]:
    """The dry run of a job: parameters, rows, steps, seconds, bytes. Raises GatewayError."""
    return gateway.ask("POST", f"{JOBS}?dry_run=true", body, timeout_s=ESTIMATE_S)


def submit(gateway: GatewayClient, body: Mapping[str, Any], once: str) -> dict[str, Any]:
    """The job; `once` and the same body asked again are the same job. Raises GatewayError."""
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    return gateway.ask("POST", JOBS, body, headers={"Idempotency-Key": f"{once}-{digest}"})


def read_job(gateway: GatewayClient, job_id: str) -> dict[str, Any]:
    """A job as it stands. Raises GatewayError."""
    return gateway.ask("GET", f"{JOBS}/{checked_id(job_id)}")


def end(gateway: GatewayClient, job_id: str) -> dict[str, Any]:
    """End a job. Raises GatewayError."""
    return gateway.ask("POST", f"{JOBS}/{checked_id(job_id)}/cancel")


def events_since(gateway: GatewayClient, job_id: str, known: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a job told after the last of `known`, the first first. Raises GatewayError."""
    last, after = known[-1]["id"] if known else None, ""
    found: list[dict[str, Any]] = []
    while len(found) < MOST_EVENTS:
        page = gateway.ask("GET", f"{JOBS}/{checked_id(job_id)}/events?limit={PAGE}{after}")
        for event in page["data"]:
            if event["id"] == last:
                return found[::-1]
            found.append(event)
        if not page["has_more"]:
            break
        after = f"&after={found[-1]['id']}"
    return found[::-1]


def checked_id(job_id: str) -> str:
    """`job_id`, which comes from a URL, if it can stand in one. Raises GatewayError that an unknown job's is like."""
    if not re.fullmatch(r"[A-Za-z0-9_-]{1,100}", job_id):
        raise GatewayError("There is no such job.", 404)
    return job_id


def curve_rows(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row a point of the losses."""
    return [
        {"curve": title, "step": int(event["data"]["step"]), "value": float(event["data"][name])}
        for event in events
        if event["type"] == "metrics"
        for name, title in CURVES.items()
        if name in event["data"]
    ]


def phase(job: Mapping[str, Any], step: int) -> str:
    """What a job does now, in the words of its page."""
    words = {"validating_files": "checking files", "queued": "queued", "paused": "paused"}
    status = str(job["status"])
    return words.get(status) or ("ended" if status in ENDED else "training" if step else "starting workers")


def _laid(folder: str, name: str, file: DataFile) -> Path:
    """The file on disk under a name of ours; its ending stays, since it may say what it is."""
    path = Path(folder) / (name + "".join(ending(Path(file.name))))
    path.write_bytes(file.content)
    return path
