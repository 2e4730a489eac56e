"""A trained adapter as it is saved and served: its bytes, and tokens per second through the platform's engine.

A short fixed measurement: the same prompts, all at once, answered to the same length. It ranks methods on one machine;
what a server gives under load is for the benchmarks.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from peft import PeftModel

from pedro.adapter_directory import WEIGHTS
from pedro.backbone import context_length, load_model
from pedro.data.general_text import WINDOW, windows
from pedro.errors import AdapterError, BackboneError
from pedro.methods.adapter_files import save_adapter
from pedro.methods.servable import check_servable

if TYPE_CHECKING:
    from pedro.comparison.spec_sections import ServingSpec
    from pedro.training.context import TrainingContext

ROUNDS = 3  # after one that warms up; the middle one counts
WAIT_S = 0.001  # while the adapter is being loaded


def probe_serving(context: TrainingContext, asked: ServingSpec, threads: int) -> dict[str, Any]:
    """`saved_bytes`, and `served_tokens_per_second` or why it is `not_served`, as a result holds them.

    A whole model is not written, so its bytes are those of its tensors.
    """
    if not isinstance(context.model, PeftModel):
        sizes = [parameter.numel() * parameter.element_size() for parameter in context.model.parameters()]
        return {"saved_bytes": sum(sizes), "not_served": "a whole model is not served in mixed batches"}
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        save_adapter(context.model, directory, _manifest(context))
        saved = (directory / WEIGHTS).stat().st_size
        try:
            check_servable(directory, context.backbone)
        except (AdapterError, BackboneError) as error:
            return {"saved_bytes": saved, "not_served": error.message}
        speed = _tokens_per_second(context, directory, asked, threads)
    return {"saved_bytes": saved, "served_tokens_per_second": round(speed, 1)}


def _tokens_per_second(context: TrainingContext, directory: Path, asked: ServingSpec, threads: int) -> float:
    """Of answers, reading of prompts included in the time."""
    from pedro.engine import Engine, EngineConfig, Request, SamplingParams

    room = context_length(context.backbone)
    rows = windows(context.tokenizer, asked.requests * WINDOW, room)
    prompts = [row["input_ids"][: max(1, min(row["prompt_len"], room - asked.tokens))] for row in rows]
    length = max(map(len, prompts))
    params = SamplingParams(max_tokens=min(asked.tokens, room - length), ignore_eos=True)
    model = load_model(context.backbone, device=str(context.engine.device))
    config = EngineConfig(max_batch=asked.requests, max_length=min(room, length + asked.tokens), threads=threads)
    engine = Engine(model, context.tokenizer, config, lambda _ref: directory, context.backbone.digest)
    times = []
    try:
        for turn in range(ROUNDS + 1):
            started = time.perf_counter()
            for number in range(asked.requests):
                ids = prompts[number % len(prompts)]
                engine.add(Request(f"{turn}.{number}", ids, adapter="adapter", params=params))
            made = 0
            while engine.has_work():
                for output in engine.step():
                    if output.error is not None:
                        raise output.error
                    made += len(output.token_ids)
                if engine.idle:
                    time.sleep(WAIT_S)
            times.append((time.perf_counter() - started) / made)
    finally:
        engine.close()
    return 1 / median(times[1:])


def _manifest(context: TrainingContext) -> dict[str, Any]:
    backbone, method = context.backbone, context.spec.method
    digests = {"digest": backbone.digest, "tokenizer_digest": backbone.tokenizer_digest}
    return {
        "backbone": {"id": backbone.id, **digests},
        "method": {"name": method.name, "options": method.options},
        "prompt_format": context.prepared.format.to_dict(),
    }
