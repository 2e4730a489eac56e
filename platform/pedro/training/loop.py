"""The training loop: schedule, Ω step, Θ step, validate, checkpoint, report. torch only.

Imports neither Ray, DeepSpeed nor MLflow and opens no file: engine, rows and reporter are parameters. Every worker runs
the same code in the same order. All randomness and shuffling is a function of (seed, step), so a resumed run equals the
uninterrupted run, bit for bit.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from pedro.errors import TrainingError
from pedro.training.batches import ANSWERS, Objective, Rows, RowStream, fetch, passed_tokens, slices, supervised_tokens
from pedro.training.bilevel import OMEGA, THETA, Alternation, learning_rate
from pedro.training.progress import clock
from pedro.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from pedro.training.engines import StepEngine

SECONDS_LEFT = "train/seconds_left"
LOG_EVERY = 10  # steps between progress lines and reads of the loss (which synchronise with the device)


@dataclass(frozen=True)
class TrainingPlan:
    """The numbers of one training. Steps are Ω steps; `validate_every` and `checkpoint_every` are never 0."""

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
    objective: Objective = ANSWERS

    def optimizer_steps(self, steps: int) -> int:
        """Ω plus Θ steps after `steps` Ω steps."""
        return steps + (steps // self.theta_every if self.bilevel else 0)


@dataclass(frozen=True)
class Data:
    """Rows of the splits; `theta` is empty if the method has no Θ, `validation` may be empty."""

    train: Rows
    theta: Rows
    validation: Rows
    pad_id: int


@dataclass
class TrainState:
    """The state of a run; together with the engine's tensors and the best parameters this is the whole checkpoint."""

    step: int = 0
    best_loss: float = math.inf
    best_step: int = 0
    without_gain: int = 0
    tokens: int = 0
    """Of answers, over which the loss is computed."""
    all_tokens: int = 0
    """Of prompts and answers: everything processed, excluding padding."""
    samples: int = 0
    """Rows, counted each time they are read."""
    seconds: float = 0.0
    validations: list[tuple[int, float]] = field(default_factory=list)
    told: dict[str, float] = field(default_factory=dict)
    """The last loss and metrics of training (`train/…`) and of validation (`dev/…`)."""
    best_told: dict[str, float] = field(default_factory=dict)
    """The same at the best validation."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class TrainingOutcome:
    """The result of a run. The engine then has the best parameters."""

    steps: int
    optimizer_steps: int
    best_step: int
    validation_loss: float | None
    tokens: int
    """Of answers."""
    all_tokens: int
    samples: int
    seconds: float
    stopped_early: bool
    validations: tuple[tuple[int, float], ...]
    told: Mapping[str, float] = field(default_factory=dict)
    """Loss and metrics of training and validation at the best step, by curve name."""


class Reporter(Protocol):
    """Receives metrics, progress lines and checkpoints of a run, and loads the last checkpoint of an interrupted
    one."""

    def resume(self, engine: StepEngine, group: WorkerGroup) -> tuple[TrainState, Mapping[str, torch.Tensor]] | None:
        """Load the last checkpoint into the engine; None if there is none. The best parameters are on rank 0."""

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        """Store everything that `resume` needs. Raises TrainingError on every worker if one cannot write."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the run's curves; called on rank 0 only."""

    def line(self, text: str) -> None:
        """One line for users who follow the job; called on rank 0 only."""


