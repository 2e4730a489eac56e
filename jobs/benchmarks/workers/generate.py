"""transformers on the bare model: `generate()`, which every ratio refers to, and its continuous batching."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from jobs.benchmarks.model_sizes import MODEL_SIZES, make_model, prompts
from jobs.benchmarks.timeline import Timeline

if TYPE_CHECKING:
    from torch import nn

    from pedro.model_protocols import Generates


class Generate:
    """Set-up: size, device, dtype, threads. A batch starts and ends together, as `generate()` has it."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        self._size, self._device = MODEL_SIZES[setup["size"]], setup["device"]
        self._model = make_model(self._size, self._device, setup["dtype"])

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """The order's prompts in one batch."""
        ids = torch.tensor(prompts(self._size, order["batch"], order["prompt"], order["seed"]), device=self._device)
        return timed_generate(self._model, ids, order)


class ContinuousBatching:
    """transformers' continuous batching. Its set-up is that of Generate; a run includes no start of its thread."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        self._size = MODEL_SIZES[setup["size"]]
        self._model: Any = make_model(self._size, setup["device"], setup["dtype"])
        self._count = 0

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """The order's prompts at once, to their ends."""
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=order["new"], do_sample=False, eos_token_id=-1, pad_token_id=0)
        manager = self._model.init_continuous_batching(generation_config=config)
        manager.start()
        try:
            asked = prompts(self._size, order["batch"], order["prompt"], order["seed"])
            timeline = Timeline()
            seen = {manager.add_request(ids, streaming=True): 0 for ids in asked}
            open_requests = len(seen)
            while open_requests:
                result = manager.get_result(timeout=60)
                if result is None:
                    raise TimeoutError("continuous batching gave no token for 60 s")
                fresh = len(result.generated_tokens) - seen[result.request_id]
                seen[result.request_id] += fresh
                timeline.take(result.request_id, fresh)
                open_requests -= result.is_finished()
            return timeline.figures()
        finally:
            manager.stop(block=True)


class _Clock(StoppingCriteria):
    """Notes when each step of `generate()` was done; stops nothing."""

    def __init__(self, timeline: Timeline, rows: int) -> None:
        self._timeline, self._rows = timeline, rows

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_options: Any) -> torch.Tensor:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        for row in range(self._rows):
            self._timeline.take(str(row))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def timed_generate(model: nn.Module, ids: torch.Tensor, order: dict[str, Any], **options: Any) -> dict[str, float]:
    """Greedy (or `beams`) `generate()` of ids [B, T] with its figures; beams of a row count as one answer."""
    timeline = Timeline()
    with torch.inference_mode():
        cast("Generates", model).generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=order["new"],
            min_new_tokens=order["new"],
            do_sample=False,
            num_beams=order.get("beams", 1),
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([_Clock(timeline, len(ids))]),
            **options,
        )
    return timeline.figures()
