"""The training loop: schedule, Ω step, Θ step, validate, checkpoint, report. torch only.

Knows nothing of Ray, DeepSpeed, MLflow or files of data: the engine, the rows and the reporter are handed in. Every
worker runs the same lines in the same order. All that is random or shuffled is a function of (seed, step), so a
resumed run is the uninterrupted run, to the bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch

from pedro.errors import TrainingError
from pedro.training.batches import (
    Rows,
    RowStream,
    passed_tokens,
    slices,
    supervised,
    supervised_tokens,
    tensors,
    token_loss,
)
from pedro.training.bilevel import OMEGA, THETA, Alternation, learning_rate
from pedro.training.engines import StepEngine
from pedro.training.team import Team

LOG_EVERY = 10  # steps between progress lines and looks at the loss (a look waits for the device)


@dataclass(frozen=True)
class Plan:
    """Everything the loop counts with. Steps are Ω steps; `validate_every` and `checkpoint_every` are never 0."""

    steps: int
    batch_size: int
    accumulation: int
    lr: float
    theta_lr: float
    warmup: float
    bilevel: bool
    theta_every: int
    validate_every: int
    checkpoint_every: int
    patience: int
    seed: int

    def optimizer_steps(self, steps: int) -> int:
        """Ω and Θ steps together, after `steps` Ω steps."""
        return steps + (steps // self.theta_every if self.bilevel else 0)


@dataclass(frozen=True)
class Data:
    """Rows of the splits; `theta` is empty where the method has no Θ, `validation` may be."""

    train: Rows
    theta: Rows
    validation: Rows
    pad_id: int


@dataclass
class Progress:
    """Where a run stands; with the engine's tensors and the best parameters this is the whole checkpoint."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0
    tokens: int = 0
    """Of answers, which the loss is taken of."""
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Outcome:
    """How a run ended. The engine's parameters are the best ones by then."""

    steps: int
    optimizer_steps: int
    best_step: int
    validation_loss: float | None
    tokens: int
    seconds: float
    stopped_early: bool
    validations: tuple[tuple[int, float], ...]


class Reporter(Protocol):
    """Where a run's news goes, and where it was when it was last interrupted."""

    def resume(self, engine: StepEngine, team: Team) -> tuple[Progress, Mapping[str, torch.Tensor]] | None:
        """Load the last checkpoint into the engine; None when there is none. The best parameters are on rank 0."""

    def checkpoint(self, engine: StepEngine, team: Team, progress: Progress, best: Mapping[str, torch.Tensor]) -> None:
        """Keep all that `resume` needs. Raises TrainingError on every worker if one cannot write."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the run's curves; called on rank 0 only."""

    def line(self, text: str) -> None:
        """One line for the person who waits; called on rank 0 only."""


