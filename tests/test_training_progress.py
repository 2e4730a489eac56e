"""A job's lines for people, read back: its phase, its steps, the time that is left."""

from __future__ import annotations

import re

import pytest
from training_runs import LocalReporter, context_for, spec_for

from pedro.training import worker
from pedro.training.progress import Phase, Progress, clock, read_progress


def test_the_lines_of_a_real_training_are_read(tmp_path):
    lines: list[str] = []
    context = context_for(spec_for(tmp_path, max_steps=6, eval_every=3), tmp_path)
    worker.train_and_score(context, LocalReporter(tmp_path / "run", lines.append))
    seen = [read_progress(lines[:count]) for count in range(len(lines) + 1)]
    assert seen[0] == Progress(Phase.STARTING)
    steps = [(each.step, each.steps) for each in seen if each.phase == Phase.TRAINING]
    assert steps[-1] == (6, 6)
    assert steps == sorted(steps)
    assert any(each.left_s is not None for each in seen)
    assert (seen[-1].phase, seen[-1].share) == (Phase.SCORING, 1.0)
    speeds = [re.search(r"([\d,]+) tokens/s \(([\d,]+) of answers\)", line) for line in lines if "tokens/s" in line]
    counted = [[int(number.replace(",", "")) for number in speed.groups()] for speed in speeds if speed]
    assert counted
    assert all(tokens > answers > 0 for tokens, answers in counted), "prompts are read, too"


@pytest.mark.parametrize(
    ("lines", "progress"),
    [
        ([], Progress(Phase.STARTING)),
        (["training 21,320 parameters on 1,400 rows, 1,300 steps"], Progress(Phase.TRAINING, 0, 1300)),
        (["step 650/1,300 · loss 0.512 · 900 tokens/s (9 of answers), 3.0 samples/s · 1:05 left"],
         Progress(Phase.TRAINING, 650, 1300, 65.0)),
        (["step 10/1,300 · loss 0.512 · 2:01:05 left"], Progress(Phase.TRAINING, 10, 1300, 7265.0)),
        (["trained 900 steps, where validation had stopped improving, in 70 s; scoring"], Progress(Phase.SCORING, 900)),
        (["trained 900 steps in 70 s; scoring", "scored; registering"], Progress(Phase.REGISTERING, 900)),
        (["trained 900 steps in 70 s; scoring", "training 1 parameters on 2 rows, 50 steps"],
         Progress(Phase.TRAINING, 0, 50)),
        (["step by step", "training is fun", "error: the loss is NaN"], Progress(Phase.STARTING)),
    ],
)  # fmt: skip
def test_the_last_word_counts_and_other_lines_say_nothing(lines, progress):
    assert read_progress(lines) == progress


@pytest.mark.parametrize(("seconds", "shown"), [(0.9, "0:00"), (65.2, "1:05"), (3599, "59:59"), (7265, "2:01:05")])
def test_a_time_that_is_shown_is_read_again(seconds, shown):
    assert clock(seconds) == shown
    assert read_progress([f"step 1/2 · {shown} left"]).left_s == int(seconds)


def test_half_of_the_steps_is_half_of_the_bar():
    assert Progress(Phase.TRAINING, 650, 1300).share == 0.5
    assert Progress(Phase.STARTING).share == 0.0
