"""The parts of the benchmark `published`: each asks one task in one way and gives rows of a table, in percent.

Answers are those of the bare model, greedy or ranked, in float32. Nothing here knows the published figures.
"""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.stats import Ratio, mean_of_groups, wilson
from pedro.backbone import Backbone, load_model, load_tokenizer, resolve_backbone
from pedro.data.prompt_format import encode_prompt, encode_text, format_for_shape
from pedro.data.row_shapes import RowShape
from pedro.data.tasks import Task, TaskRow, get_task, proportional
from pedro.errors import DataError
from pedro.evaluation.metrics import score_answers
from pedro.evaluation.ranking import PromptReader
from pedro.evaluation.scoring import answer_loss, generate

if TYPE_CHECKING:
    from pedro.evaluation.harness.base import HarnessModel
    from pedro.model_protocols import Tokenizer

Rows = list[dict[str, Any]]
MARKED = re.compile(r"####\s*(-?[\d.,]+)")
WINDOW = 1024
BATCH = 20
BBH_TOKENS, GSM8K_TOKENS = 64, 256


@dataclass(frozen=True)
class Sizes:
    """How many rows of each task; of BBH, of each of its sub-tasks."""

    mmlu: int
    mmlu_chat: int
    harness: int
    endpoint: int
    bbh_each: int
    gsm8k: int
    windows: int


class Subject:
    """The model under test, loaded when it is first asked. Raises BackboneError if there is none of that name."""

    def __init__(self, name: str, data: Path, threads: int) -> None:
        self.backbone: Backbone = resolve_backbone(name)
        self.data, self.threads = data, threads
        self.ranked: dict[tuple[str, bool], tuple[bool, bool]] = {}  # what the samples of MMLU share is asked once

    @cached_property
    def model(self) -> Any:
        import torch

        torch.set_num_threads(self.threads)
        return load_model(self.backbone)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        found: Tokenizer = load_tokenizer(self.backbone)
        return found

    def answers(self, rows: Sequence[TaskRow], tokens: int, stops: tuple[str, ...]) -> list[str]:
        """Greedy answers to the rows' prompts as they stand."""
        encoded = [encode_prompt(self.tokenizer, row.prompt) for row in rows]
        ready = [{"input_ids": ids, "prompt_len": len(ids)} for ids in encoded]
        return generate(self.model, self.tokenizer, ready, tokens, batch_size=BATCH, stops=stops)


Part = Callable[[Subject, Sizes], Rows]


def mmlu(subject: Subject, sizes: Sizes) -> Rows:
    """No examples, the likeliest of the four choices' words: for each character, as published, and as a whole."""
    rows = _mmlu_rows(subject, sizes.mmlu)
    each, whole = _ranked(subject, rows, chat=False)
    asked = "our task"
    return [
        _row("MMLU, cloze", asked, wilson(sum(each), len(rows)), len(rows)),
        _row("MMLU, cloze, unnormalised", asked, wilson(sum(whole), len(rows)), len(rows)),
    ]


def mmlu_chat(subject: Subject, sizes: Sizes) -> Rows:
    """The same questions in the chat template, for those of the sample; and these without it, for comparison."""
    rows = _mmlu_rows(subject, sizes.mmlu_chat)
    return [
        _row("MMLU, cloze", asked, wilson(sum(_ranked(subject, rows, chat)[0]), len(rows)), len(rows))
        for chat, asked in ((True, "our task, chat template"), (False, "our task, the same rows without it"))
    ]


def harness(subject: Subject, sizes: Sizes) -> Rows:
    """lm-eval on a part of the sample, through our model in its process; and our own scores of the same rows."""
    if find_spec("lm_eval") is None:
        return []
    from pedro.evaluation.harness.local import LocalModel

    rows = _mmlu_rows(subject, sizes.harness)
    each, _ = _ranked(subject, rows, chat=False)
    return [
        _asked_by_lm_eval(LocalModel, {"backbone": subject.backbone.id}, subject, sizes.harness),
        _row("MMLU, cloze", "our task, the same rows", wilson(sum(each), len(rows)), len(rows)),
    ]


def endpoint(subject: Subject, sizes: Sizes) -> Rows:
    """lm-eval on those rows over HTTP, as `lm-eval --model pedro` asks a server, which is started for it."""
    if not sizes.endpoint or find_spec("lm_eval") is None:
        return []
    from jobs.benchmarks.local_server import local_server
    from pedro.evaluation.harness.endpoint import EndpointModel
    from pedro.serving.config import ServeConfig

    backbone = subject.backbone
    config = ServeConfig(backbone=str(backbone.directory), served_name=backbone.id, threads=subject.threads)
    with local_server(config, lambda _registry, _home: None, lambda _line: None) as local:
        arguments = {"model": backbone.id, "base_url": f"{local.url}/v1", "api_key": local.key()}
        return [_asked_by_lm_eval(EndpointModel, arguments, subject, sizes.endpoint, " through the server")]


def _asked_by_lm_eval(
    model_class: Callable[..., HarnessModel], arguments: dict[str, Any], subject: Subject, count: int, how: str = ""
) -> dict[str, Any]:
    from pedro.evaluation.harness import TASKS
    from pedro.evaluation.harness.run import run_harness

    name = "sampled_mmlu_cloze"
    with tempfile.TemporaryDirectory() as folder:
        rows_from = {"task": "mmlu", "wording": "cloze", "sample": count, "data": str(subject.data)}
        task = {"include": str(TASKS / "pedro_mmlu_cloze.yaml"), "task": name, "dataset_kwargs": rows_from}
        Path(folder, f"{name}.yaml").write_text(json.dumps(task))  # any JSON is YAML
        found = run_harness(arguments, [name], include_path=Path(folder), model_class=model_class)
    rows = found["rows"][name]
    right = round(float(found["tasks"][name]["acc_norm"] or 0) * rows)
    return _row("MMLU, cloze", f"lm-eval {metadata.version('lm_eval')}{how}", wilson(right, rows), rows)