def train(
    engine: StepEngine, alternation: Alternation, plan: TrainingPlan, data: Data, reporter: Reporter
) -> TrainingOutcome:
    """Train until the plan's steps are done or validation stops improving; leave the best parameters in place.

    Raises TrainingError if the loss is NaN or infinite.
    """
    group = WorkerGroup(engine.rank, engine.world)
    state, best = reporter.resume(engine, group) or (TrainState(), {})
    omega_rows = RowStream(data.train, plan.batch_size, plan.seed)
    theta_rows = RowStream(data.theta, plan.batch_size, plan.seed + 1) if plan.bilevel else None
    logger = MetricsLogger(plan, state, engine)
    if state.step and group.rank == 0:
        reporter.line(f"resumed at step {state.step:,}/{plan.steps:,}")
    engine.mode(training=True)

    while state.step < plan.steps and state.without_gain < plan.patience:
        k = state.step
        engine.optimizer.set_lr(
            learning_rate(k, plan.steps, plan.lr, plan.warmup), learning_rate(k, plan.steps, plan.theta_lr, plan.warmup)
        )
        alternation.activate(*((OMEGA,) if theta_rows else (OMEGA, THETA)))
        rows = omega_rows.batch(k)
        logger.omega(batch_step(engine, rows, plan, data.pad_id, salt=2 * k), rows)
        if theta_rows and (k + 1) % plan.theta_every == 0:
            alternation.activate(THETA)
            theta_step = (k + 1) // plan.theta_every - 1
            rows = theta_rows.batch(theta_step)
            logger.theta(batch_step(engine, rows, plan, data.pad_id, salt=2 * k + 1), rows)
        state.step = k + 1
        if engine.hook:
            engine.hook.after_step(state.step)
        last = state.step == plan.steps

        if state.step % LOG_EVERY == 0 or last:
            logger.log(group, reporter)
        if len(data.validation) and (state.step % plan.validate_every == 0 or last):
            logger.log(group, reporter)
            means = mean_losses(
                engine, data.validation, plan.batch_size, data.pad_id, group, plan.objective, plan.accumulation
            )
            best = keep_best(state, means[0], best, engine)
            logger.validated(means, group, reporter)
            engine.mode(training=True)
        if state.step % plan.checkpoint_every == 0 or last or state.without_gain >= plan.patience:
            logger.log(group, reporter)
            reporter.checkpoint(engine, group, state, best)

    alternation.activate(OMEGA, THETA)
    if len(data.validation):
        restore(engine, group, best)
    if engine.hook:
        engine.hook.finish()
    engine.mode(training=False)
    return TrainingOutcome(
        steps=state.step,
        optimizer_steps=plan.optimizer_steps(state.step),
        best_step=state.best_step if len(data.validation) else state.step,
        validation_loss=state.best_loss if len(data.validation) else None,
        tokens=state.tokens,
        all_tokens=state.all_tokens,
        samples=state.samples,
        seconds=state.seconds,
        stopped_early=state.step < plan.steps,
        validations=tuple((int(step), float(loss)) for step, loss in state.validations),
        told=state.best_told if len(data.validation) else state.told,
    )


def batch_step(
    engine: StepEngine, rows: list[Mapping[str, Any]], plan: TrainingPlan, pad_id: int, salt: int
) -> tuple[torch.Tensor, int]:
    """One optimizer step on a batch of all workers. Returns this worker's share of the mean loss, followed by the
    objective's metrics, and the answer tokens of the batch.

    The loss is the sum over answer tokens (or pairs) divided by their number in the whole batch, which every worker
    counts itself: workers and slices add up to a single worker's gradient, however unequal their answers are.
    """
    seed_numbers(engine.device, (plan.seed * 2_147_483_647 + salt) * 65_537 + engine.rank)
    objective = plan.objective
    weight = objective.weight(rows)
    total = torch.zeros(1 + len(objective.measures), device=engine.device)
    for part in slices(rows, engine.rank, engine.world, plan.accumulation):
        loss, measures = objective.sums(engine, part, pad_id, filler=rows[0])
        loss = loss / weight
        total += torch.cat([loss.detach()[None], measures / weight])
        if engine.hook and (penalty := engine.hook.penalty()) is not None:
            loss = loss + penalty / (engine.world * plan.accumulation)
        engine.backward(loss)
        engine.step()
    return total, supervised_tokens(objective.sequences(rows))


