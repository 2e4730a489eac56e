"""The dry run: its numbers are those of the run itself."""

import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from training_runs import context_for, run, spec_for

from pedro.errors import ConfigError, DataError
from pedro.training import context
from pedro.training.calibrate import Calibration, calibrate
from pedro.training.estimate import dry_run


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    """No more is timed than two steps and a few rows."""
    monkeypatch.setattr("pedro.training.calibrate.FEW_SECONDS", 0.0)
    monkeypatch.setattr("pedro.training.calibrate.SCORED_ROWS", 4)


def test_the_dry_run_counts_what_the_run_then_does(tmp_path):
    spec = spec_for(tmp_path, max_steps=4, theta_every=2)
    report = dry_run(spec)
    context = context_for(spec, tmp_path)
    outcome = run(context, tmp_path / "run")
    assert (report.steps, report.optimizer_steps) == (outcome.steps, outcome.optimizer_steps) == (4, 6)
    assert report.trainable_parameters == context.trainable_parameters == 21_320
    assert report.backbone_parameters == 260_032
    assert report.rows == {
        "train": len(context.data.train),
        "theta": len(context.data.theta),
        "validation": len(context.data.validation),
    }
    parts = report.seconds_by_part
    assert parts["of steps"] == pytest.approx(4 * report.seconds_per_step)
    assert report.seconds == pytest.approx(sum(parts.values()))
    assert all(value > 0 for value in parts.values())
    assert report.memory_bytes["backbone"] == 4 * 260_032
    assert report.memory_bytes["optimizer"] == 8 * 21_320
    assert report.to_dict()["spec"] == spec.to_dict()
    text = str(report)
    for piece in (
        "21,320 parameters",
        "8.20 %",
        "4 on Ω and 2 on Θ (6 optimizer steps) of 8 rows, ended by max_steps (4), before epochs (100)",
        "theta (for the steps on Θ)",
        "timed on this machine",
        "s to start, ",
        "of tensors, about ",
        "activations",
    ):
        assert piece in text, text


def test_a_batch_of_more_rows_than_there_are_is_all_of_them_and_said(tmp_path):
    """A batch of 10**9 rows took all memory in the dry run; the job itself would have held every row many times."""
    spec = spec_for(tmp_path, batch_size=1_000_000, epochs=3)
    report = dry_run(spec)
    plan = context_for(spec, tmp_path).plan
    assert (plan.batch_size, plan.steps, report.steps) == (report.rows["train"], 3, 3)
    assert f"1,000,000 is more than the {plan.batch_size} training rows" in str(report)


def test_prompts_that_a_held_out_file_shares_with_training_are_said(tmp_path):
    spec = spec_for(tmp_path)
    train = Path(spec.data.train)
    (tmp_path / "test.jsonl").write_text("".join(train.read_text().splitlines(keepends=True)[:5]))
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"test": str(tmp_path / "test.jsonl")})})
    assert "data.test: 5 of its prompts are also in data.train" in str(dry_run(spec, calibrated=False))


def test_zero_and_bf16_show_in_the_memory_and_stage_3_halves_the_backbone_where_it_can_be_cut(tmp_path, monkeypatch):
    plain = dry_run(spec_for(tmp_path, "lora"))
    spec = spec_for(tmp_path, "lora", {"workers": 2, "zero_stage": 3}, precision="bf16")
    report = dry_run(spec)
    sharded = report.memory_bytes
    assert sharded["backbone"] * 4 == plain.memory_bytes["backbone"]
    assert sharded["gathered"] == 2 * 512 * 64, "the embedding, in bfloat16"
    for part in ("adapter", "gradients", "optimizer"):
        assert sharded[part] * 2 == plain.memory_bytes[part]
    assert report.process_bytes > plain.process_bytes > 500e6
    assert report.seconds_by_part["to start"] > plain.seconds_by_part["to start"]  # DeepSpeed's
    assert "gathered" in str(report)
    assert "gathered" not in str(plain)
    monkeypatch.setattr("pedro.training.backbone_pieces.can_be_cut", lambda _: False)
    whole = dry_run(spec, calibrated=False)
    assert whole.memory_bytes["backbone"] == 2 * sharded["backbone"]
    assert "each worker loads the whole backbone first" in str(whole)


