"""One worker's part of a job: train, score, save the adapter. Does not import Ray; registries are parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pedro.backbone import load_model
from pedro.evaluation.preference import pair_likelihoods, score_pairs
from pedro.evaluation.saved import backbone_of, load_saved, release, trains_backbone
from pedro.evaluation.scoring import Score, majority, score
from pedro.methods.pedro.activation_inputs import recorded, summary
from pedro.training.context import DTYPES, TrainingContext, load_frozen
from pedro.training.loop import Reporter, TrainingOutcome, train
from pedro.training.prepare import notes
from pedro.training.scored_rows import ScoredRow, scored_rows
from pedro.training.worker_group import WorkerGroup

if TYPE_CHECKING:
    from datasets import Dataset
    from torch import nn

T = TypeVar("T")
TOLD = {"train/loss": "train_loss", "train/token_accuracy": "train_token_accuracy"}
TOLD |= {"dev/token_accuracy": "validation_token_accuracy"}  # curves at the best step: metrics of the adapter


@dataclass(frozen=True)
class Trained:
    """A finished training: its end and the adapter's scores."""

    outcome: TrainingOutcome
    metrics: dict[str, Any]
    score: Score = field(default_factory=Score)
    """The adapter's scores, row by row."""
    bare: Score = field(default_factory=Score)
    """The bare backbone's."""
    activation_inputs: dict[str, Any] = field(default_factory=dict)
    """For PEDRO, by layer: the distribution of its activation's inputs on the rows that this worker scored."""


def train_and_score(context: TrainingContext, reporter: Reporter) -> Trained:
    """Train and score the best adapter; every worker returns the same."""
    group = WorkerGroup(context.engine.rank, context.engine.world)
    if group.rank == 0:
        for note in notes(context.prepared, context.spec.training, context.plan):
            reporter.line(note)
    bare = None
    if trains_backbone(context.model) and not _sharded(context):  # before it changes; later this needs a copy
        context.engine.mode(training=False)
        bare = _score_bare(context, group)
    outcome = train(context.engine, context.alternation, context.plan, context.data, reporter)
    if group.rank == 0:
        end = ", where validation had stopped improving," if outcome.stopped_early else ""
        reporter.line(f"trained {outcome.steps:,} steps{end} in {outcome.seconds:.0f} s; scoring")
    counts: dict[str, Any] = {
        "train_rows": len(context.data.train),
        "train_tokens": outcome.all_tokens,
        "steps": outcome.steps,
        "optimizer_steps": outcome.optimizer_steps,
        "best_step": outcome.best_step,
        "seconds": round(outcome.seconds, 2),
    }
    if outcome.validation_loss is not None and math.isfinite(outcome.validation_loss):
        counts["validation_loss"] = outcome.validation_loss
    counts |= {name: outcome.told[curve] for curve, name in TOLD.items() if curve in outcome.told}
    with recorded(None if _sharded(context) else context.model) as seen:  # with a sharded W_down x cannot be recorded
        metrics, adapted, bare = evaluate(context, group, bare)
    return Trained(outcome, {**metrics, **counts}, adapted, bare, summary(seen))


def rows_behind(context: TrainingContext, trained: Trained) -> list[ScoredRow]:
    """The scored rows, each with its answers."""
    _, rows = context.scored_rows()
    if rows is None or not trained.score.answers:
        return []
    prompts = (
        context.tokenizer.decode(row["input_ids"][: row["prompt_len"]], skip_special_tokens=True) for row in rows
    )
    return scored_rows(prompts, rows["completion"], trained.score, trained.bare)


def evaluate(
    context: TrainingContext, group: WorkerGroup, bare: Score | None = None
) -> tuple[dict[str, Any], Score, Score]:
    """The metrics accuracy, backbone_accuracy, majority_accuracy, loss, backbone_loss, rows and their split; for
    preferences preference_accuracy instead of all accuracies. Also the scores of adapter and backbone, by row.

    `bare` is the backbone's score if it was computed before training.
    """
    split, rows = context.scored_rows()
    metrics: dict[str, Any] = {"split": split, "rows": 0}
    if rows is None:
        return metrics, Score(), Score()
    if context.spec.beta is not None:
        scores, adapted = _evaluate_pairs(context, rows, group, context.spec.beta)
        return {**scores, **metrics, "rows": len(rows)}, adapted, Score()
    adapted = _score(context, context.model, rows, group)
    bare = bare or _score_bare(context, group)
    guess = majority(rows["completion"])
    guessed = sum(text.strip() == guess for text in rows["completion"])
    scores = {
        "accuracy": adapted.accuracy,
        "loss": adapted.loss,
        "backbone_accuracy": bare.accuracy,
        "backbone_loss": bare.loss,
        "majority_accuracy": guessed / len(rows),
    }
    return {**scores, **metrics, "rows": adapted.rows}, adapted, bare


def _evaluate_pairs(
    context: TrainingContext, rows: Dataset, group: WorkerGroup, beta: float
) -> tuple[dict[str, float], Score]:
    """Scores of pairs. The backbone's are those of any model compared with itself: 0.5 and log 2."""
    part = _share(context, rows, group)
    model: Any = context.model
    policy = pair_likelihoods(model, context.tokenizer, part)
    with model.disable_adapter():
        reference = pair_likelihoods(model, context.tokenizer, part)
    mine = [score_pairs(likelihoods, reference, beta) for likelihoods in (policy, reference)]
    adapted, bare = (_joined(context, score, group) for score in mine)
    beside = {f"backbone_{name}": value for name, value in compared(context, bare).items()}
    return {**compared(context, adapted), **beside}, adapted


