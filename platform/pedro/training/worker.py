"""What one worker does for a job: train, score, save the adapter. Knows nothing of Ray; registries are handed in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from pedro.backbone import load_model
from pedro.evaluation.saved import backbone_of, changes_backbone, load_saved, release
from pedro.evaluation.scoring import Score, majority, score
from pedro.training.loop import Outcome, Reporter, train
from pedro.training.prepare import notes
from pedro.training.session import DTYPES, Session
from pedro.training.team import Team


@dataclass(frozen=True)
class Trained:
    """A finished training: where it ended and how good the adapter is."""

    outcome: Outcome
    metrics: dict[str, Any]


def run_session(session: Session, reporter: Reporter) -> Trained:
    """Train to the end and score the best adapter; every worker returns the same."""
    team = Team(session.engine.rank, session.engine.world)
    if team.rank == 0:
        for note in notes(session.prepared, session.spec.training, session.plan):
            reporter.line(note)
    bare = None
    if _trains_backbone(session) and not _sharded(session):  # now it still is what it was; later that takes a copy
        session.engine.mode(training=False)
        bare = _score_bare(session, team)
    outcome = train(session.engine, session.alternation, session.plan, session.data, reporter)
    if team.rank == 0:
        reporter.line(f"trained {outcome.steps:,} steps in {outcome.seconds:.0f} s; scoring")
    counts: dict[str, Any] = {
        "train_rows": len(session.data.train),
        "steps": outcome.steps,
        "optimizer_steps": outcome.optimizer_steps,
        "best_step": outcome.best_step,
        "seconds": round(outcome.seconds, 2),
    }
    if outcome.validation_loss is not None and math.isfinite(outcome.validation_loss):
        counts["validation_loss"] = outcome.validation_loss
    return Trained(outcome, {**evaluate(session, team, bare), **counts})


def evaluate(session: Session, team: Team, bare: Score | None = None) -> dict[str, Any]:
    """accuracy, backbone_accuracy, majority_accuracy, loss, backbone_loss, rows and which split they are of.

    `bare` is the backbone's score where it was taken before the training.
    """
    split, rows = session.scored_rows()
    metrics: dict[str, Any] = {"split": split, "rows": 0}
    if rows is None:
        return metrics
    adapted = _score(session, session.model, rows, team)
    bare = bare or _score_bare(session, team)
    guess = majority(rows["completion"])
    guessed = sum(text.strip() == guess for text in rows["completion"])
    return {
        "accuracy": adapted.accuracy,
        "loss": adapted.loss,
        "backbone_accuracy": bare.accuracy,
        "backbone_loss": bare.loss,
        "majority_accuracy": guessed / len(rows),
        **metrics,
        "rows": adapted.rows,
    }


def _score_bare(session: Session, team: Team) -> Score:
    """The score of the backbone alone: with the adapter off, or before anything was trained.

    Where ZeRO-3 shards a backbone that is trained itself, a fresh copy is scored.
    """
    _, rows = session.scored_rows()
    if rows is None:
        return Score()
    model: Any = session.model
    if _trains_backbone(session) and _sharded(session):
        return _score(session, load_model(session.backbone, _dtype(session), str(session.engine.device)), rows, team)
    with model.disable_adapter() if hasattr(model, "disable_adapter") else nullcontext():
        return _score(session, model, rows, team)


def _trains_backbone(session: Session) -> bool:
    """Whether the backbone's own weights are trained, so that it is not there any more afterwards."""
    configs = getattr(session.model, "peft_config", None)
    return not configs or any(changes_backbone(config) for config in configs.values())


def _sharded(session: Session) -> bool:
    return session.spec.resources.zero_stage == 3


def _score(session: Session, model: nn.Module, rows: Any, team: Team) -> Score:
    """Every worker scores a share; under ZeRO-3, whose workers must step together, each scores all the rows."""
    together = _sharded(session)
    part = list(rows) if together else [rows[i] for i in range(team.rank, len(rows), team.world)]
    mine = score(model, session.tokenizer, part)
    return mine if together else sum(team.gather(mine), Score())


def save(session: Session, trained: Trained, directory: Path, extra: Mapping[str, Any] | None = None) -> str | None:
    """Write the adapter directory from rank 0 and return its digest there; `extra` goes into its manifest as well.

    Raises UnavailableError on every worker if it cannot be written.
    """
    from pedro.methods.adapter_files import save_adapter

    team = Team(session.engine.rank, session.engine.world)
    manifest = {**_manifest(session, trained), **(extra or {})}

    def write() -> str | None:
        return save_adapter(session.model, directory, manifest) if team.rank == 0 else None

    with session.engine.gathered():
        return team.together(write)


def score_directory(session: Session, directory: Path) -> Score:
    """The score of another adapter (the champion) on the same rows, on the session's own backbone.

    So that there is never a second backbone in memory the trained adapter, which must be saved by now, is taken off;
    where that cannot be, the trained model is given up before another one is loaded.
    """
    from pedro.methods.adapter_files import CONFIG, verify_adapter

    manifest = verify_adapter(directory, session.backbone.digest, session.backbone.tokenizer_digests)
    _, rows = session.scored_rows()
    if rows is None:
        return Score()
    bare = None
    if not _sharded(session):
        bare = backbone_of(session.model) if (directory / CONFIG).is_file() else None
        if bare is None:
            release(session.model)
    model = load_saved(directory, manifest, session.backbone, _dtype(session), str(session.engine.device), bare)
    return score(model, session.tokenizer, list(rows))


def _dtype(session: Session) -> str:
    return DTYPES[session.spec.training.precision]


def _manifest(session: Session, trained: Trained) -> dict[str, Any]:
    spec, companion = session.spec, session.engine.companion
    return {
        "backbone": {
            "id": session.backbone.id,
            "digest": session.backbone.digest,
            "tokenizer_digest": session.backbone.tokenizer_digest,
        },
        "method": {"name": spec.method.name, "options": spec.method.options},
        "prompt_format": session.prepared.format.to_dict(),
        "data_digest": session.prepared.digest,
        "spec": spec.to_dict(),
        "metrics": trained.metrics,
        "trainable_parameters": session.trainable_parameters,
        **({"kept_parameters": companion.kept()} if companion else {}),
    }
