"""Results of PEFT's `method_comparison` as rows beside ours: what its files hold, checked, and what is kept of it.

Theirs is another experiment (one seed, its own data and hyperparameters), so these rows are never mixed with ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

TUNING = "full-finetuning"  # what theirs call a result without a PEFT config
_EARLIER = "cuda_memory_max"  # the name of accelerator_memory_max before 2025-09


@dataclass(frozen=True)
class ImportedRun:
    """One result file of theirs. `forgetting` is in nats of a token of their text; None where it was not measured."""

    experiment: str
    peft_type: str
    model: str
    data: str
    seed: int
    lr: float
    steps: int
    accuracy: float
    parameters: int
    file_size: int
    memory: int
    seconds: float
    forgetting: float | None
    created: str
    peft_version: str

    @property
    def label(self) -> str:
        """What a table calls it: whose model, data and seed a number is of."""
        return f"{self.experiment} ({self.peft_type}; {self.model}; {self.data or 'data not named'}; seed {self.seed})"

    @classmethod
    def from_peft(cls, values: Any) -> ImportedRun:
        """Of a file of theirs, of any version. Raises ValueError that names the field which is missing or wrong."""
        run, train = _part(values, "run_info"), _part(values, "train_info")
        config, metrics = _part(run, "train_config", "run_info."), train.get("metrics")
        if train.get("status") != "success":
            raise ValueError(f"train_info.status: expected 'success', got {train.get('status')!r:.60}")
        if not isinstance(metrics, Sequence) or not metrics or not isinstance(metrics[-1], Mapping):
            raise ValueError("train_info.metrics: expected a list that ends with the test's")
        meta, last = _part(values, "meta_info"), metrics[-1]
        peft = {} if run.get("peft_config") is None else _part(run, "peft_config", "run_info.")
        sources, packages = (meta.get(name) or {} for name in ("dataset_info", "package_info"))
        memory = "accelerator_memory_max" if "accelerator_memory_max" in train else _EARLIER
        return cls(
            experiment=_text(run, "experiment_name", "run_info."),
            peft_type=str(peft.get("peft_type") or TUNING),
            model=_text(config, "model_id", "run_info.train_config."),
            data=", ".join(sources) if isinstance(sources, Mapping) else "",
            seed=int(_number(config, "seed", "run_info.train_config.")),
            lr=_number(config.get("optimizer_kwargs") or {}, "lr", "run_info.train_config.optimizer_kwargs."),
            steps=int(_number(last, "step", "train_info.metrics[-1].")),
            accuracy=_number(last, "test accuracy", "train_info.metrics[-1]."),
            parameters=int(_number(train, "num_trainable_params", "train_info.")),
            file_size=int(_number(train, "file_size", "train_info.")),
            memory=int(_number(train, memory, "train_info.")),
            seconds=_number(train, "train_time", "train_info."),
            forgetting=None if last.get("forgetting") is None else _number(last, "forgetting", "train_info.metrics."),
            created=str(run.get("created_at") or ""),
            peft_version=str(packages.get("peft-version") or "") if isinstance(packages, Mapping) else "",
        )

    @classmethod
    def from_dict(cls, values: Any) -> ImportedRun:
        """As it is kept beside a comparison. Raises ValueError."""
        if not isinstance(values, Mapping):
            raise ValueError(f"expected an object, got {type(values).__name__}")
        names = [item.name for item in fields(cls)]
        if missing := [name for name in names if name not in values]:
            raise ValueError(f"{', '.join(missing)} missing")
        return cls(**{name: values[name] for name in names})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def _part(values: Any, name: str, where: str = "") -> Mapping[str, Any]:
    part = values.get(name) if isinstance(values, Mapping) else None
    if not isinstance(part, Mapping):
        raise ValueError(f"{where}{name}: expected an object, as in a result of PEFT's method_comparison")
    return part


def _text(values: Mapping[str, Any], name: str, where: str) -> str:
    value = values.get(name)
    if not isinstance(value, str) or not value.isprintable():
        raise ValueError(f"{where}{name}: expected a line of text, got {value!r:.60}")
    return value


def _number(values: Mapping[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{where}{name}: expected a number, got {value!r:.60}")
    return float(value)
