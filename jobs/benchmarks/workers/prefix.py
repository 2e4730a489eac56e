"""Our engine with a prefix cache, or without one: prompts as they are given, one tenant."""

from __future__ import annotations

import time
from typing import Any

import torch

from jobs.benchmarks.bench_engine import BenchEngine, take
from jobs.benchmarks.model_sizes import MODEL_SIZES
from jobs.benchmarks.timeline import Timeline


class Prefix:
    """Set-up: size, device, threads, max_batch, length, prefix_mb; `adapters`: a directory by kind."""

    def __init__(self, setup: dict[str, Any]) -> None:
        torch.set_num_threads(setup["threads"])
        self._refs: dict[str, str] = setup["adapters"]
        self._engine = BenchEngine(
            MODEL_SIZES[setup["size"]],
            device=setup["device"],
            max_batch=setup["max_batch"],
            max_length=setup["length"],
            threads=setup["threads"],
            prefix_bytes=int(setup["prefix_mb"]) << 20,
        )
        self._engine.load(list(self._refs.values()))

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """All prompts at once: each one's time to its first token and its answer, what all took, tokens not read again.

        What the engine does after the last token counts for whoever comes next, as in a server: it is done at once.
        """
        ref = self._refs[order["adapter"]] if order["adapter"] else None
        requests = [
            self._engine.request(ids, ref, order["new"], "one", conditioning_length=order["conditioning_length"])
            for ids in order["prompts"]
        ]
        answers: dict[str, list[int]] = {request.id: [] for request in requests}
        cached = dict.fromkeys(answers, 0)
        timeline, engine = Timeline(), self._engine.engine
        for request in requests:
            engine.add(request)
        while engine.has_work():
            outputs = engine.step()
            take(outputs, timeline)
            for output in outputs:
                answers[output.request_id] += output.token_ids
                cached[output.request_id] = output.cached_tokens
        began = time.perf_counter()
        engine.step()  # keeps what was read
        return {
            "first_ms": [1000 * timeline.moments[f"{name}/0"][0] for name in answers],
            "answers": list(answers.values()),
            "wall_s": timeline.figures()["wall_s"] + time.perf_counter() - began,
            "cached": list(cached.values()),
        }
