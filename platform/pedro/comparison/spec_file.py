"""Reads the YAML of `pedro compare`: a comparison's spec or an efficiency benchmark's, its paths made absolute."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from pedro.backbone import locate_backbone
from pedro.comparison.spec import ComparisonSpec, EfficiencySpec, TaskChoice
from pedro.config import Settings, load_spec
from pedro.errors import ConfigError
from pedro.training.allowed_files import check_allowed_backbones, check_allowed_files
from pedro.training.spec import ASSETS
from pedro.yaml_reader import read_yaml

KINDS = ("comparison", "efficiency")


def load_comparison_spec(path: str | Path, overrides: Iterable[str] = ()) -> ComparisonSpec | EfficiencySpec:
    """Read a spec file; relative paths start from its folder. Raises one ConfigError that lists every mistake."""
    overrides = list(overrides)
    spec: ComparisonSpec | EfficiencySpec
    kind = _kind(path, overrides)
    if kind not in KINDS:
        raise ConfigError(f"kind: expected {' or '.join(KINDS)}, got {kind!r}", param="kind")
    if kind == "efficiency":
        return load_spec(path, overrides, EfficiencySpec)
    spec = load_spec(path, overrides, ComparisonSpec)
    base = Path(path).absolute().parent
    backbones = tuple(locate_backbone(name, base, Path.cwd()) for name in spec.backbones)
    tasks = [_located(task, base) for task in spec.tasks]
    _check_places(spec, tasks, backbones, base, overrides)
    changes: dict[str, object] = {"backbones": backbones, "data": _resolved(spec.data, base), "tasks": tuple(tasks)}
    if spec.forgetting:
        own = {"data": _resolved(spec.forgetting.data, base)}
        changes["forgetting"] = spec.forgetting.model_copy(update=own)
    return spec.model_copy(update=changes)


def _check_places(
    spec: ComparisonSpec, tasks: list[TaskChoice], backbones: tuple[str, ...], base: Path, overrides: Iterable[str]
) -> None:
    """Raise ConfigError for a folder, of data or a backbone, that a spec may not name; by hand it may lie anywhere."""
    given = {override.partition("=")[0] for override in overrides}
    folders = {"data": _resolved(spec.data, base)}
    folders |= {"forgetting.data": _resolved(spec.forgetting.data, base)} if spec.forgetting else {}
    for number, task in enumerate(tasks):
        folders[f"tasks.{number}.data"] = task.data
        folders |= {f"tasks.{number}.evaluate.{n}.data": other.data for n, other in enumerate(task.evaluate)}
    local = {field: folder for field, folder in folders.items() if folder and folder != "hub"}
    settings = Settings.from_env()
    check_allowed_files(local, settings, [base], given)
    for name in backbones:
        check_allowed_backbones({"backbones": name}, settings, [base, ASSETS], given)


def _located(task: TaskChoice, base: Path) -> TaskChoice:
    evaluate = tuple(other.model_copy(update={"data": _resolved(other.data, base)}) for other in task.evaluate)
    return task.model_copy(update={"data": _resolved(task.data, base), "evaluate": evaluate})


def _resolved(data: str | None, base: Path) -> str | None:
    return data if data in (None, "hub") else str(base / Path(data).expanduser())


def _kind(path: str | Path, overrides: Iterable[str]) -> str:
    if given := [override.removeprefix("kind=") for override in overrides if override.startswith("kind=")]:
        return given[-1]
    try:
        fields = read_yaml(path)
    except ConfigError:
        return "comparison"  # `load_spec` says what is wrong
    return str(fields.get("kind", "comparison")) if isinstance(fields, Mapping) else "comparison"
