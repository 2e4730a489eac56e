"""Runs lm-eval's tasks on one model and gives the scores as plain data: what `pedro eval --harness lm-eval` prints."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from pedro.errors import ConfigError
from pedro.evaluation.harness import TASKS, register

NO_METRICS = ("alias", "name", "sample_len", "sample_count")


def run(
    arguments: dict[str, Any],
    tasks: Sequence[str],
    *,
    model: str = "pedro-local",
    include_path: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
) -> dict[str, Any]:
    """Scores of `tasks` by one of our models, made with `arguments`: metrics by task and by group, as lm-eval's.

    `include_path` is a folder with more task files, ours are known; `chat` asks in the adapter's prompt format.
    Raises ConfigError for an unknown task, with the reason of lm-eval.
    """
    register()
    from lm_eval import simple_evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = find_tasks(tasks, include_path)
    found = simple_evaluate(
        model=model,
        model_args=arguments,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=1000,
    )
    assert found is not None, "lm-eval gives nothing to any rank but the first"
    return {
        "harness": f"lm-eval {metadata.version('lm_eval')}",
        "tasks": {name: _metrics(values) for name, values in found["results"].items()},
        "groups": {name: _metrics(values) for name, values in found.get("groups", {}).items()},
        "rows": {name: counts["effective"] for name, counts in found["n-samples"].items()},
        "shots": dict(found["n-shot"]),
    }


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """A TaskManager that has all of them; lm-eval's own thousands, which take seconds to list, only where needed."""
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in (TASKS, include_path) if folder is not None]
    unknown: list[str] = []
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults)
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise ConfigError(f"tasks: lm-eval has no {', '.join(unknown)}; `lm_eval ls tasks` lists them", param="tasks")


def _metrics(values: dict[str, Any]) -> dict[str, Any]:
    """lm-eval's `metric,filter` keys without the filter that means none; its numbers as plain ones, or its "N/A"."""
    wanted = {key: value for key, value in values.items() if key not in NO_METRICS and not isinstance(value, dict)}
    return {
        key.removesuffix(",none"): value if isinstance(value, str) else float(value) for key, value in wanted.items()
    }
