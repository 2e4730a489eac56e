"""One run of a comparison: train by the one loop, answer the test rows, score. Neither Ray nor files are needed."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.backbone import resolve_backbone
from pedro.comparison.forgetting import AbilityMeter
from pedro.comparison.kept_rows import AnsweredTask, answered
from pedro.comparison.result_model import CAP, EARLY, SCHEMA, RunResult
from pedro.comparison.serving_probe import probe_serving
from pedro.data.prompt_format import encode_prompts
from pedro.data.tasks import TASKS, Task, TaskRow
from pedro.errors import PedroError
from pedro.evaluation.metrics import ELSEWHERE, score_answers
from pedro.evaluation.scoring import generate, majority
from pedro.process import peak_memory, reset_peak_memory
from pedro.provenance import provenance
from pedro.training.context import TrainingContext, build_context
from pedro.training.loop import TrainState, train
from pedro.training.spec import FineTuneSpec

if TYPE_CHECKING:
    import torch

    from pedro.comparison.data import TaskData, TestSet
    from pedro.comparison.run_planner import PlannedRun
    from pedro.comparison.spec_sections import JudgeSpec, RunResources
    from pedro.training.engines import StepEngine
    from pedro.training.worker_group import WorkerGroup

Keep = Callable[[AnsweredTask], None]


class CurveRecorder:
    """A reporter that keeps the curves and nothing else: runs are short, and start again when they are interrupted."""

    def __init__(self) -> None:
        self.points: dict[str, list[list[float]]] = defaultdict(list)

    def resume(self, engine: StepEngine, group: WorkerGroup) -> None:
        return None

    def checkpoint(
        self, engine: StepEngine, group: WorkerGroup, state: TrainState, best: Mapping[str, torch.Tensor]
    ) -> None:
        """Nothing is kept."""

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        for name in ("train/loss", "dev/loss"):
            if name in values:
                self.points[name].append([step, round(values[name], 5)])

    def line(self, text: str) -> None:
        """Nobody reads it: many runs go at once."""


def execute_run(
    plan: PlannedRun,
    data: TaskData,
    resources: RunResources,
    judge: JudgeSpec | None,
    cache: Path,
    keep: Keep = lambda _rows: None,
) -> RunResult:
    """Train and score; a run that cannot be trained (it diverges, or its options do not fit) is a failed run.

    `keep` is told the rows behind each score.
    """
    if plan.group.untrained:
        return _ask_backbone(plan, data, resources, keep)
    curves = CurveRecorder()
    try:
        meter = _meter(plan, data)
        job = _job(plan, data, resources)
        before = meter.bare(job.training, _device(resources)) if meter else None
        _reset_peak()
        context = build_context(job, cache)
        outcome = train(context.engine, context.alternation, context.plan, context.data, curves)
        context.model.eval()
        started = time.monotonic()
        validation = _validation(context, plan, data, outcome.validation_loss)
        scores = [_score(context, plan, test, judge, cache, keep) for test in data.tests]
        spent = time.monotonic() - started
        peak = _peak(context.engine.device.type == "cuda")
        measured: dict[str, Any] = {"forgetting": meter.changed(before, context.model)} if meter and before else {}
        if plan.serving:
            measured |= probe_serving(context, plan.serving, max(1, int(resources.cpus)))
    except PedroError as error:
        return failed(plan, error.message, dict(curves.points))
    trained = [parameter for parameter in context.model.parameters() if parameter.requires_grad]
    return _result(
        plan,
        state="finished",
        scores=[score for score in scores if score],
        validation=validation,
        trainable_parameters=context.trainable_parameters,
        trainable_without_bias=_without_bias(context),
        adapter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in trained),
        steps=outcome.steps,
        optimizer_steps=outcome.optimizer_steps,
        best_step=outcome.best_step,
        ended_by=EARLY if outcome.stopped_early else CAP,
        prompt_format=context.prepared.format.id,
        tokens=outcome.tokens,
        all_tokens=outcome.all_tokens,
        samples=outcome.samples,
        seconds=round(outcome.seconds, 2),
        scoring_seconds=round(spent, 2),
        tokens_per_second=_rate(outcome.all_tokens, outcome.seconds),
        answer_tokens_per_second=_rate(outcome.tokens, outcome.seconds),
        samples_per_second=_rate(outcome.samples, outcome.seconds),
        peak_memory_bytes=peak,
        **measured,
        curves=dict(curves.points),
        activations=_activations(context),
        provenance=provenance(),
    )


def _ask_backbone(plan: PlannedRun, data: TaskData, resources: RunResources, keep: Keep) -> RunResult:
    """The score of the backbone itself."""
    from pedro.comparison.untrained_run import BackboneAsker

    started = time.monotonic()
    _reset_peak()
    try:
        asker = BackboneAsker(plan, resources)
        scores = [_scored(test, rows, answers, keep) for test, rows, answers in asker.answers(data)]
    except PedroError as error:
        return failed(plan, error.message)
    return _result(
        plan,
        state="finished",
        scores=scores,
        prompt_format=asker.encoder.form.id,
        scoring_seconds=round(time.monotonic() - started, 2),
        peak_memory_bytes=_peak(bool(resources.gpus)),
        provenance=provenance(),
    )


def _meter(plan: PlannedRun, data: TaskData) -> AbilityMeter | None:
    """What tells how much was forgotten, where that is asked for."""
    if plan.forgetting is None:
        return None
    return AbilityMeter(resolve_backbone(plan.group.backbone), plan.forgetting, data.general)


def _device(resources: RunResources) -> str:
    import torch

    return "cuda" if resources.gpus and torch.cuda.is_available() else "cpu"


def _rate(count: int, seconds: float) -> float:
    return round(count / max(seconds, 1e-9), 1)


def failed(plan: PlannedRun, message: str, curves: Mapping[str, Any] | None = None) -> RunResult:
    """The result of a run that gave no model."""
    return _result(plan, state="failed", message=message, curves=dict(curves or {}), provenance=provenance())


def _result(plan: PlannedRun, **fields: Any) -> RunResult:
    group = plan.group
    return RunResult.from_dict(
        {
            "schema": SCHEMA,
            "id": plan.id,
            "stage": plan.stage,
            "comparison": plan.comparison,
            "method": group.method,
            "label": group.label,
            "options": plan.options,
            "task": group.task,
            "wording": plan.wording,
            "title": TASKS[group.task].title,
            "backbone": group.backbone,
            "budget": group.budget,
            "seed": plan.seed,
            "lr": plan.lr,
            "training": plan.training,
            "searched": plan.searched,
            "message": "",
            **fields,
        }
    )


def _job(plan: PlannedRun, data: TaskData, resources: RunResources) -> FineTuneSpec:
    """The run as a fine-tuning job, which is what the loop and its preparation understand."""
    train, validation = data.chats if plan.chat and data.chats else data.files
    return FineTuneSpec.model_validate(
        {
            "tenant": "comparison",
            "adapter": plan.group.method,
            "backbone": plan.group.backbone,
            "data": {"train": train, "validation": validation, "theta": plan.theta},
            "method": {"name": plan.group.method, **plan.options},
            "training": plan.training,
            "resources": {"cpus_per_worker": resources.cpus, "gpus_per_worker": resources.gpus},
        }
    )


def _validation(context: TrainingContext, plan: PlannedRun, data: TaskData, loss: float | None) -> dict[str, Any]:
    """The task's own metric on the validation rows; minus the loss, where it has none for answers."""
    if data.task.metric in ELSEWHERE:
        value = None if loss is None else -loss
        return {"metric": "loss", "value": value, "loss": loss, "rows": len(data.validation_rows)}
    rows, prompts = _fitting(context, data.task, data.validation_rows)
    result = score_answers(data.task, rows, _answers(context, plan, data.task, prompts))
    return {"metric": data.task.metric, "value": result.value, "loss": loss, "rows": result.rows}


