"""Asks the backbone itself, with nothing trained: the run behind a table's rows that are called "Backbone, …"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pedro.backbone import context_length, load_tokenizer, resolve_backbone
from pedro.comparison.untrained import LIKELIHOOD, candidates, prompt_of
from pedro.data.prompt_format import FORMATS, PromptFormat, encode_prompt, encode_text, format_for_shape
from pedro.data.row_shapes import RowShape
from pedro.errors import PedroError
from pedro.evaluation.ranking import PromptReader, likeliest
from pedro.evaluation.scoring import generate
from pedro.training.context import load_frozen
from pedro.training.spec import TrainingSpec

if TYPE_CHECKING:
    from pedro.comparison.data import TaskData, TestSet
    from pedro.comparison.run_planner import PlannedRun
    from pedro.comparison.spec_sections import RunResources
    from pedro.data.tasks import Task, TaskRow
    from pedro.model_protocols import Tokenizer


class QuestionEncoder:
    """Questions and labels as token ids: in a conversation of the tokenizer's own template, or as they stand."""

    def __init__(self, tokenizer: Tokenizer, chat: bool) -> None:
        self.tokenizer, self.chat = tokenizer, chat
        self.form: PromptFormat = format_for_shape(RowShape.MESSAGES, tokenizer) if chat else FORMATS["raw"]

    def prompt(self, text: str, system: str = "") -> list[int]:
        """The tokens up to where an answer begins, behind a system turn if there is one."""
        told = [{"role": "system", "content": system}] if system else []
        said = {"role": "user", "content": text}
        return encode_prompt(self.tokenizer, self.form.prompt([*told, said], self.tokenizer))

    def label(self, text: str, prompt: list[int], label: str, system: str = "") -> list[int]:
        """A label's tokens as they follow the prompt: behind a space, unless a chat's answer begins there."""
        if self.chat:
            return encode_text(self.tokenizer, label)
        whole = self.prompt(f"{text} {label}", system)
        together = len(whole) > len(prompt) and whole[: len(prompt)] == prompt
        return whole[len(prompt) :] if together else encode_text(self.tokenizer, f" {label}")


class BackboneAsker:
    """One backbone, asked in the way of a planned run."""

    def __init__(self, plan: PlannedRun, resources: RunResources) -> None:
        backbone = resolve_backbone(plan.group.backbone)
        way = plan.group.untrained
        assert way is not None, "only the backbone itself is asked here"
        self.plan, self.way = plan, way
        self.tokenizer = load_tokenizer(backbone)
        held = TrainingSpec.model_validate(plan.training)  # the weights that the methods train over
        self.model = load_frozen(backbone, held, "cuda" if resources.gpus else "cpu")
        self.reader = PromptReader(self.model)
        self.encoder = QuestionEncoder(self.tokenizer, plan.chat)
        self.context = context_length(backbone)

    def answers(self, data: TaskData) -> list[tuple[TestSet, list[TaskRow], list[str]]]:
        """(test set, its rows that fit, the answers) of every test set that can be asked so."""
        found = []
        for test in data.tests:
            if self.way.fits(test.task):
                examples = self.way.examples(test.task, data.train_rows, self.plan.seed) if self.way.shots else []
                rows, answers = self._answers(test.task, test.rows, examples)
                found.append((test, rows, answers))
        return found

    def _answers(
        self, task: Task, rows: Sequence[TaskRow], examples: Sequence[TaskRow]
    ) -> tuple[list[TaskRow], list[str]]:
        """The rows whose prompt leaves room for an answer, and the answers."""
        texts = [prompt_of(task, row, examples) for row in rows]
        prompts = [self.encoder.prompt(text, row.system) for text, row in zip(texts, rows, strict=True)]
        kept = [place for place, ids in enumerate(prompts) if len(ids) + task.max_new_tokens <= self.context]
        if not kept:
            longest = max(map(len, prompts))
            raise PedroError(
                f"{task.name}: no prompt with {len(examples)} examples fits into {self.context} tokens (the longest "
                f"has {longest:,}); ask with fewer"
            )
        shown = [rows[place] for place in kept]
        if self.way.by == LIKELIHOOD:
            return shown, [self._likeliest(task, rows[place], texts[place], prompts[place]) for place in kept]
        encoded = [{"input_ids": prompts[place], "prompt_len": len(prompts[place])} for place in kept]
        return shown, generate(
            self.model,
            self.tokenizer,
            encoded,
            max_new_tokens=task.max_new_tokens,
            batch_size=self.plan.eval_batch_size,
            num_beams=self.plan.num_beams,
        )

    def _likeliest(self, task: Task, row: TaskRow, text: str, prompt: list[int]) -> str:
        labels = candidates(task, row)
        lengths = [len(label) for label in labels] if task.words.spelled else None
        encoded = [self.encoder.label(text, prompt, label, row.system) for label in labels]
        return labels[likeliest(self.reader, prompt, encoded, lengths)]