def test_a_dry_run_says_what_ends_training(tmp_path):
    for epochs, steps, told in (
        (None, 7, "max_steps (7)"),
        (1, 700, "epochs (1), before max_steps (700)"),
        (2, None, "epochs (2)"),
    ):
        assert dry_run(spec_for(tmp_path, epochs=epochs, max_steps=steps), calibrated=False).ends_by == told


def test_a_wrong_method_option_is_told_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match=r"method.rr: unknown option; did you mean r\?"):
        dry_run(spec_for(tmp_path, {"name": "pedro", "rr": 3}))


def test_an_adapter_too_large_to_be_timed_here_is_counted_alone(tmp_path):
    report = dry_run(spec_for(tmp_path, {"name": "lora", "r": 1_000_000}))
    assert report.trainable_parameters > 10**9
    assert "assumed" in report.time_from


def test_what_the_job_would_refuse_is_refused_where_nothing_is_timed(tmp_path):
    spec = spec_for(tmp_path, {"name": "lora-dash", "launch": 500}, {"gpus_per_worker": 1})
    with pytest.raises(ConfigError, match=r"method\.launch: expected less than the \d+ steps"):
        dry_run(spec)


def test_a_length_beyond_the_backbones_context_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"training.max_length: 4096 exceeds the 512 tokens"):
        dry_run(spec_for(tmp_path, max_length=4096))


def test_a_missing_file_is_named(tmp_path):
    spec = spec_for(tmp_path)
    gone = spec.model_copy(update={"data": spec.data.model_copy(update={"train": str(tmp_path / "gone.jsonl")})})
    with pytest.raises(DataError, match=r"gone\.jsonl"):
        dry_run(gone)


def test_a_dry_run_measures_what_a_step_takes_and_says_so(tmp_path):
    blocks = [bytearray(2**16) for _ in range(2**11)]
    kept = blocks[::32]
    del blocks  # freed, but the process keeps it for its own: a step that used that would seem to take nothing
    report = dry_run(spec_for(tmp_path, batch_size=40, theta_every=2))
    assert report.memory_from == "measured"
    assert report.memory_bytes["activations"] > 2**20
    assert "steps of 40 rows" in report.time_from
    assert "(measured)" in str(report)
    assert kept


def test_without_calibration_nothing_is_loaded_and_a_speed_is_assumed(tmp_path, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise AssertionError("a backbone was loaded")

    monkeypatch.setattr(context, "load_model", refuse)
    report = dry_run(spec_for(tmp_path), calibrated=False)
    assert report.time_from.endswith("assumed 5e+10/s for each worker; not timed: not asked for")
    assert report.memory_from == "estimate"
    assert report.seconds_per_step > 0
    with pytest.raises(AssertionError, match="a backbone was loaded"):
        dry_run(spec_for(tmp_path))


def test_a_calibration_that_has_no_time_left_falls_back(tmp_path):
    report = dry_run(spec_for(tmp_path), bound_s=0.0)
    assert "not timed: loading the backbone took all the time" in report.time_from
    assert report.seconds_per_step > 0


def test_a_batch_that_would_take_too_long_is_cut_and_scaled(tmp_path, monkeypatch):
    clock = itertools.count()
    monkeypatch.setattr("pedro.training.calibrate.time", SimpleNamespace(perf_counter=lambda: next(clock) / 100))
    spec = spec_for(tmp_path, batch_size=8)
    sizes = {"parameters": 10**6, "trained": 10**5}
    whole = calibrate(spec, tmp_path / "cache", 8, **sizes, row_s=0.01, bound_s=60)
    cut = calibrate(spec, tmp_path / "cache", 8, **sizes, row_s=60 / 8 / 2, bound_s=60)
    assert isinstance(whole, Calibration)
    assert isinstance(cut, Calibration)
    assert (whole.rows, cut.rows) == (8, 2)
    assert whole.steps >= 2
    assert cut.per_step == pytest.approx(4 * whole.per_step), "of two rows, where each takes as long as one of eight"


def test_what_does_not_fit_into_memory_is_not_loaded_to_be_timed(tmp_path):
    told = calibrate(spec_for(tmp_path), tmp_path, 8, parameters=10**9, trained=10**12, row_s=0.01)
    assert isinstance(told, str)
    assert "more than the" in told
    if not torch.cuda.is_available():
        on_gpu = spec_for(tmp_path, "pedro", {"gpus_per_worker": 1})
        assert calibrate(on_gpu, tmp_path, 8, parameters=1, trained=1, row_s=0.01) == "there is no GPU here"