def _score(
    context: TrainingContext, plan: PlannedRun, test: TestSet, judge: JudgeSpec | None, cache: Path, keep: Keep
) -> dict[str, Any] | None:
    """The score on a test set; None for a task that has no metric of its own (Alpaca)."""
    if test.task.metric == "judge":
        from pedro.comparison.judged import judged_score

        return judged_score(context, plan, test, judge, cache)
    if test.task.metric in ELSEWHERE:
        return None
    rows, prompts = _fitting(context, test.task, test.rows)
    return _scored(test, rows, _answers(context, plan, test.task, prompts), keep)


def _scored(test: TestSet, rows: list[TaskRow], answers: list[str], keep: Keep) -> dict[str, Any]:
    """As a result holds it."""
    result = score_answers(test.task, rows, answers)
    keep(answered(test.task.name, rows, answers, result.per_row))
    guess = majority(row.completion for row in rows)
    return {
        **{key: value for key, value in result.to_dict().items() if key != "per_row"},
        "per_row": [round(value, 4) for value in result.per_row],
        "majority": score_answers(test.task, rows, [guess] * len(rows)).value,
        "left_out": len(test.rows) - len(rows),
    }


def _fitting(context: TrainingContext, task: Task, rows: Sequence[TaskRow]) -> tuple[list[TaskRow], list[list[int]]]:
    """The rows whose prompt fits, as in training, and their prompts' token ids."""
    from pedro.backbone import context_length

    room = context_length(context.backbone) - task.max_new_tokens
    form = context.prepared.format
    prompts = encode_prompts(context.tokenizer, [form.prompt(row.messages, context.tokenizer) for row in rows])
    kept = [index for index, ids in enumerate(prompts) if len(ids) < context.prepared.max_length and len(ids) <= room]
    if not kept:
        raise PedroError(f"{task.name}: no test prompt fits into {context.prepared.max_length} tokens")
    return [rows[index] for index in kept], [prompts[index] for index in kept]


def _answers(context: TrainingContext, plan: PlannedRun, task: Task, prompts: list[list[int]]) -> list[str]:
    rows = [{"input_ids": ids, "prompt_len": len(ids)} for ids in prompts]
    return generate(
        context.model,
        context.tokenizer,
        rows,
        max_new_tokens=task.max_new_tokens,
        batch_size=plan.eval_batch_size,
        num_beams=plan.num_beams,
    )


def _activations(context: TrainingContext) -> dict[str, Any] | None:
    """The learned coefficients of eq. 7, layer by layer; None where the method has none."""
    theta = {name: p.detach().float().cpu().tolist() for name, p in context.method.parameter_groups(context.model)[1]}
    tops = [values for name, values in theta.items() if ".pedro_a." in f"{name}."]
    bottoms = [values for name, values in theta.items() if ".pedro_b." in f"{name}."]
    if not tops:
        return None
    layers = [{"a": _rounded(a), "b": _rounded(b)} for a, b in zip(tops, bottoms, strict=True)]
    return {"kind": "rational", "layers": layers}


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in values]


def _without_bias(context: TrainingContext) -> int:
    from pedro.methods.registry import count_parameters

    return count_parameters(context.model)["trainable_without_bias"]


def _reset_peak() -> None:
    """Forget the peaks of the runs that this process made before."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    reset_peak_memory()


def _peak(on_gpu: bool) -> int:
    """The run's peak: of the GPU's memory there, else of the process's."""
    import torch

    if on_gpu:
        return int(torch.cuda.max_memory_allocated())
    return peak_memory()
