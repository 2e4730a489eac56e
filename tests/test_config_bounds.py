"""Specs that try to eat the machine: each is one line, at once, before anything is loaded."""

import os
import time

import pytest

from pedro.errors import ConfigError
from pedro.search_space import Dimension, drawn, every
from pedro.training.spec import load_finetune_spec

GOOD = "tenant: acme\nadapter: support\ndata: {train: train.jsonl}\n"
ANCHORS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
REFUSED = {
    "nine nested anchors": (ANCHORS, "more than 100,000 values"),
    "an anchor in itself": ("data: &a {train: *a}\n", "contains itself"),
    "5,000 deep": ("data: " + "[" * 5000 + "]" * 5000, "nested more than 50 deep"),
    "5,000 deep in blocks": ("\n".join(" " * n + "a:" for n in range(5000))[:900_000], "nested more than 50 deep"),
    "a key twice": (GOOD + "tenant: globex\n", r"the key 'tenant' appears twice \(first in line 1\).*line 4"),
    "a key twice below": (GOOD + "training:\n  lr: 1\n  lr: 2\n", "'lr' appears twice"),
    "a date that there is not": (GOOD + "training: {lr: 2026-13-45}\n", "'2026-13-45' is no value"),
    "a number of 5,000 digits": (GOOD + f"training: {{seed: {'9' * 5000}}}\n", "is no value"),
    "two megabytes": (GOOD + "# " + "x" * 2_000_000, "2,000,0.. bytes, and a spec may have 1,000,000"),
    "seed": (GOOD + "training: {seed: 1099511627776}", "training.seed: .*less than 4294967296"),
    "lr": (GOOD + "training: {lr: 1.0e+308}", "training.lr: .*less than or equal to 100"),
    "batch_size": (GOOD + "training: {batch_size: 1000000000000}", "training.batch_size: .*1000000, got"),
    "max_failures": (GOOD + f"resources: {{max_failures: 1{'0' * 30}}}", "resources.max_failures: .*1000, got"),
    "a long value": (GOOD + f"training: {{lr: {'x' * 100_000}}}", "got 'x{199}…"),
}


@pytest.mark.parametrize(("text", "reason"), REFUSED.values(), ids=REFUSED)
def test_a_spec_that_would_eat_time_or_memory_is_refused_at_once(tmp_path, text, reason):
    path = tmp_path / "spec.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(ConfigError, match=reason) as caught:
        load_finetune_spec(path)
    assert len(caught.value.message) < 1000
    assert time.process_time() - began < 10, "of computing, whatever else the machine does"


def test_a_device_a_pipe_and_a_directory_are_no_specs(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, what in (("/dev/zero", "a device or pipe"), (tmp_path / "pipe", "pipe"), (tmp_path, "a directory")):
        with pytest.raises(ConfigError, match=what):
            load_finetune_spec(path)


def test_anchors_and_merge_keys_work_as_ever_within_the_bounds(tmp_path):
    path = tmp_path / "spec.yaml"
    path.write_text("x: &x {lr: 0.1, seed: 3}\n".replace("x:", "training:") + GOOD)
    assert load_finetune_spec(path).training.seed == 3
    path.write_text(GOOD + "method: {name: pedro}\ntraining:\n  <<: {lr: 0.1, seed: 3}\n  seed: 4\n")
    assert load_finetune_spec(path).training.seed == 4


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("training.lr=[[[[" + "[" * 5000, "nested more than 50 deep"),
        ("method." + "a." * 5000 + "b=1", "nested more than 50 deep"),
        ("training.seed=" + "9" * 5000, "not a YAML value"),
    ],
)
def test_an_override_is_bounded_too(tmp_path, word, reason):
    path = tmp_path / "spec.yaml"
    path.write_text(GOOD)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_finetune_spec(path, [word])
    assert len(caught.value.message) < 1000


def test_grids_that_nobody_could_train_are_refused_before_they_are_listed():
    space = {f"method.o{n}": Dimension.model_validate({"grid": list(range(50))}) for n in range(8)}
    for make in (lambda: every(space), lambda: drawn(space, 1, 0)):
        with pytest.raises(ConfigError, match="39,062,500,000,000 trials"):
            make()
