"""What tuning did to a model elsewhere: its loss on general text and its score on a general task, before and after.

What conditions the vectors of a prompt-dependent method is the first quarter of each window of text, and a task's
prompt: in service, a request of another kind would do the same. Nothing that is predicted conditions them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pedro.backbone import Backbone, context_length, load_tokenizer
from pedro.comparison.data import has_chat_template
from pedro.comparison.untrained import candidates, prompt_of
from pedro.comparison.untrained_run import QuestionEncoder
from pedro.data.general_text import windows
from pedro.errors import PedroError
from pedro.evaluation.metrics import score_answers
from pedro.evaluation.scoring import answer_logprobs, answer_loss
from pedro.training.context import load_frozen

if TYPE_CHECKING:
    from torch import nn

    from pedro.comparison.data import TestSet
    from pedro.comparison.spec_sections import ForgettingSpec
    from pedro.data.tasks import Task, TaskRow
    from pedro.model_protocols import Tokenizer
    from pedro.training.spec import TrainingSpec

BATCH_SIZE = 4  # windows or labels at once: little memory, whatever the vocabulary


@dataclass(frozen=True)
class GeneralAbility:
    """Nats of a token of general text, and the score on the general task (None where none was asked for)."""

    loss: float
    tokens: int
    score: float | None
    rows: int


class AbilityMeter:
    """Measures models of one backbone. `general` is the task that is asked besides, if any."""

    def __init__(self, backbone: Backbone, asked: ForgettingSpec, general: TestSet | None) -> None:
        self.backbone, self.asked, self.general = backbone, asked, general
        self.tokenizer: Tokenizer = load_tokenizer(backbone)
        self.context = context_length(backbone)
        self._windows = windows(self.tokenizer, asked.tokens, self.context)

    def bare(self, training: TrainingSpec, device: str) -> GeneralAbility:
        """The backbone's own, as the run has it, measured once a process. Its memory is given back before training
        needs it."""
        held = f"{training.precision} {training.backbone_dtype}"
        key = (self.backbone.id, self.backbone.digest, self.asked.model_dump_json(), held, device)
        if key not in _BARE:
            _BARE[key] = self.measure(load_frozen(self.backbone, training, device))
        return _BARE[key]

    def measure(self, model: nn.Module) -> GeneralAbility:
        """`model` is the backbone, with an adapter or without. Raises PedroError where no row of the task fits."""
        loss, tokens = answer_loss(model, self.tokenizer, self._windows, BATCH_SIZE)
        score, rows = self._score(model, self.general) if self.general else (None, 0)
        return GeneralAbility(loss / tokens, tokens, score, rows)

    def changed(self, before: GeneralAbility, model: nn.Module) -> dict[str, Any]:
        """What tuning did to the model, as a result holds it."""
        after = self.measure(model)
        found: dict[str, Any] = {"loss_before": before.loss, "loss": after.loss, "tokens": after.tokens}
        if self.general is not None:
            scores = {"score_before": before.score, "score": after.score, "rows": after.rows}
            found |= {"task": self.general.task.name, **scores}
        return found

    def _score(self, model: nn.Module, general: TestSet) -> tuple[float, int]:
        """By the likeliest of each row's labels, rows that do not fit left out."""
        task = general.task
        encoder = QuestionEncoder(self.tokenizer, task.as_chat and has_chat_template(self.backbone.id))
        asked: list[TaskRow] = []
        answers: list[str] = []
        for row in general.rows:
            encoded = _encoded(encoder, task, row)
            if max(len(one["input_ids"]) for one in encoded) <= self.context:
                nats = [found for found, _ in answer_logprobs(model, self.tokenizer, encoded, BATCH_SIZE)]
                asked.append(row)
                answers.append(candidates(task, row)[nats.index(max(nats))])
        if not asked:
            raise PedroError(f"forgetting.task: no prompt of {task.name} fits into {self.context} tokens; name another")
        return score_answers(task, asked, answers).value, len(asked)


def _encoded(encoder: QuestionEncoder, task: Task, row: TaskRow) -> Sequence[dict[str, Any]]:
    """The row's prompt with each of its labels, as rows of scoring."""
    text = prompt_of(task, row, ())
    prompt = encoder.prompt(text)
    labels = [encoder.label(text, prompt, label) for label in candidates(task, row)]
    return [{"input_ids": [*prompt, *label], "prompt_len": len(prompt)} for label in labels]


_BARE: dict[tuple[str, ...], GeneralAbility] = {}
