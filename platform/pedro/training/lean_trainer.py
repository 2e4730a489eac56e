"""Ray Train's trainer without the helper processes that a fine-tune has no use for.

Ray Train starts several actors beside the workers, each a process that imports Ray and PyTorch before the first step.
"""

from __future__ import annotations

from typing import Any

from ray.train.torch import TorchTrainer

# By name: they are Ray's own, and one that another version no longer has is simply not found.
DATASETS = "DatasetsCallback"  # hands out shards of Ray Data's datasets, of which we give none
CLEANER = "PlacementGroupCleanerCallback"  # frees the workers' CPUs if the controller dies and its job lives on


class LeanTorchTrainer(TorchTrainer):
    """Starts one process less, and two less where no trial of a sweep is trained.

    A job ends with its controller, and with it what its workers hold; a sweep goes on to its other trials.
    """

    def _create_default_callbacks(self) -> list[Any]:
        made = super()._create_default_callbacks()  # type: ignore[misc]  # only version 2 of Ray Train has it
        unused = {DATASETS} if _in_sweep() else {DATASETS, CLEANER}
        return [callback for callback in made if type(callback).__name__ not in unused]


def _in_sweep() -> bool:
    """Whether this process is a trial that Ray Tune started."""
    from ray.tune.trainable.trainable_fn_utils import _in_tune_session

    return bool(_in_tune_session())
