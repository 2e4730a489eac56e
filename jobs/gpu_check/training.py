"""Trains every method for a few steps on the device: the loop, bi-level steps, and which parameters a step moves."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch

from jobs.benchmarks.model_sizes import ModelSize, make_model, prompts
from pedro.methods.registry import METHODS
from pedro.training.bilevel import OMEGA, THETA, Alternation, GroupedAdamW
from pedro.training.engines import StepEngine, TorchEngine
from pedro.training.loop import Data, TrainingPlan, TrainState, batch_step, train

if TYPE_CHECKING:
    from pedro.methods.method import Method
    from pedro.training.worker_group import WorkerGroup

SMALL = ModelSize("small", "4 blocks of 256", 256, 4, 8, 4, 512, True, vocab=1000, context=512)
TINY = ModelSize("tiny", "3 blocks of 32", 32, 3, 4, 2, 48, True, vocab=64, context=64)
OPTIONS: dict[str, dict[str, Any]] = {
    "peft": {"peft_type": "VERA", "r": 4},
    "lora-dash": {"launch": 10, "directions": 4},
    "p-tuning-v2": {"tokens": 4},
    "lpt": {"tokens": 4, "r": 8},
    "loretta": {"r": 4, "rank": 2},
}
STEPS, ROWS, ANSWER = 30, 16, 8
LR = 5e-3


class Losses:
    """A reporter that keeps the curve of the training loss, and no checkpoint."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def resume(self, _engine: StepEngine, _group: WorkerGroup) -> None:
        """Every run is a new one."""

    def checkpoint(
        self, _engine: StepEngine, _group: WorkerGroup, _state: TrainState, _best: Mapping[str, torch.Tensor]
    ) -> None:
        """Nothing is kept."""

    def metrics(self, _step: int, values: Mapping[str, float]) -> None:
        if "train/loss" in values:
            self.seen.append(values["train/loss"])

    def line(self, _text: str) -> None:
        """Nobody reads along."""


def run(device: str, model: str, note: Callable[[dict[str, Any]], None]) -> None:
    """A finding for each method; one that raises is a finding, too."""
    size, steps = (TINY, 20) if model == "tiny" else (SMALL, STEPS)
    for name, method in METHODS.items():
        try:
            note({"method": name, **check_method(method, size, device, steps)})
        except Exception as error:  # noqa: BLE001 - the others still have their turn
            note({"method": name, "ok": False, "error": f"{type(error).__name__}: {error}"[:1000]})


def check_method(method: Method, size: ModelSize, device: str, steps: int) -> dict[str, Any]:
    """Train on a few rows until the loss falls; `moves_only_its_own` tells Ω steps from Θ steps."""
    torch.manual_seed(0)
    options = OPTIONS.get(method.name, {})
    model = method.apply(make_model(size, device, "bfloat16"), options)
    omega, theta = method.parameter_groups(model)
    optimizer = GroupedAdamW(omega, theta)
    engine = TorchEngine(model, optimizer, [*omega, *theta], accumulation=1, clip=1.0)
    engine.hook = method.training_hook(model, options, steps)
    alternation = Alternation(optimizer, omega, theta)
    rows = random_rows(size, ROWS, 24, seed=1)
    plan = make_plan(steps, bilevel=bool(theta))
    separate = _separate(engine, alternation, plan, rows) if theta else None
    losses = Losses()
    began = time.perf_counter()
    train(engine, alternation, plan, Data(rows, rows if theta else [], [], pad_id=0), losses)
    seconds = time.perf_counter() - began
    finding: dict[str, Any] = {
        "first_loss": round(losses.seen[0], 4),
        "last_loss": round(losses.seen[-1], 4),
        "ms_per_step": round(1000 * seconds / plan.optimizer_steps(steps), 2),
        "float32": all(p.dtype == torch.float32 for _, p in [*omega, *theta]) or method.name == "full",
    }
    if separate is not None:
        finding["moves_only_its_own"] = separate
    learns = math.isfinite(losses.seen[-1]) and losses.seen[-1] < losses.seen[0]
    good = learns and finding["float32"] and separate is not False
    return {"ok": good, **finding}


def make_plan(steps: int, bilevel: bool, batch: int = ROWS) -> TrainingPlan:
    """The numbers of a short run without validation."""
    return TrainingPlan(
        steps=steps,
        batch_size=batch,
        accumulation=1,
        lr=LR,
        theta_lr=1e-4,
        warmup=0.0,
        bilevel=bilevel,
        theta_every=1,
        validate_every=steps + 1,
        checkpoint_every=steps + 1,
        patience=steps,
        seed=0,
    )


def random_rows(size: ModelSize, count: int, length: int, seed: int) -> list[Mapping[str, Any]]:
    """Random prompts with random answers of ANSWER tokens."""
    made = prompts(size, count, length, seed)
    return [{"input_ids": ids, "prompt_len": length - ANSWER} for ids in made]


def _separate(engine: TorchEngine, alternation: Alternation, plan: TrainingPlan, rows: list[Mapping[str, Any]]) -> bool:
    """Whether an Ω step leaves Θ as it is, to the bit, and a Θ step Ω; and each moves something."""
    engine.mode(training=True)
    engine.optimizer.set_lr(LR, LR)
    roles = {p: group["role"] for group in engine.optimizer.param_groups for p in group["params"]}
    for role in (OMEGA, THETA):
        before = {p: p.detach().clone() for p in roles}
        alternation.activate(role)
        batch_step(engine, rows, plan, 0, salt=0)
        moved = {roles[p] for p in roles if not torch.equal(p, before[p])}
        if moved != {role}:
            return False
    return True
