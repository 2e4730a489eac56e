"""A few steps of fine-tuning on packed rows or on padded ones: two runs of our loop with the same rows and seeds.

Each validates and writes a checkpoint at the end, and then the adapter, as `train.OurTrainer` does.
"""

from __future__ import annotations

from typing import Any

from jobs.benchmarks.workers.train import OurTrainer


class BothWays:
    """Set-up as of `OurTrainer`."""

    def __init__(self, setup: dict[str, Any]) -> None:
        self._trainers = {packing: OurTrainer({**setup, "packing": packing}) for packing in (True, False)}
        self._padding = self._trainers[False].padding(setup["steps"])

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """One run, by `packing`; `padding` is its share of the padded batches' cells."""
        return {**self._trainers[order["packing"]].run(order), "padding": self._padding}
