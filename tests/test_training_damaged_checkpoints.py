"""A checkpoint that is not what was written is found before anything of it is loaded; the one before it is taken."""

import errno
import os
from pathlib import Path

import pytest
import ray.train
from training_runs import DiesAfterCheckpoint, Interrupted, LocalReporter, context_for, parameters, same, spec_for

from pedro.training import trainer
from pedro.training.checkpoints import DamagedCheckpoint, read_checkpoint
from pedro.training.loop import train
from pedro.training.trainer import ANSWER, STATE, RayReporter
from pedro.training.worker_group import ALONE


class Kept(DiesAfterCheckpoint):
    """Keeps each checkpoint under Ray Train's names, and dies after that of `step`."""

    def checkpoint(self, engine, group, state, best):
        self.directory, run = self.directory / f"checkpoint_{state.step:03}", self.directory
        try:
            super().checkpoint(engine, group, state, best)
        finally:
            last = self.directory / "last"
            if last.is_dir():
                last.rename(self.directory / STATE)
            self.directory = run


class Resuming(LocalReporter):
    """Resumes as a worker of Ray Train does."""

    def resume(self, engine, group):
        reporter = RayReporter(6)
        reporter.line = self.log
        return reporter.resume(engine, group)


def run(context, reporter):
    return train(context.engine, context.alternation, context.plan, context.data, reporter)


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A folder whose `run` has the checkpoints of steps 2 and 4 of 6, and what the whole run ends as."""
    folder = tmp_path_factory.mktemp("interrupted")
    spec = spec_for(folder, eval_every=3, checkpoint_every=2)
    whole = context_for(spec, folder)
    outcome = run(whole, LocalReporter(folder / "whole", lambda _line: None))
    broken = context_for(spec, folder)
    with pytest.raises(Interrupted):
        run(broken, Kept(folder / "run", 4))
    return folder, spec, outcome, parameters(whole)


def at_last(folder, monkeypatch):
    """Ray Train knows the checkpoint of step 4 as the last."""
    last = ray.train.Checkpoint.from_directory(folder / "run" / "checkpoint_004")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: last)
    return Path(last.path)


@pytest.mark.parametrize("file", ["parameters.safetensors", "best.safetensors", "rank0.safetensors", "progress.json"])
def test_a_file_that_was_cut_changed_or_lost_is_found_and_nothing_is_loaded(interrupted, file):
    folder, spec, _, _ = interrupted
    context = context_for(spec, folder)
    fresh, state = parameters(context), folder / "run" / "checkpoint_004" / STATE
    written = (state / file).read_bytes()
    try:
        for damaged in (written[:-4], written[:-4] + b"1234", None):
            (state / file).unlink()
            if damaged is not None:
                (state / file).write_bytes(damaged)
            with pytest.raises(DamagedCheckpoint, match="checkpoint: "):
                read_checkpoint(state, context.engine, ALONE)
            (state / file).write_bytes(written)
    finally:
        (state / file).write_bytes(written)
    assert same(parameters(context), fresh)
    assert read_checkpoint(state, context.engine, ALONE)[0].step == 4


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO, errno.EMFILE, errno.EACCES])
def test_an_error_that_may_pass_is_no_damage_and_no_reason_to_go_back(interrupted, monkeypatch, number):
    folder, spec, _, _ = interrupted
    at_last(folder, monkeypatch)

    def fail(_path):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pedro.training.checkpoints._digest", fail)
    with pytest.raises(OSError, match=os.strerror(number)):
        run(context_for(spec, folder), Resuming(folder / "later", lambda _line: None))


def test_a_run_whose_last_checkpoint_is_damaged_goes_on_from_the_one_before_to_the_same_bits(interrupted, monkeypatch):
    folder, spec, outcome, wanted = interrupted
    file = at_last(folder, monkeypatch) / STATE / "parameters.safetensors"
    (folder / "run" / "checkpoint_009").mkdir(exist_ok=True)  # one that was being written
    written, lines = file.read_bytes(), []
    try:
        file.write_bytes(written[:100])
        context = context_for(spec, folder)
        again = run(context, Resuming(folder / "again", lines.append))
    finally:
        file.write_bytes(written)
    assert [line for line in lines if "resum" in line] == [lines[0], "resumed at step 2/6"]
    assert "resuming from the one before it" in lines[0]
    assert same(parameters(context), wanted)
    assert (again.validations, again.tokens) == (outcome.validations, outcome.tokens)


def test_a_run_without_a_whole_checkpoint_begins_anew(interrupted, monkeypatch, tmp_path):
    folder, spec, _, wanted = interrupted
    (tmp_path / "checkpoint_001").mkdir()
    empty = ray.train.Checkpoint.from_directory(tmp_path / "checkpoint_001")
    monkeypatch.setattr(ray.train, "get_checkpoint", lambda: empty)
    context = context_for(spec, folder)
    run(context, Resuming(folder / "anew", lambda _line: None))
    assert same(parameters(context), wanted)


def test_a_result_that_is_damaged_is_no_end(tmp_path):
    result = ray.train.Checkpoint.from_directory(tmp_path)
    assert not trainer._finished(None)
    (tmp_path / ANSWER).write_text("{}")
    (tmp_path / trainer.ADAPTER).mkdir()
    assert not trainer._finished(result)
