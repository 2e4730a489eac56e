"""Runs lm-eval's tasks on one model and gives the scores as plain data: what `pedro eval --harness lm-eval` prints.

The steps and seeds are those of lm-eval's own `simple_evaluate`, so the scores are too. A task is data and code of
somebody else's: whatever they raise becomes one line.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.errors import ConfigError, PedroError
from pedro.evaluation.harness import TASKS
from pedro.evaluation.harness.local import LocalModel
from pedro.evaluation.scoring import finite

if TYPE_CHECKING:
    from pedro.evaluation.harness.base import HarnessModel

NO_METRICS = ("alias", "name", "sample_len", "sample_count")


def run_harness(
    arguments: dict[str, Any],
    tasks: Sequence[str],
    *,
    include_path: Path | None = None,
    limit: int | None = None,
    shots: int | None = None,
    chat: bool = False,
    model_class: Callable[..., HarnessModel] = LocalModel,
) -> dict[str, Any]:
    """Scores of `tasks` (names or patterns) by the `model_class` of `arguments`: metrics by task and by group.

    `include_path` is a folder with more task files, ours are known; `chat` asks in the adapter's prompt format. A
    metric that is NaN is None. Raises ConfigError for a task that is unknown or cannot be asked, with the reason.
    """
    from lm_eval import evaluate

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager = find_tasks(tasks, include_path)
    _seed()
    model = model_class(**arguments)
    with _blamed_on(tasks):
        loaded = manager.load(manager.match_tasks(list(tasks)))
        for name, task in loaded["tasks"].items():
            _set_shots(name, task, shots)
        report = evaluate(
            lm=model,
            task_dict=loaded,
            limit=limit,
            apply_chat_template=chat,
            fewshot_as_multiturn=True,
            log_samples=False,
            bootstrap_iters=1000,
        )
        assert report is not None, "lm-eval gives nothing to any rank but the first"
        return {
            "harness": f"lm-eval {metadata.version('lm_eval')}",
            "tasks": {name: _metrics(values) for name, values in report["results"].items()},
            "groups": {name: _metrics(values) for name, values in report.get("groups", {}).items()},
            "rows": {name: counts["effective"] for name, counts in report["n-samples"].items()},
            "shots": dict(report["n-shot"]),
        }


def find_tasks(tasks: Sequence[str], include_path: Path | None = None) -> Any:
    """A TaskManager that has all of them; lm-eval's own thousands, which take seconds to list, only where needed.

    Raises ConfigError for a name or pattern that fits none, and for a task file that takes the name of one of ours.
    """
    from lm_eval.tasks import TaskManager

    folders = [str(folder) for folder in (TASKS, include_path) if folder is not None]
    unknown: list[str] = []
    for defaults in (False, True):
        manager = TaskManager(include_path=folders, include_defaults=defaults)
        for file in TASKS.glob("*.yaml"):
            if manager.task_index[file.stem].yaml_path != file:
                raise ConfigError(
                    f"include_path: {include_path} has a task {file.stem}, which is one of ours; give it another name",
                    param="include_path",
                )
        unknown = [name for name in tasks if not manager.match_tasks([name])]
        if not unknown:
            return manager
    raise ConfigError(f"tasks: lm-eval has no {', '.join(unknown)}; `lm_eval ls tasks` lists them", param="tasks")


@contextmanager
def _blamed_on(tasks: Sequence[str]) -> Iterator[None]:
    try:
        yield
    except PedroError:
        raise
    except Exception as error:  # of the task's files, functions and data, and of the hub that they come from
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"tasks: {', '.join(tasks)} cannot be asked ({reason}); look at the task's files and data",
            param="tasks",
        ) from error


def _seed() -> None:
    import numpy
    import torch
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED

    random.seed(DEFAULT_RANDOM_SEED)
    numpy.random.seed(DEFAULT_OTHER_SEED)
    torch.manual_seed(DEFAULT_OTHER_SEED)


def _set_shots(name: str, task: Any, shots: int | None) -> None:
    """As many worked examples as are wanted, or else as the task has. Raises ConfigError where a task fixes none."""
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    own = task.get_config("num_fewshot")
    if shots and own == 0:
        raise ConfigError(f"shots: the task {name} is asked without examples; leave --shots out", param="shots")
    task.set_config("num_fewshot", (own or 0) if shots is None else shots)
    task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)


def _metrics(values: dict[str, Any]) -> dict[str, float | str | None]:
    """lm-eval's `metric,filter` keys without the filter that means none; its numbers as plain ones, or its "N/A"."""
    wanted = {key: value for key, value in values.items() if key not in NO_METRICS and not isinstance(value, dict)}
    return {
        key.removesuffix(",none"): value if isinstance(value, str) else finite(value) for key, value in wanted.items()
    }