def seed_numbers(device: torch.device, seed: int) -> None:
    """Seed a device's random numbers, for dropout, if the method has any. On a CPU not by `torch.manual_seed`, which
    keeps the stack, as text, for each kind of accelerator that might be used later."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    else:
        torch.manual_seed(seed)


@torch.no_grad()
def mean_losses(
    engine: StepEngine,
    rows: Rows,
    batch_size: int,
    pad_id: int,
    group: WorkerGroup,
    objective: Objective = ANSWERS,
    accumulation: int = 1,
) -> list[float]:
    """Mean loss over all rows, then the means of the objective's metrics; every worker processes a share and gets the
    same numbers. Rows of similar length share a batch, to reduce padding. Batches are sliced as in training, so that
    the longest rows need no more memory than a training step on them."""
    engine.mode(training=False)
    by_length = sorted(fetch(rows, range(len(rows))), key=lambda row: len(row["input_ids"]))
    total, weight = torch.zeros(1 + len(objective.measures), dtype=torch.float64), 0
    for start in range(0, len(rows), batch_size):
        batch_rows = by_length[start : start + batch_size]
        weight += objective.weight(batch_rows)
        for part in slices(batch_rows, group.rank, group.world, accumulation):
            loss, measures = objective.sums(engine, part, pad_id, filler=batch_rows[0])
            total += torch.cat([loss[None], measures]).double().cpu()
    return [summed / weight for summed in group.sum(total.tolist())]


def keep_best(
    state: TrainState, loss: float, best: Mapping[str, torch.Tensor], engine: StepEngine
) -> Mapping[str, torch.Tensor]:
    """Add a validation to the train state. Returns the parameters to keep: the current ones if they are the best so
    far.

    While a method still changes its shape, no validation counts as best or against patience.
    """
    state.validations.append((state.step, loss))
    if engine.hook and not engine.hook.settled(state.step):
        return best
    if not loss < state.best_loss:
        state.without_gain += 1
        return best
    state.best_loss, state.best_step, state.without_gain = loss, state.step, 0
    with engine.gathered():
        if engine.rank == 0:
            return {name: parameter.detach().cpu().clone() for name, parameter in engine.parameters}
    return {}


@torch.no_grad()
def restore(engine: StepEngine, group: WorkerGroup, best: Mapping[str, torch.Tensor]) -> None:
    """Load rank 0's best parameters on every worker."""
    with engine.gathered():
        for name, parameter in engine.parameters:
            if group.rank == 0:
                parameter.data.copy_(best[name])
            group.broadcast(parameter.data)