def train(engine: StepEngine, alternation: Alternation, plan: Plan, data: Data, reporter: Reporter) -> Outcome:
    """Train until the plan's steps are done or validation stops improving; leave the best parameters in place.

    Raises TrainingError when the loss is not a number.
    """
    team = Team(engine.rank, engine.world)
    progress, best = reporter.resume(engine, team) or (Progress(), {})
    omega_rows = RowStream(data.train, plan.batch_size, plan.seed)
    theta_rows = RowStream(data.theta, plan.batch_size, plan.seed + 1) if plan.bilevel else None
    meter = Meter(plan, progress, engine.device)
    if progress.step and team.rank == 0:
        reporter.line(f"resumed at step {progress.step:,}/{plan.steps:,}")
    engine.mode(training=True)

    while progress.step < plan.steps and progress.without_gain < plan.patience:
        k = progress.step
        engine.optimizer.set_lr(
            learning_rate(k, plan.steps, plan.lr, plan.warmup), learning_rate(k, plan.steps, plan.theta_lr, plan.warmup)
        )
        alternation.activate(*((OMEGA,) if theta_rows else (OMEGA, THETA)))
        rows = omega_rows.batch(k)
        meter.omega(*batch_step(engine, rows, plan, data.pad_id, salt=2 * k), passed_tokens(rows))
        if theta_rows and (k + 1) % plan.theta_every == 0:
            alternation.activate(THETA)
            place = (k + 1) // plan.theta_every - 1
            rows = theta_rows.batch(place)
            meter.theta(*batch_step(engine, rows, plan, data.pad_id, salt=2 * k + 1), passed_tokens(rows))
        progress.step = k + 1
        if engine.companion:
            engine.companion.after_step(progress.step)
        last = progress.step == plan.steps

        if progress.step % LOG_EVERY == 0 or last:
            meter.look(team, reporter)
        if len(data.validation) and (progress.step % plan.validate_every == 0 or last):
            meter.look(team, reporter)
            loss = mean_loss(engine, data.validation, plan.batch_size, data.pad_id, team)
            best = judge(progress, loss, best, engine)
            meter.validated(loss, team, reporter)
            engine.mode(training=True)
        if progress.step % plan.checkpoint_every == 0 or last or progress.without_gain >= plan.patience:
            meter.look(team, reporter)
            reporter.checkpoint(engine, team, progress, best)

    alternation.activate(OMEGA, THETA)
    if len(data.validation):
        restore(engine, team, best)
    if engine.companion:
        engine.companion.finish()
    engine.mode(training=False)
    return Outcome(
        steps=progress.step,
        optimizer_steps=plan.optimizer_steps(progress.step),
        best_step=progress.best_step if len(data.validation) else progress.step,
        validation_loss=progress.best_loss if len(data.validation) else None,
        tokens=progress.tokens,
        seconds=progress.seconds,
        stopped_early=progress.step < plan.steps,
        validations=tuple((int(step), float(loss)) for step, loss in progress.validations),
    )


def batch_step(
    engine: StepEngine, rows: list[Mapping[str, Any]], plan: Plan, pad_id: int, salt: int
) -> tuple[torch.Tensor, int]:
    """One optimizer step on a batch of all workers; this worker's share of the mean loss, and the batch's tokens.

    The loss is the sum over answer tokens divided by the answer tokens of the whole batch, which every worker counts
    for itself: workers and slices add up to one worker's gradient, however unequal their answers are.
    """
    torch.manual_seed((plan.seed * 2_147_483_647 + salt) * 65_537 + engine.rank)  # dropout, if the method has any
    tokens = supervised_tokens(rows)
    total = torch.zeros((), device=engine.device)
    for part in slices(rows, engine.rank, engine.world, plan.accumulation):
        batch = tensors(part, pad_id, engine.device, filler=rows[0])
        positions, wanted = supervised(batch.pop("labels"))
        loss = token_loss(engine.forward(positions, **batch), wanted) / tokens
        total += loss.detach()
        if engine.companion and (penalty := engine.companion.penalty()) is not None:
            loss = loss + penalty / (engine.world * plan.accumulation)
        engine.backward(loss)
        engine.step()
    return total, tokens


@torch.no_grad()
def mean_loss(engine: StepEngine, rows: Rows, batch_size: int, pad_id: int, team: Team) -> float:
    """Mean loss per answer token over all rows; every worker takes a share and gets the same number."""
    engine.mode(training=False)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch_rows = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
        tokens += supervised_tokens(batch_rows)
        (part,) = slices(batch_rows, team.rank, team.world, 1)
        batch = tensors(part, pad_id, engine.device, filler=batch_rows[0])
        positions, wanted = supervised(batch.pop("labels"))
        total += token_loss(engine.forward(positions, **batch), wanted).double().cpu()
    (summed,) = team.sum([total.item()])
    return summed / tokens


def judge(
    progress: Progress, loss: float, best: Mapping[str, torch.Tensor], engine: StepEngine
) -> Mapping[str, torch.Tensor]:
    """Enter a validation into the progress; the parameters to keep, new ones if they are the best so far.

    While a method still changes its shape, no validation is the best and none counts against patience.
    """
    progress.validations.append((progress.step, loss))
    if engine.companion and not engine.companion.settled(progress.step):
        return best
    if not loss < progress.best_loss:
        progress.without_gain += 1
        return best
    progress.best_loss, progress.best_step, progress.without_gain = loss, progress.step, 0
    with engine.gathered():
        if engine.rank == 0:
            return {name: parameter.detach().cpu().clone() for name, parameter in engine.parameters}
    return {}


