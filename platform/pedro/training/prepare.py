"""The rows of a job: its files tokenised once per host, split, and counted. Loads no model.

Every worker prepares; the first on a host tokenises, the others memory-map its rows from the host's cache.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from pedro.backbone import Backbone, context_length
from pedro.data import PromptFormat, data_digest, format_for_shape, load_rows, shape_of, split
from pedro.data.dataset import REJECTED
from pedro.data.preferences import check_objective
from pedro.data.prompt_format import around, check_format
from pedro.errors import ConfigError, DataError
from pedro.training.batches import ANSWERS, Objective
from pedro.training.loop import TrainingPlan
from pedro.training.storage import fetch

if TYPE_CHECKING:
    from datasets import Dataset

    from pedro.model_protocols import Tokenizer
    from pedro.training.spec import DataSpec, FineTuneSpec, TrainingSpec

MEASURED_ROWS = 50_000
Tell = Callable[[str], None]


@dataclass(frozen=True)
class PreparedData:
    """A job's rows before they are split for a method, and their prompt format."""

    format: PromptFormat
    digest: str
    """Of all files together, by role."""
    max_length: int
    _spec: DataSpec
    _rows: dict[str, Dataset] = field(repr=False)

    def splits(self, with_theta: bool) -> tuple[Dataset, Dataset | None, Dataset | None]:
        """(train, theta, validation); without Θ, theta's rows are part of train. Validation is None if there is
        none."""
        from datasets import concatenate_datasets

        shares = {
            name: value for name in ("theta", "validation") if isinstance(value := getattr(self._spec, name), float)
        }
        if not with_theta:
            shares["theta"] = 0.0
        elif self._spec.theta == 0:
            raise ConfigError(
                "data.theta: 0 leaves the Θ steps no rows; give a share or a file, or set training.bilevel=false",
                param="data.theta",
            )
        cut = split(self._rows["train"], theta=shares.get("theta", 0.0), validation=shares.get("validation", 0.0))
        train, theta = cut.train, self._rows.get("theta", cut.theta)
        if not with_theta:
            train = concatenate_datasets([train, self._rows["theta"]]) if "theta" in self._rows else train
            theta = None
        validation = self._rows.get("validation", cut.validation)
        return train, theta, validation if len(validation) else None

    def scored(self, max_rows: int) -> tuple[str, Dataset | None]:
        """The rows of the gate: test, else validation, else none; and which of these."""
        if "test" in self._rows:
            return "test", sample(self._rows["test"], max_rows)
        *_, validation = self.splits(with_theta=False)
        return ("validation", sample(validation, max_rows)) if validation is not None else ("none", None)

    def leaked(self) -> dict[str, int]:
        """How many distinct prompts of the other files are also in the training file, by role; without zeros."""
        import numpy as np

        hashes = {name: _hashes(rows) for name, rows in self._rows.items()}
        train = hashes.pop("train")
        shared = {name: len(np.intersect1d(own, train)) for name, own in hashes.items()}
        return {name: count for name, count in shared.items() if count}

    def lengths(self) -> tuple[float, int, int]:
        """Mean tokens per training row (both sides of a preference), the longest sequence's, and the longest
        answer's."""
        rows = self._rows["train"]
        measured = rows[: min(len(rows), MEASURED_ROWS)]
        sides = [measured[name] for name in ("input_ids", REJECTED) if name in measured]
        sizes = [[len(ids) for ids in side] for side in sides]
        answers = [size - prompt for side in sizes for size, prompt in zip(side, measured["prompt_len"], strict=True)]
        return sum(map(sum, sizes)) / len(sizes[0]), max(map(max, sizes)), max(answers)


