"""PEDRO's bi-level step at a backbone's real sizes: seconds a step, and peak memory beside the dry run's promise."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from jobs.benchmarks.model_sizes import MODEL_SIZES, make_model
from jobs.gpu_check.training import ANSWER, make_plan, random_rows
from pedro.methods.registry import count_parameters, get_method
from pedro.training.bilevel import OMEGA, THETA, Alternation, GroupedAdamW
from pedro.training.engines import TorchEngine
from pedro.training.loop import batch_step
from pedro.training.memory import Sizes, training_memory

ROWS, LENGTH = 16, 256
TIMES = 3


def run(device: str, model: str, note: Callable[[dict[str, Any]], None]) -> None:
    """With recomputed activations, as 7B wants them on one GPU, and then without at fewer rows."""
    small = model == "tiny"
    backbone = make_model(MODEL_SIZES[model], device, "bfloat16")
    method = get_method("pedro")
    tuned: Any = method.apply(backbone, {"r": 12})
    omega, theta = method.parameter_groups(tuned)
    optimizer = GroupedAdamW(omega, theta)
    engine = TorchEngine(tuned, optimizer, [*omega, *theta], accumulation=1, clip=1.0)
    alternation = Alternation(optimizer, omega, theta)
    counts = count_parameters(tuned)
    for checkpointing, rows in ((True, 4 if small else ROWS), (False, 2 if small else ROWS // 4)):
        if checkpointing:
            tuned.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            tuned.gradient_checkpointing_disable()
        length = 32 if small else LENGTH
        seconds, peak = _steps(engine, alternation, model, rows, length, device)
        size = MODEL_SIZES[model]
        promised = training_memory(
            Sizes(size.hidden, size.layers, size.vocab),
            frozen=counts["total"] - counts["trainable"],
            trainable=counts["trainable"],
            precision="bf16",
            full=False,
            tokens=rows * length,
            answer_tokens=rows * ANSWER,
            gradient_checkpointing=checkpointing,
        )
        finding: dict[str, Any] = {
            "model": model,
            "rows": rows,
            "tokens_per_row": length,
            "gradient_checkpointing": checkpointing,
            "trainable_parameters": counts["trainable"],
            "omega_seconds": round(seconds[OMEGA], 4),
            "theta_seconds": round(seconds[THETA], 4),
            "tokens_per_second": round(2 * rows * length / sum(seconds.values()), 1),
            "promised_gb": round(sum(promised.values()) / 1e9, 3),
        }
        if peak is not None:
            finding["peak_gb"] = round(peak / 1e9, 3)
            finding["peak_over_promised"] = round(peak / sum(promised.values()), 3)
        note(finding)


def _steps(
    engine: TorchEngine, alternation: Alternation, model: str, rows: int, length: int, device: str
) -> tuple[dict[str, float], int | None]:
    """Seconds of an Ω and of a Θ step after one of each that is not counted; the peak of allocated bytes on a GPU."""
    batch = random_rows(MODEL_SIZES[model], rows, length, seed=0)
    plan = make_plan(TIMES, bilevel=True, batch=rows)
    engine.mode(training=True)
    engine.optimizer.set_lr(1e-4, 1e-4)
    seconds = {}
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for role in (OMEGA, THETA):
        alternation.activate(role)
        for number in range(TIMES + 1):
            if number == 1:
                _settle(device)
                began = time.perf_counter()
            batch_step(engine, batch, plan, 0, salt=number)
        _settle(device)
        seconds[role] = (time.perf_counter() - began) / TIMES
    return seconds, torch.cuda.max_memory_allocated() if device == "cuda" else None


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