@torch.no_grad()
def restore(engine: StepEngine, team: Team, best: Mapping[str, torch.Tensor]) -> None:
    """Put rank 0's best parameters in place on every worker."""
    with engine.gathered():
        for name, parameter in engine.parameters:
            if team.rank == 0:
                parameter.data.copy_(best[name])
            team.broadcast(parameter.data)


class Meter:
    """Adds up losses on the device and looks at them now and then: progress line, curves, and is it a number."""

    def __init__(self, plan: Plan, progress: Progress, device: torch.device) -> None:
        self.plan, self.progress, self.device = plan, progress, device
        self._clock, self._started = time.monotonic(), progress.step
        self._spent = 0.0
        self._last_dev: float | None = progress.validations[-1][1] if progress.validations else None
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)
        self._counts, self._passed, self._answers, self._since = [0, 0], 0, 0, time.monotonic()

    def omega(self, loss: torch.Tensor, answers: int, passed: int) -> None:
        """A step on Ω: its loss, and how many tokens of answers and of all were in its batch."""
        self._add(0, loss, answers, passed)

    def theta(self, loss: torch.Tensor, answers: int, passed: int) -> None:
        self._add(1, loss, answers, passed)

    def _add(self, which: int, loss: torch.Tensor, answers: int, passed: int) -> None:
        self._sums[which] += loss.double()
        self._counts[which] += 1
        self._passed += passed
        self._answers += answers
        self.progress.tokens += answers

    def look(self, team: Team, reporter: Reporter) -> None:
        """Report the mean losses since the last look. Raises TrainingError on every worker if one is no number."""
        if not self._counts[0]:
            return
        omega, theta = team.sum(self._sums.tolist())
        loss = omega / self._counts[0]
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now
        if not math.isfinite(omega + theta):
            raise TrainingError(
                f"training: the loss is {omega + theta} at step {self.progress.step}; lower training.lr "
                f"({self.plan.lr:g}) or training.clip, or look at the answers of the training data",
                param="training.lr",
            )
        if team.rank == 0:
            took = max(1e-9, now - self._since)
            speed, answers = self._passed / took, self._answers / took
            values = {"train/loss": loss, "train/tokens_per_second": speed, "train/lr": self._lr()}
            values["train/answer_tokens_per_second"] = answers
            if self._counts[1]:
                values["train/theta_loss"] = theta / self._counts[1]
            reporter.metrics(self.progress.step, values)
            reporter.line(self._line(loss, speed, answers, now))
        self._clear()

    def validated(self, loss: float, team: Team, reporter: Reporter) -> None:
        """Report a validation; its time counts as training time but not against tokens per second."""
        now = time.monotonic()
        self.progress.seconds += now - self._clock
        self._clock = now
        self._last_dev = loss
        if team.rank == 0:
            reporter.metrics(self.progress.step, {"dev/loss": loss})
            better = "best so far" if self.progress.best_step == self.progress.step else "no better"
            reporter.line(f"step {self.progress.step:,}/{self.plan.steps:,} · dev {loss:.3f} · {better}")
        self._clear()

    def _lr(self) -> float:
        return learning_rate(self.progress.step - 1, self.plan.steps, self.plan.lr, self.plan.warmup)

    def _line(self, loss: float, speed: float, answers: float, now: float) -> str:
        done = self.progress.step - self._started
        self._spent += now - self._since
        left = self._spent / max(1, done) * (self.plan.steps - self.progress.step)
        dev = f" · dev {self._last_dev:.3f}" if self._last_dev is not None else ""
        step = f"step {self.progress.step:,}/{self.plan.steps:,} · loss {loss:.3f}{dev}"
        rate = f"{speed:,.0f} tokens/s ({answers:,.0f} of answers)"
        return f"{step} · {rate} · {int(left) // 60}:{int(left) % 60:02d} left"