class MetricsLogger:
    """Accumulates losses on the device and logs them periodically: progress line, curves, and a check for NaN."""

    def __init__(self, plan: TrainingPlan, state: TrainState, engine: StepEngine) -> None:
        self.plan, self.state, self.device = plan, state, engine.device
        self._names = plan.objective.measures
        self._clock, self._started = engine.clock, state.step
        self._read = self._clock()
        self._spent = 0.0
        self._last_dev: float | None = state.validations[-1][1] if state.validations else None
        self._clear()

    def _clear(self) -> None:
        self._sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # of Ω and of Θ
        self._measures = torch.zeros(len(self._names), dtype=torch.float64, device=self.device)
        self._counts, self._since = [0, 0], time.monotonic()
        self._before = (self.state.all_tokens, self.state.tokens, self.state.samples)

    def omega(self, step: tuple[torch.Tensor, int], rows: Sequence[Mapping[str, Any]]) -> None:
        """Add a step on Ω: its loss and answer tokens, as returned by `batch_step`, and the rows of its batch."""
        self._add(0, step, rows)
        self._measures += step[0][1:].double()

    def theta(self, step: tuple[torch.Tensor, int], rows: Sequence[Mapping[str, Any]]) -> None:
        self._add(1, step, rows)

    def _add(self, which: int, step: tuple[torch.Tensor, int], rows: Sequence[Mapping[str, Any]]) -> None:
        sums, answers = step
        self._sums[which] += sums[0].double()
        self._counts[which] += 1
        self.state.tokens += answers
        self.state.all_tokens += passed_tokens(self.plan.objective.sequences(rows))
        self.state.samples += len(rows)

    def log(self, group: WorkerGroup, reporter: Reporter) -> None:
        """Log the mean losses since the last call. Raises TrainingError on every worker if one is NaN or infinite."""
        if not self._counts[0]:
            return
        omega, theta, *measures = group.sum([*self._sums.tolist(), *self._measures.tolist()])
        loss = omega / self._counts[0]
        told = {name: value / self._counts[0] for name, value in zip(self._names, measures, strict=True)}
        now = time.monotonic()
        self._count_seconds()
        if not math.isfinite(omega + theta):
            raise TrainingError(
                f"training: the loss is {omega + theta} at step {self.state.step}; lower training.lr "
                f"({self.plan.lr:g}) or training.clip, or check the answers in the training data",
                param="training.lr",
            )
        means = {"train/loss": loss, **{f"train/{name}": value for name, value in told.items()}}
        self.state.told |= means
        if group.rank == 0:
            took = max(1e-9, now - self._since)
            now_at = (self.state.all_tokens, self.state.tokens, self.state.samples)
            speed, answers, samples = ((at - before) / took for at, before in zip(now_at, self._before, strict=True))
            values = {**means, "train/tokens_per_second": speed, "train/lr": self._lr()}
            values |= {"train/answer_tokens_per_second": answers, "train/samples_per_second": samples}
            if self._counts[1]:
                values["train/theta_loss"] = theta / self._counts[1]
            values[SECONDS_LEFT] = self._left(now)
            reporter.metrics(self.state.step, values)
            rate = f"{speed:,.0f} tokens/s ({answers:,.0f} of answers), {samples:,.1f} samples/s"
            reporter.line(self._line(f"loss {loss:.3f}{_first(told)}", rate, values[SECONDS_LEFT]))
        self._clear()

    def validated(self, means: Sequence[float], group: WorkerGroup, reporter: Reporter) -> None:
        """Report a validation, loss and metrics; its time counts as training time, but not for tokens per second."""
        self._count_seconds()
        told = dict(zip(("loss", *self._names), means, strict=True))
        values = {f"dev/{name}": value for name, value in told.items()}
        loss = self._last_dev = told.pop("loss")
        self.state.told |= values
        if self.state.best_step == self.state.step:
            self.state.best_told = dict(self.state.told)
        if group.rank == 0:
            reporter.metrics(self.state.step, values)
            better = "best so far" if self.state.best_step == self.state.step else "no better"
            reporter.line(f"step {self.state.step:,}/{self.plan.steps:,} · dev {loss:.3f}{_first(told)} · {better}")
        self._clear()

    def _count_seconds(self) -> None:
        read = self._clock()
        self.state.seconds += read - self._read
        self._read = read

    def _lr(self) -> float:
        return learning_rate(self.state.step - 1, self.plan.steps, self.plan.lr, self.plan.warmup)

    def _left(self, now: float) -> float:
        """Seconds until the last step, at the speed so far, without validations."""
        self._spent += now - self._since
        return self._spent / max(1, self.state.step - self._started) * (self.plan.steps - self.state.step)

    def _line(self, loss: str, rate: str, left: float) -> str:
        dev = f" · dev {self._last_dev:.3f}" if self._last_dev is not None else ""
        step = f"step {self.state.step:,}/{self.plan.steps:,} · {loss}{dev}"
        return f"{step} · {rate} · {clock(left)} left"


def _first(measures: Mapping[str, float]) -> str:
    """The first of the metrics, as shown in progress lines; empty if there is none."""
    return next((f" ({name.replace('_', ' ')} {value:.3f})" for name, value in measures.items()), "")