def bbh(subject: Subject, sizes: Sizes) -> Rows:
    """The three examples of each sub-task without their reasoning, answers generated; the mean of the sub-tasks."""
    task = get_task("bbh", "full", 3)
    by_group: dict[str, list[TaskRow]] = {}
    for row in task.rows("test", subject.data):
        by_group.setdefault(row.group, []).append(row)
    rows, groups = 0, []
    for found in by_group.values():
        kept = proportional(found, sizes.bbh_each)
        groups.append(_right(task, kept, subject.answers(kept, BBH_TOKENS, ("\n\n",))))
        rows += len(kept)
    return [_row("BBH, 3-shot", "our task", mean_of_groups(groups), rows)]


def gsm8k(subject: Subject, sizes: Sizes) -> Rows:
    """Five examples of train; right by the last number, and by the one behind "####" alone, as published."""
    task = get_task("gsm8k", "full", 5)
    rows = list(task.rows("test", subject.data, sizes.gsm8k))
    texts = [text.partition("Question:")[0] for text in subject.answers(rows, GSM8K_TOKENS, ("Question:",))]
    marked = [match[0] if (match := MARKED.search(text)) else "" for text in texts]
    return [
        _row("GSM8K, 5-shot", asked, wilson(round(sum(_right(task, rows, answers))), len(rows)), len(rows))
        for asked, answers in (("our task, the number behind ####", marked), ("our task, the last number", texts))
    ]


def wikitext2(subject: Subject, sizes: Sizes) -> Rows:
    """Perplexity of a token and of a word: windows of 1,024 tokens that do not overlap, spread evenly over the text.

    A window's first token is not scored. Words are those of the file, where "<unk>" is one and a line's end another.
    """
    file = subject.data / "wikitext2" / "test.txt"
    if not file.is_file():
        raise DataError(f"{file}: not there; put the test text of WikiText-2 into it", param="data")
    text = file.read_text(encoding="utf-8")
    ids, words = encode_text(subject.tokenizer, text), len(text.split()) + text.count("\n")
    total = max(1, len(ids) // WINDOW)
    count = min(sizes.windows, total)
    nats, tokens = [], 0
    for place in range(count):
        start = place * total // count * WINDOW
        window = ids[start : start + WINDOW]
        loss, scored = answer_loss(subject.model, subject.tokenizer, [{"input_ids": window, "prompt_len": 1}])
        nats.append(loss / scored)
        tokens += scored
    mean = mean_of_groups([nats])
    rows = []
    for what, power in (("token", 1.0), ("word", len(ids) / words)):
        values = (math.exp(value * power) for value in (mean.value, mean.low, mean.high))
        rows.append(
            _row(f"WikiText-2, perplexity of a {what}", "windows of 1,024", Ratio(*values), tokens, 1, "perplexity")
        )
    return rows


PARTS: dict[str, Part] = {
    "mmlu": mmlu,
    "mmlu_chat": mmlu_chat,
    "harness": harness,
    "endpoint": endpoint,
    "bbh": bbh,
    "gsm8k": gsm8k,
    "wikitext2": wikitext2,
}


def _mmlu_rows(subject: Subject, count: int) -> list[TaskRow]:
    return proportional(get_task("mmlu", "cloze").rows("test", subject.data), count)


def _ranked(subject: Subject, rows: Sequence[TaskRow], chat: bool) -> tuple[list[bool], list[bool]]:
    """Whether each row's right choice is the likeliest for each character, and as a whole."""
    reader = PromptReader(subject.model)
    for row in rows:
        if (row.id, chat) not in subject.ranked:
            subject.ranked[row.id, chat] = _ranks(subject.tokenizer, reader, row, chat)
    found = [subject.ranked[row.id, chat] for row in rows]
    return [each for each, _ in found], [whole for _, whole in found]


def _ranks(tokenizer: Tokenizer, reader: PromptReader, row: TaskRow, chat: bool) -> tuple[bool, bool]:
    choices = row.extra["choices"]
    if chat:
        form = format_for_shape(RowShape.MESSAGES, tokenizer)
        prompt = encode_prompt(tokenizer, form.prompt(list(row.messages), tokenizer))
        answers = [encode_text(tokenizer, choice) for choice in choices]
    else:
        prompt = encode_prompt(tokenizer, row.prompt)
        answers = [encode_prompt(tokenizer, f"{row.prompt} {choice}")[len(prompt) :] for choice in choices]
    nats = [value for value, _ in reader.scores(prompt, answers)]
    shares = [value / max(1, len(choice)) for value, choice in zip(nats, choices, strict=True)]
    right = choices.index(row.completion)
    return shares.index(max(shares)) == right, nats.index(max(nats)) == right


def _right(task: Task, rows: Sequence[TaskRow], answers: Sequence[str]) -> tuple[float, ...]:
    return score_answers(task, rows, answers).per_row


def _row(task: str, asked: str, found: Ratio, rows: int, scale: float = 100, unit: str = "percent") -> dict[str, Any]:
    """A line of the table; the scale makes percent of a share."""
    score, low, high = (round(value * scale, 1) for value in (found.value, found.low, found.high))
    return {"task": task, "asked": asked, "rows": rows, "score": score, "interval": [low, high], "unit": unit}
