"""A comparison's runs in MLflow: one for the comparison, and below it one for each of its runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from pedro.errors import PedroError
from pedro.registry import Registry

if TYPE_CHECKING:
    from pedro.comparison.result_model import RunResult
    from pedro.comparison.spec import ComparisonSpec
    from pedro.config import Settings

SPEEDS = ("seconds", "tokens_per_second", "answer_tokens_per_second", "samples_per_second")


class RunTracker:
    """Logs runs as they end. A tracking server that fails costs the log, not the comparison."""

    def __init__(self, spec: ComparisonSpec, settings: Settings, log: Callable[[str], None]) -> None:
        self._spec, self._log = spec, log
        self._experiment = f"comparison.{spec.name}"
        self._registry: Registry | None = Registry.open(settings)
        self._parent: str | None = None

    def track(self, result: RunResult) -> None:
        """Log a run that ended."""
        if self._registry is None:
            return
        try:
            self._write(self._registry, result)
        except PedroError as error:
            self._log(f"runs are not logged to MLflow any more: {error.message}")
            self._registry = None

    def close(self) -> None:
        """End the comparison's own run."""
        if self._registry is not None and self._parent is not None:
            self._registry.finish_run(self._parent)

    def _write(self, registry: Registry, result: RunResult) -> None:
        tags = {"comparison": self._spec.name}
        if self._parent is None:
            self._parent = registry.start_run(experiment=self._experiment, name=self._spec.name, params={}, tags=tags)
        params = {
            "method": result.method,
            "label": result.label,
            **{f"method.{key}": value for key, value in result.options.items()},
            "task": result.task,
            "backbone": result.backbone,
            "budget": result.budget,
            "seed": result.seed,
            "lr": result.lr,
            "stage": result.stage,
        }
        name = f"{result.label}-{result.task}-{result.seed}"
        own = {**tags, "comparison_run": result.id, "message": result.message}
        run_id = registry.start_run(
            experiment=self._experiment, name=name, params=params, tags=own, parent=self._parent
        )
        for step, value in result.curves.get("dev/loss", []):
            registry.log_metrics(run_id, int(step), {"dev/loss": value})
        if result.finished:
            numbers = {f"test/{score.task}": score.value for score in result.scores}
            numbers |= {"trainable_parameters": result.trainable_parameters}
            if result.validation.get("value") is not None:
                numbers |= {"validation": result.validation["value"]}
            numbers |= {name: getattr(result, name) for name in SPEEDS}
            registry.log_metrics(run_id, result.steps, numbers)
        registry.finish_run(run_id, "FINISHED" if result.finished else "FAILED")
