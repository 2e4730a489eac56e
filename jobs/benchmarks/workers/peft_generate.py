"""peft's adapters inside transformers' `generate()`: one adapter for all rows, or one a row (`adapter_names`)."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel

from jobs.benchmarks.model_sizes import MODEL_SIZES, make_model, prompts
from jobs.benchmarks.workers.generate import timed_generate


class PeftGenerate:
    """Set-up: size, device, dtype, threads; `adapters`: directories of LoRA or (IA)³, never merged."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        self._size, self._device = MODEL_SIZES[setup["size"]], setup["device"]
        model = make_model(self._size, self._device, setup["dtype"])
        first, *rest = setup["adapters"]
        self._model = PeftModel.from_pretrained(model, first, adapter_name="a0").eval()
        for number, directory in enumerate(rest, 1):
            self._model.load_adapter(directory, adapter_name=f"a{number}")
        self._model.set_adapter("a0")

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """The order's prompts in one batch; with more than one tenant the adapters are mixed in it."""
        ids = torch.tensor(prompts(self._size, order["batch"], order["prompt"], order["seed"]), device=self._device)
        names = [f"a{row % order['tenants']}" for row in range(order["batch"])]
        mixed = {"adapter_names": names} if order["tenants"] > 1 else {}
        return timed_generate(self._model, ids, order, **mixed)