def compared(context: TrainingContext, score: Score) -> dict[str, float]:
    """A score under the metric names of the gate."""
    name = "accuracy" if context.spec.beta is None else "preference_accuracy"
    return {name: score.accuracy, "loss": score.loss}


def _score_bare(context: TrainingContext, group: WorkerGroup) -> Score:
    """The score of the bare backbone: with the adapter disabled, or before training.

    If ZeRO-3 shards a backbone that is itself trained, a fresh copy is scored.
    """
    _, rows = context.scored_rows()
    if rows is None:
        return Score()
    model: Any = context.model
    if trains_backbone(context.model) and _sharded(context):
        return _score(context, load_model(context.backbone, _dtype(context), str(context.engine.device)), rows, group)
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        return _score(context, model, rows, group)


def _sharded(context: TrainingContext) -> bool:
    return context.spec.resources.zero_stage == 3


def _score(context: TrainingContext, model: nn.Module, rows: Any, group: WorkerGroup) -> Score:
    """Every worker scores a share; with ZeRO-3, whose workers must run in lockstep, each scores all rows."""
    return _joined(context, score(model, context.tokenizer, _share(context, rows, group)), group)


def _share(context: TrainingContext, rows: Any, group: WorkerGroup) -> list[Any]:
    return list(rows) if _sharded(context) else [rows[i] for i in range(group.rank, len(rows), group.world)]


def _joined(context: TrainingContext, mine: Score, group: WorkerGroup) -> Score:
    if _sharded(context):
        return mine
    gathered = group.gather(mine)
    whole = sum(gathered, Score())
    return replace(
        whole,
        each=_in_turn([one.each for one in gathered]),
        answers=_in_turn([one.answers for one in gathered]),
    )


def _in_turn(parts: Sequence[Sequence[T]]) -> tuple[T, ...]:
    """Merges the workers' results for rows distributed round-robin, in the order of the rows."""
    return tuple(row for turn in zip_longest(*parts) for row in turn if row is not None)


def save(
    context: TrainingContext, trained: Trained, directory: Path, extra: Mapping[str, Any] | None = None
) -> str | None:
    """Write the adapter directory on rank 0 and return its digest there; `extra` is added to its manifest.

    Raises UnavailableError on every worker if it cannot be written.
    """
    recorded_inputs = {"activation_inputs": trained.activation_inputs} if trained.activation_inputs else {}
    return save_model(context, trained.metrics, directory, {**recorded_inputs, **(extra or {})})


def save_model(
    context: TrainingContext, metrics: Mapping[str, Any], directory: Path, extra: Mapping[str, Any] | None = None
) -> str | None:
    """`save` the current parameters, with these metrics in the manifest."""
    from pedro.methods.adapter_files import save_adapter

    group = WorkerGroup(context.engine.rank, context.engine.world)
    manifest = {**_manifest(context, metrics), **(extra or {})}

    def write() -> str | None:
        return save_adapter(context.model, directory, manifest) if group.rank == 0 else None

    with context.engine.gathered():
        return group.together(write)


def score_directory(context: TrainingContext, directory: Path) -> Score:
    """The score of another adapter (the champion) on the same rows, on the context's backbone.

    To avoid a second backbone in memory, the trained adapter, which must be saved already, is removed; if that is
    impossible, the trained model is freed before another one is loaded.
    """
    from pedro.adapter_directory import CONFIG, verify_adapter

    manifest = verify_adapter(directory, context.backbone.digest, context.backbone.tokenizer_digests)
    _, rows = context.scored_rows()
    if rows is None:
        return Score()
    bare = None
    if not _sharded(context):
        bare = backbone_of(context.model) if (directory / CONFIG).is_file() else None
        if bare is None:
            release(context.model)
    device, beta = str(context.engine.device), context.spec.beta
    if bare is None and (beta is not None or (directory / CONFIG).is_file()):
        bare = load_frozen(context.backbone, context.spec.training, device)
    if beta is None:
        model = load_saved(directory, manifest, context.backbone, _dtype(context), device, bare)
        return score(model, context.tokenizer, list(rows))
    assert bare is not None, "preferences are measured against the backbone"
    reference = pair_likelihoods(bare, context.tokenizer, list(rows))
    if not (directory / CONFIG).is_file():
        release(bare)
    model = load_saved(directory, manifest, context.backbone, _dtype(context), device, bare)
    return score_pairs(pair_likelihoods(model, context.tokenizer, list(rows)), reference, beta)


def _dtype(context: TrainingContext) -> str:
    return DTYPES[context.spec.training.precision]


def _manifest(context: TrainingContext, metrics: Mapping[str, Any]) -> dict[str, Any]:
    spec, hook = context.spec, context.engine.hook
    return {
        "backbone": {
            "id": context.backbone.id,
            "digest": context.backbone.digest,
            "tokenizer_digest": context.backbone.tokenizer_digest,
        },
        "method": {"name": spec.method.name, "options": spec.method.options},
        "prompt_format": context.prepared.format.to_dict(),
        "data_digest": context.prepared.digest,
        "spec": spec.to_dict(),
        "metrics": dict(metrics),
        "trainable_parameters": context.trainable_parameters,
        **({"kept_parameters": hook.kept()} if hook else {}),
    }
