"""Times real steps of a job in this process, so that a dry run need not assume a speed. Limited in time; trains
nothing.

The first step uses the longest rows, which shows a step's peak memory; then at least two steps on rows in order are
timed. Parts for which no time is left are skipped and derived from the steps.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.process import peak_memory, release_freed_memory, reset_peak_memory, resident_memory
from pedro.training.memory import BYTES

if TYPE_CHECKING:
    from pedro.training.batches import RowStream
    from pedro.training.spec import FineTuneSpec

BOUND_S = 60.0
STEPS, FEW_SECONDS, MOST_STEPS = 2, 0.5, 10  # at least this many steps are timed, more if they are short
SCORED_ROWS = 32  # timed at most: a batch
MOST_PARAMETERS = 1_000_000_000  # timed on a CPU at most
LOADING, TRAINED_BYTES = 1.5, 12  # peak of loading, relative to the weights; bytes of a gradient and two moments
ROOM = 0.7  # of the free memory; the rest is for activations
FORWARD_SHARE = 0.5  # of a step with a frozen backbone: as much again goes backward


@dataclass(frozen=True)
class Calibration:
    """Measurements: seconds per step (with Θ's share), per validated and per scored row, and bytes.

    `activation_bytes` is what a step on the longest rows needed besides parameters, gradients and optimizer state, or
    the temporary memory of loading if that is more; None if the system does not report it.
    """

    per_step: float
    per_validated: float
    per_scored: float
    activation_bytes: int | None
    steps: int
    rows: int
    """Rows of a timed step; if fewer than in a batch, `per_step` is scaled up."""


def calibrate(  # noqa: PLR0913
    spec: FineTuneSpec,
    cache: Path,
    batch_size: int,
    *,
    parameters: int,
    trained: int,
    row_s: float,
    bound_s: float = BOUND_S,
    in_pieces: bool = False,
    held: int | None = None,
) -> Calibration | str:
    """Measure, or return why that is impossible.

    Here the backbone is loaded whole; `in_pieces` says that the job's workers do not, so its memory is not counted for
    them. `parameters` is the size of the model with its adapter, `trained` how many are trained; `held` is the size in
    bytes of a backbone that is loaded in 8 or 4 bit; `row_s` is an estimate of a row's share of a step, by which
    batches that would take too long are reduced.
    """
    import torch

    from pedro.process import available_memory, set_torch_threads

    on_gpu = spec.resources.gpus_per_worker > 0
    if on_gpu and not torch.cuda.is_available():
        return "there is no GPU here"
    if not on_gpu and parameters > MOST_PARAMETERS:
        return f"{parameters / 1e9:.1f} billion parameters are too many to time on a CPU"
    weights = parameters * BYTES[spec.training.precision] if held is None else held
    needed = int(LOADING * weights) + TRAINED_BYTES * trained
    free = available_memory()
    if free is not None and needed > ROOM * free:
        return f"it needs {needed / 1e9:.1f} GB, more than the {free / 1e9:.1f} GB that are free here"
    share = max(1, batch_size // spec.resources.workers)
    rows = max(1, min(share, int(bound_s / 2 / (4 * row_s)))) if row_s > 0 else share
    threads = torch.get_num_threads()
    set_torch_threads(max(1, int(spec.resources.cpus_per_worker)))
    try:
        return _Calibrator(_alone(spec, rows), cache, share, bound_s, in_pieces).measure()
    finally:
        set_torch_threads(threads)


def _alone(spec: FineTuneSpec, rows: int) -> FineTuneSpec:
    """One worker's share of the job, or less, run in this process."""
    accumulation = min(spec.training.gradient_accumulation, rows)
    return spec.model_copy(
        update={
            "resources": spec.resources.model_copy(update={"workers": 1, "zero_stage": 0}),
            "training": spec.training.model_copy(update={"batch_size": rows, "gradient_accumulation": accumulation}),
        }
    )


class _Calibrator:
    """One measurement. `share` is the number of rows of a batch per worker, of which the data may have fewer."""

    def __init__(self, spec: FineTuneSpec, cache: Path, share: int, bound_s: float, in_pieces: bool) -> None:
        from pedro.training.context import build_context

        self._share, self._end = share, time.perf_counter() + bound_s
        self._told = reset_peak_memory()
        before = resident_memory()
        self.context = build_context(spec, cache)
        self._loading = peak_memory() - resident_memory() if self._told and before and not in_pieces else 0
        self._on_gpu = self.context.engine.device.type == "cuda"

    def measure(self) -> Calibration | str:
        from pedro.training.batches import RowStream
        from pedro.training.bilevel import OMEGA, THETA

        context, plan, data = self.context, self.context.plan, self.context.data
        rows = plan.batch_size
        if self._spent():
            return "loading the backbone took all the time"
        context.engine.mode(training=True)
        roles = ((OMEGA, data.train, 1.0), (THETA, data.theta, 1 / plan.theta_every))[: 1 + plan.bilevel]
        activations = self._longest(rows, OMEGA if plan.bilevel else None)
        per_step, timed = 0.0, 0
        for role, split, turns in roles:
            self._activate(role if plan.bilevel else None)
            if timed and self._spent():
                per_step *= 1 + turns
                continue
            seconds, count = self._timed(RowStream(split, rows, 0))
            per_step, timed = per_step + turns * seconds, timed + count
        scale = self._share / rows
        forward = FORWARD_SHARE * per_step / rows
        validated = self._validated(rows, forward)
        return Calibration(
            per_step=per_step * scale,
            per_validated=validated,
            per_scored=self._scored(forward) if self.context.spec.beta is None else validated / 2,  # a pass of two
            activation_bytes=None if activations is None else max(int(activations * scale), self._loading),
            steps=timed,
            rows=rows,
        )

    def _spent(self) -> bool:
        return time.perf_counter() > self._end

    def _activate(self, role: str | None) -> None:
        from pedro.training.bilevel import OMEGA, THETA

        self.context.alternation.activate(*((role,) if role else (OMEGA, THETA)))

    def _step(self, rows: list[Any], salt: int) -> None:
        from pedro.training.loop import batch_step

        batch_step(self.context.engine, rows, self.context.plan, self.context.data.pad_id, salt=salt)
        self._wait()

    def _wait(self) -> None:
        if self._on_gpu:
            import torch

            torch.cuda.synchronize()

    def _longest(self, count: int, role: str | None) -> int | None:
        """A step on the longest rows; returns its temporary memory."""
        import torch

        train = self.context.data.train
        sequences = self.context.plan.objective.sequences
        order = sorted(
            range(min(len(train), 5000)),
            key=lambda place: -max(len(row["input_ids"]) for row in sequences([train[place]])),
        )
        self._activate(role)
        self._step([train[order[-1]]] * max(1, self.context.plan.accumulation), 0)  # after one-time allocations
        longest = [train[place] for place in order[:count]]
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self._step(longest, 0)
            return int(torch.cuda.max_memory_allocated() - before)
        release_freed_memory()
        told = reset_peak_memory()
        before = resident_memory()
        self._step(longest, 0)
        return max(0, peak_memory() - before) if told and before else None

    def _timed(self, stream: RowStream) -> tuple[float, int]:
        """Mean seconds per step on the stream's batches, and how many were timed."""
        started, count = time.perf_counter(), 0
        while count < STEPS or (count < MOST_STEPS and time.perf_counter() - started < FEW_SECONDS):
            if count and self._spent():
                break
            count += 1
            self._step(stream.batch(count), count)
        return (time.perf_counter() - started) / count, count

    def _validated(self, rows: int, forward: float) -> float:
        from pedro.training.loop import mean_losses
        from pedro.training.worker_group import ALONE

        data, plan = self.context.data, self.context.plan
        if not len(data.validation) or self._spent():
            return forward
        some = [data.validation[place] for place in range(min(len(data.validation), rows))]
        started = time.perf_counter()
        mean_losses(self.context.engine, some, rows, data.pad_id, ALONE, plan.objective, plan.accumulation)
        return (time.perf_counter() - started) / len(some)

    def _scored(self, forward: float) -> float:
        """Seconds to generate a row's answer and compute its loss."""
        _, scored = self.context.scored_rows()
        if scored is None:
            return 0.0
        count = min(len(scored), SCORED_ROWS)
        if not count or self._spent():
            return 3 * forward
        self.context.engine.mode(training=False)
        first = self._score_s([scored[0]])  # one-time allocations are done after it
        left = self._end - time.perf_counter()
        count = max(1, min(count, int(left / first) if first > 0 else count))
        return self._score_s([scored[place] for place in range(count)]) / count

    def _score_s(self, rows: list[Any]) -> float:
        from pedro.evaluation.scoring import score

        started = time.perf_counter()
        score(self.context.model, self.context.tokenizer, rows)
        self._wait()
        return time.perf_counter() - started