def prepare_data(
    spec: FineTuneSpec, backbone: Backbone, tokenizer: Tokenizer, cache: Path, tell: Tell = lambda _text: None
) -> PreparedData:
    """Tokenise the files of a spec (or find them in `cache`); `tell` hears how far it is with long ones.

    Raises DataError, or ConfigError for max_length.
    """
    data, training = spec.data, spec.training
    context = context_length(backbone)
    max_length = training.max_length or context
    if max_length > context:
        raise ConfigError(
            f"training.max_length: {max_length} exceeds the {context} tokens that {backbone.id} supports",
            param="training.max_length",
        )
    files = {name: fetch(location, cache) for name, location in data.files().items()}
    shapes = {name: shape_of(path, data.fields) for name, path in files.items()}
    for name, shape in shapes.items():
        check_objective(spec.objective, name, shape)
    formats = {
        name: replace(format_for_shape(shape, tokenizer), special_tokens_in_content=data.special_tokens_in_content)
        for name, shape in shapes.items()
    }
    if data.template is not None:
        formats = {name: around(form, data.template) for name, form in formats.items()}
    check_format(formats["train"])
    for name, form in formats.items():
        if form != formats["train"]:
            raise DataError(
                f"data.{name}: contains {shapes[name]}, but data.train contains {shapes['train']}; convert one of them",
                param=f"data.{name}",
            )
    form = _conditioned(formats["train"], spec, tokenizer)
    digests = {name: data_digest(path) for name, path in sorted(files.items())}
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / "rows.lock"):  # one worker per host tokenises, the others find its rows
        rows = {
            name: load_rows(
                path, tokenizer, form, max_length, cache / "rows", data.fields, partial(_of_file, tell, name)
            )
            for name, path in files.items()
        }
    joined = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return PreparedData(form, f"sha256:{joined}", max_length, data, rows)


def _of_file(tell: Tell, name: str, text: str) -> None:
    tell(f"data.{name}: {text}")


def _conditioned(form: PromptFormat, spec: FineTuneSpec, tokenizer: Tokenizer) -> PromptFormat:
    """The format with the tokens that end its system turn, if the spec's method conditions on that."""
    from pedro.data.conditioning import SYSTEM, find_head_end

    options = spec.method.options
    if options.get("conditioning") != SYSTEM:
        return form
    end = find_head_end(form, tokenizer)
    if options.get("head_end") not in (None, list(end)):
        raise ConfigError(
            f"method.head_end: the {form.id} prompt format ends system turns with the tokens {list(end)}, got "
            f"{options['head_end']}; leave it out, conditioning: {SYSTEM} finds it",
            param="method.head_end",
        )
    return replace(form, head_end=end)


def sample(rows: Dataset, most: int) -> Dataset:
    """`rows`, or of more than `most` a fair share: those with the smallest prompt hashes, in the file's order."""
    import numpy as np

    if len(rows) <= most:
        return rows
    return rows.select(np.sort(np.argsort(_hashes(rows), kind="stable")[:most]))


def _hashes(rows: Dataset) -> Any:
    """The rows' prompt hashes as one array; of millions, lists of floats would take many times as much."""
    return rows.with_format("numpy", columns=["split_hash"])[:]["split_hash"]


def notes(prepared: PreparedData, training: TrainingSpec, plan: TrainingPlan) -> list[str]:
    """Warnings about these rows before training."""
    notes = [
        f"data.{name}: {count:,} of its prompts are also in data.train, which inflates its score"
        for name, count in prepared.leaked().items()
    ]
    if plan.batch_size < training.batch_size:
        rows = f"more than the {plan.batch_size:,} training rows; every batch is all of them"
        notes.append(f"training.batch_size: {training.batch_size:,} is {rows}")
    return notes


def make_training_plan(
    training: TrainingSpec, train_rows: int, has_theta: bool, objective: Objective = ANSWERS
) -> TrainingPlan:
    """The loop's numbers. A batch has no row twice, so at most all rows."""
    batch_size = min(training.batch_size, train_rows)
    epoch = train_rows / batch_size
    by_epochs = max(1, math.ceil(training.epochs * epoch)) if training.epochs is not None else None
    steps = min(steps for steps in (by_epochs, training.max_steps) if steps is not None)
    validate_every = training.eval_every or max(1, math.ceil(epoch))
    return TrainingPlan(
        steps=steps,
        batch_size=batch_size,
        accumulation=training.gradient_accumulation,
        lr=training.lr,
        theta_lr=training.theta_lr or training.lr,
        warmup=training.warmup,
        bilevel=training.bilevel and has_theta,
        theta_every=training.theta_every,
        validate_every=validate_every,
        checkpoint_every=training.checkpoint_every or validate_every,
        patience=training.patience,
        seed=training.seed,
        objective=objective,
    )
