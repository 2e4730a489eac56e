"""Result files of PEFT's `method_comparison`: ours written in their form, theirs kept beside a comparison.

Their form is one JSON a run: run_info (settings), train_info (costs, and metrics of which the last are the test's) and
meta_info (versions, machine); huggingface/peft, method_comparison/MetaMathQA.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.comparison.imported import ImportedRun
from pedro.comparison.result_model import BACKBONE, RunResult, TaskResult
from pedro.comparison.run_files import IMPORTED, write_text
from pedro.errors import ConfigError, DataError

if TYPE_CHECKING:
    from pedro.comparison.result_model import Comparison, Selection

PACKAGES = ("transformers", "peft", "datasets", "bitsandbytes", "torch")


def export_results(selection: Selection, folder: Path) -> list[Path]:
    """Write a file for each finished run of the tables and each task it was scored on; the backbone itself has none.

    Raises BackboneError where a backbone is not at hand: their files hold the config and the size of the whole model.
    """
    files: dict[str, dict[str, Any]] = {}
    for run in selection.runs:
        if run.finished and run.method != BACKBONE:
            for score in run.scores:
                experiment = _experiment(run, score)
                files[f"{experiment.replace('/', '--')}.json"] = _result(run, score, experiment)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, values in files.items():
            write_text(folder / name, json.dumps(values, indent=2, allow_nan=False) + "\n")
    except OSError as error:
        raise ConfigError(
            f"--export-peft: {folder} cannot be written ({error.strerror}); name another folder", param="--export-peft"
        ) from error
    return [folder / name for name in files]


def import_results(comparison: Comparison, paths: Iterable[Path]) -> int:
    """Keep results of theirs (files, or folders of them) beside a comparison; how many were read.

    A newer result of an experiment takes the place of an older one. Raises DataError that names every file which
    cannot be used; then nothing is kept. Raises ConfigError where there is no comparison.
    """
    if not comparison.metadata:
        raise ConfigError(f"{comparison.folder} holds no comparison yet; run it first, or name the folder of one")
    read: list[ImportedRun] = []
    wrong: list[str] = []
    for path in [file for given in paths for file in (sorted(given.glob("*.json")) if given.is_dir() else [given])]:
        try:
            read.append(ImportedRun.from_peft(json.loads(path.read_text(encoding="utf-8"))))
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}")
        except ValueError as error:
            wrong.append(f"{path}: {error}")
    if wrong or not read:
        why = "\n  ".join(wrong) or "no .json file is there"
        raise DataError(f"--import-peft: nothing was imported\n  {why}", param="--import-peft")
    kept = {(run.experiment, run.model): run for run in sorted([*comparison.imported, *read], key=lambda r: r.created)}
    rows = [kept[key].to_dict() for key in sorted(kept)]
    write_text(comparison.folder / IMPORTED, json.dumps(rows, indent=1, ensure_ascii=False) + "\n")
    return len(read)


def _experiment(run: RunResult, score: TaskResult) -> str:
    """Their `<method>/<experiment>`; the file's name, with `--` between."""
    parts = [Path(run.backbone).name, run.label, score.task, f"{run.budget}" if run.budget else "", f"seed{run.seed}"]
    return f"{run.method}/{'-'.join(_plain(part) for part in parts if part)}"


def _plain(text: str) -> str:
    return re.sub(r"[^\w.=]+", "_", text).strip("_")


def _result(run: RunResult, score: TaskResult, experiment: str) -> dict[str, Any]:
    config, total = _config_and_size(run)
    provenance, versions = run.provenance, run.provenance.get("versions") or {}
    curve = [{"step": int(step), "valid loss": _finite(loss)} for step, loss in run.curves.get("dev/loss", ())]
    before, after = run.forgetting.get("loss_before"), run.forgetting.get("loss")
    last = {
        "step": run.steps,
        "test accuracy": score.value,
        "train loss": _finite(run.curves["train/loss"][-1][1]) if run.curves.get("train/loss") else None,
        "train samples": run.samples,
        "train total tokens": run.all_tokens,
        **({} if before is None or after is None else {"forgetting": after - before}),
    }
    return {
        "run_info": {
            "created_at": provenance.get("created"),
            "total_time": run.seconds + run.scoring_seconds,
            "experiment_name": experiment,
            "peft_branch": "",
            "train_config": _train_config(run),
            "peft_config": config,
            "error_msg": "",
        },
        "train_info": {
            **dict.fromkeys(
                ("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
                run.peak_memory_bytes,  # the one number that is measured
            ),
            "train_time": run.seconds,
            "file_size": run.saved_bytes or run.adapter_bytes,
            "num_trainable_params": run.trainable_parameters,
            "num_total_params": total,
            "status": "success",
            "metrics": [*curve, last],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {score.task: {"sha": None, "created_at": None}},
            "package_info": {
                key: value
                for name in PACKAGES
                for key, value in ((f"{name}-version", versions.get(name)), (f"{name}-commit-hash", None))
            },
            "system_info": {"system": "", "accelerator": "", **(provenance.get("hardware") or {})},
            "pytorch_info": "",
            "pedro": {"comparison": run.comparison, "id": run.id, "metric": score.metric, "rows": score.rows},
        },
    }


def _train_config(run: RunResult) -> dict[str, Any]:
    """Our training in the words of theirs; what it has no word for is under `pedro`."""
    training = run.training
    theirs = ("lr", "weight_decay", "clip", "batch_size", "eval_every", "max_length", "precision", "seed")
    return {
        "model_id": run.backbone,
        "dtype": training.get("backbone_dtype")
        or {"fp32": "float32", "bf16": "bfloat16"}.get(str(training.get("precision")), "float32"),
        "max_seq_length": training.get("max_length"),
        "batch_size": training.get("batch_size"),
        "max_steps": run.steps,
        "eval_steps": training.get("eval_every"),
        "compile": False,
        "query_template": run.wording,
        "seed": run.seed,
        "grad_norm_clip": training.get("clip"),
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": run.lr, "weight_decay": training.get("weight_decay")},
        "lr_scheduler": "linear",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "pedro": {name: value for name, value in training.items() if name not in theirs},
    }


def _config_and_size(run: RunResult) -> tuple[dict[str, Any] | None, int]:
    """PEFT's config as its file has it (None: the whole model was trained), and the parameters of the whole model."""
    import torch
    from transformers import AutoModelForCausalLM

    from pedro.backbone import load_config, resolve_backbone
    from pedro.methods.registry import count_parameters, get_method

    shapes = load_config(resolve_backbone(run.backbone))
    config = get_method(run.method).config(shapes, run.options)
    with torch.device("meta"):
        total = count_parameters(AutoModelForCausalLM.from_config(shapes))["total"]
    if config is None:
        return None, total
    values = {name: _jsonable(value) for name, value in config.to_dict().items()}
    return {**values, "base_model_name_or_path": run.backbone}, total + run.trainable_parameters


def _jsonable(value: Any) -> Any:
    if isinstance(value, (set, frozenset, tuple)):
        return sorted(value) if isinstance(value, (set, frozenset)) else list(value)
    return getattr(value, "value", value)


def _finite(value: float) -> float | None:
    return value if value == value and abs(value) != float("inf") else None
