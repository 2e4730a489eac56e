"""`pedro eval --harness lm-eval`: any task of EleutherAI's lm-eval on an adapter, in this process."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from pedro.cli.output import emit, log, table
from pedro.refs import ModelRef


def evaluate_by_harness(
    name: str,
    harness: str,
    tasks: str,
    rows: int | None,
    shots: int | None,
    include_path: Path | None,
    chat: bool,
    as_json: bool,
) -> None:
    """Score `name` on lm-eval's tasks and print its metrics. Raises ConfigError for a harness or task there is not."""
    from pedro.errors import ConfigError

    if harness != "lm-eval":
        raise ConfigError(f"harness: expected lm-eval, got {harness!r}", param="harness")
    wanted = [task for task in tasks.replace(",", " ").split() if task]
    if not wanted:
        raise ConfigError("tasks: give at least one, for instance --tasks pedro_snips,arc_easy", param="tasks")
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError('harness: install it with `pip install "pedro-platform[harness]"`', param="harness")
    label, arguments = _model(name)
    log(f"asking {label} lm-eval's {', '.join(wanted)}")
    from pedro.backbone import quiet
    from pedro.evaluation.harness.run import run_harness

    quiet()
    report = run_harness(arguments, wanted, include_path=include_path, limit=rows, shots=shots, chat=chat)
    result = {"model": label, **report}
    emit(result, as_json, lambda: _show(result))


def _model(name: str) -> tuple[str, dict[str, Any]]:
    """What to call it, and how to load it: a registered version, an adapter's directory, or else a backbone."""
    if (Path(name) / "pedro_adapter.json").is_file():
        return name, {"adapter": name}
    if "/" in name or "." not in name:
        return name, {"backbone": name}
    from pedro.config import Settings
    from pedro.registry import Registry

    registry = Registry.open(Settings.from_env())
    version = registry.find(ModelRef.parse(name))
    return version.ref, {"adapter": str(registry.download(version))}


def _show(result: dict[str, Any]) -> None:
    lines = []
    for task, metrics in {**result["tasks"], **result["groups"]}.items():
        for metric, value in metrics.items():
            if "_stderr" in metric or isinstance(value, str):
                continue
            plain, comma, filtered = metric.partition(",")
            error = metrics.get(f"{plain}_stderr{comma}{filtered}")
            spread = f"± {error:.4f}" if isinstance(error, float) else ""
            lines.append(
                [task, result["rows"].get(task, ""), result["shots"].get(task, ""), metric, _figure(value), spread]
            )
    table(["task", "rows", "shots", "metric", result["model"], ""], lines)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
