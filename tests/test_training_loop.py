"""The loop on plain torch: which rows it meets, resuming, stopping, failing, and what it leaves behind."""

import errno
import math
import traceback
from types import SimpleNamespace

import pytest
import torch
from training_runs import (
    DiesAfterCheckpoint,
    Interrupted,
    LocalReporter,
    context_for,
    parameters,
    run,
    same,
    spec_for,
    write_rows,
)
from transformers import AutoModelForCausalLM

from pedro.adapter_directory import read_manifest, verify_adapter
from pedro.backbone import load_model
from pedro.errors import ConfigError, TrainingError, UnavailableError
from pedro.evaluation.saved import load_saved
from pedro.evaluation.scoring import Score, answer_loss, score
from pedro.methods.output_head import supervised
from pedro.training import checkpoints, worker
from pedro.training.batches import RowStream, fetch, slices, supervised_tokens, tensors, token_loss
from pedro.training.bilevel import OMEGA, THETA
from pedro.training.loop import SECONDS_LEFT, Data, batch_step, mean_losses, seed_numbers, train
from pedro.training.paired_test import compare_rows
from pedro.training.worker_group import WorkerGroup


class Watched(list):
    """Rows that remember which group was active when they were read."""

    def __init__(self, rows, optimizer):
        super().__init__(rows)
        self.optimizer, self.seen = optimizer, set()

    def __getitem__(self, index):
        self.seen.add(self.optimizer.active)
        return super().__getitem__(index)


def test_theta_rows_never_meet_an_omega_step_nor_train_rows_a_theta_step(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    optimizer, data = context.engine.optimizer, context.data
    seen_train, seen_theta = Watched(list(data.train), optimizer), Watched(list(data.theta), optimizer)
    prompts = [{tuple(row["input_ids"][: row["prompt_len"]]) for row in rows} for rows in (data.train, data.theta)]
    assert not prompts[0] & prompts[1]
    # the batch is fetched just before its step: watch what the step itself activates
    watched = Data(seen_train, seen_theta, data.validation, data.pad_id)
    train(
        context.engine, context.alternation, context.plan, watched, LocalReporter(tmp_path / "run", lambda line: None)
    )
    assert seen_train.seen == {frozenset([OMEGA])}
    assert seen_theta.seen == {frozenset([THETA])}


@pytest.mark.parametrize("method", ["pedro", {"name": "lora", "dropout": 0.2}])
def test_an_interrupted_run_ends_with_the_same_bits_as_an_uninterrupted_one(tmp_path, method):
    spec = spec_for(tmp_path, method, max_steps=9, eval_every=3, checkpoint_every=2)
    whole = context_for(spec, tmp_path)
    outcome = run(whole, tmp_path / "whole")
    for died in (4, 8):
        broken = context_for(spec, tmp_path)
        with pytest.raises(Interrupted):
            train(
                broken.engine, broken.alternation, broken.plan, broken.data, DiesAfterCheckpoint(tmp_path / "run", died)
            )
    resumed = context_for(spec, tmp_path)
    again = run(resumed, tmp_path / "run")
    assert same(parameters(resumed), parameters(whole))
    assert (again.validations, again.best_step, again.tokens) == (
        outcome.validations,
        outcome.best_step,
        outcome.tokens,
    )


def test_training_stops_without_gain_and_restores_the_best_parameters(tmp_path):
    context = context_for(spec_for(tmp_path, max_steps=60, eval_every=2, patience=2, lr=0.3, warmup=0.0), tmp_path)
    outcome = run(context, tmp_path / "run")
    losses = dict(outcome.validations)
    assert outcome.stopped_early
    assert outcome.steps < 60
    assert outcome.best_step == min(losses, key=losses.get) < outcome.steps
    now = mean_losses(context.engine, context.data.validation, 8, context.data.pad_id, WorkerGroup())[0]
    assert now == pytest.approx(outcome.validation_loss, rel=1e-6)


def test_checkpoints_hold_what_is_trained_and_nothing_of_the_backbone(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    run(context, tmp_path / "run")
    files = {path.name: path.stat().st_size for path in (tmp_path / "run" / "last").iterdir()}
    tensors = {"rank0.safetensors", "parameters.safetensors", "best.safetensors"}
    assert set(files) == {*tensors, "progress.json", "rank0.digests.json"}
    assert sum(files.values()) < 6 * 4 * context.trainable_parameters
    backbone = sum(p.numel() for p in context.model.parameters()) * 4
    assert sum(files.values()) < backbone


def test_the_time_that_is_left_is_told_until_none_is(tmp_path):
    class Curves(LocalReporter):
        def metrics(self, step, values):
            if SECONDS_LEFT in values:
                told.append((step, values[SECONDS_LEFT]))

    told = []
    context = context_for(spec_for(tmp_path, max_steps=20, eval_every=20), tmp_path)
    worker.train_and_score(context, Curves(tmp_path / "run", lambda _: None))
    (first, left), (last, none) = told
    assert (first, last, none) == (10, 20, 0.0)
    assert left > 0


def test_a_loss_that_is_no_number_is_a_clear_error(tmp_path):
    context = context_for(spec_for(tmp_path, lr=100, clip=0, warmup=0.0, max_steps=40, eval_every=40), tmp_path)
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) at step \d+; lower training.lr"):
        run(context, tmp_path / "run")
    assert not (tmp_path / "run" / "last").exists()


def test_a_full_disk_is_a_clear_error_and_the_last_checkpoint_stays(tmp_path, monkeypatch):
    spec = spec_for(tmp_path, eval_every=2)
    context = context_for(spec, tmp_path)
    real = checkpoints.save_file

    def fails_later(tensors, path):
        if len(list((tmp_path / "run").glob("last"))):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(tensors, path)

    monkeypatch.setattr(checkpoints, "save_file", fails_later)
    with pytest.raises(TrainingError, match=r"No space left on device.*free some space or set PEDRO_STORAGE"):
        run(context, tmp_path / "run")
    monkeypatch.undo()
    resumed = context_for(spec, tmp_path)
    assert run(resumed, tmp_path / "run").steps == 6


def test_a_full_disk_while_saving_the_adapter_leaves_nothing(tmp_path, monkeypatch):
    from pedro import adapter_directory

    context = context_for(spec_for(tmp_path, max_steps=1), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(adapter_directory, "_write", full)
    with pytest.raises(UnavailableError, match="No space left"):
        worker.save(context, trained, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("method", ["pedro", "pedro-3", "pedro-5", "para", "lora", "ia3", "full"])
def test_every_method_trains_scores_and_saves_through_the_one_loop(tmp_path, method):
    context = context_for(spec_for(tmp_path, method, max_steps=4, eval_every=4), tmp_path)
    before = mean_losses(context.engine, context.data.validation, 8, context.data.pad_id, WorkerGroup())[0]
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    assert trained.outcome.validation_loss < before
    assert trained.outcome.optimizer_steps == (8 if context.plan.bilevel else 4)
    digest = worker.save(context, trained, tmp_path / "adapter")
    manifest = verify_adapter(tmp_path / "adapter", context.backbone.digest)
    assert manifest == read_manifest(tmp_path / "adapter")
    assert manifest["digest"] == digest
    assert manifest["spec"]["training"]["max_steps"] == 4
    assert manifest["prompt_format"]["id"] == "raw"
    metrics = manifest["metrics"]
    assert metrics["split"] == "validation"
    assert metrics["rows"] == len(context.data.validation)
    assert metrics["loss"] == pytest.approx(trained.outcome.validation_loss, rel=1e-5)
    assert metrics["backbone_loss"] == pytest.approx(before, rel=1e-5)
    again = worker.score_directory(context, tmp_path / "adapter")
    assert (again.accuracy, again.rows) == (metrics["accuracy"], metrics["rows"])
    assert again.loss == pytest.approx(metrics["loss"], rel=1e-5)
    paired = compare_rows("accuracy", trained.score.each, again.each)  # with itself, row by row
    assert (paired.rows, paired.better, paired.worse) == (metrics["rows"], 0, 0)
    assert paired.score == metrics["accuracy"]


@pytest.mark.parametrize(
    ("method", "champion", "loads"),
    [("lora", "pedro", 1), ("pedro", "ia3", 1), ("p-tuning-v2", "lora", 1), ("full", "pedro", 2), ("lora", "full", 2)],
)
def test_a_job_scores_the_champion_exactly_without_a_second_backbone_in_memory(
    tmp_path, monkeypatch, method, champion, loads
):
    other = context_for(spec_for(tmp_path, champion, max_steps=2), tmp_path)
    worker.save(
        other, worker.train_and_score(other, LocalReporter(tmp_path / "c", lambda line: None)), tmp_path / "best"
    )
    load, loaded = AutoModelForCausalLM.from_pretrained, []
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *a, **k: loaded.append(a) or load(*a, **k))
    context = context_for(spec_for(tmp_path, method, max_steps=2), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    worker.save(context, trained, tmp_path / "new")
    found = worker.score_directory(context, tmp_path / "best")
    assert len(loaded) == loads
    if loads == 2:
        assert not any(p.numel() for p in context.model.parameters())  # given up before the second was loaded
    fresh = load_saved(tmp_path / "best", read_manifest(tmp_path / "best"), context.backbone, "float32", "cpu")
    rows = list(context.scored_rows()[1])
    assert found == score(fresh, context.tokenizer, rows)
    bare = score(load_model(context.backbone), context.tokenizer, rows)
    assert (trained.metrics["backbone_loss"], trained.metrics["backbone_accuracy"]) == (bare.loss, bare.accuracy)


def test_slices_of_a_batch_add_up_to_the_whole_batch(tmp_path):
    results = []
    for accumulation in (1, 3):
        spec = spec_for(tmp_path, gradient_accumulation=accumulation, max_steps=3)
        context = context_for(spec, tmp_path)
        results.append((run(context, tmp_path / f"run{accumulation}"), parameters(context)))
    (one, whole), (three, sliced) = results
    assert three.validation_loss == pytest.approx(one.validation_loss, rel=1e-5)
    assert all(torch.allclose(whole[name], sliced[name], atol=2e-5) for name in whole)


def test_activation_checkpointing_changes_no_bit_of_the_result(tmp_path):
    results = []
    for name, on in (("plain", False), ("saving", True)):
        context = context_for(spec_for(tmp_path, gradient_checkpointing=on, max_steps=3), tmp_path)
        run(context, tmp_path / name)
        results.append(parameters(context))
    assert same(*results)


def test_the_answer_is_never_part_of_what_conditions_it(tmp_path):
    context = context_for(spec_for(tmp_path, max_steps=3), tmp_path)
    run(context, tmp_path / "run")
    row = dict(context.data.train[0])
    other = {
        **row,
        "input_ids": [*row["input_ids"][: row["prompt_len"]], *reversed(row["input_ids"][row["prompt_len"] :])],
    }
    logits = []
    for version in (row, other):
        batch = tensors([version], context.data.pad_id, "cpu", version)
        prompt = torch.arange(batch.pop("labels").shape[1])[None] < row["prompt_len"]
        logits.append(context.engine.forward(prompt, **batch))
    assert torch.equal(*logits)


def test_logits_exist_for_answer_tokens_alone(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    rows = [context.data.train[i] for i in range(5)]
    seen = []
    context.model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    batch_step(context.engine, rows, context.plan, context.data.pad_id, salt=0)
    mean_losses(context.engine, rows, 5, context.data.pad_id, WorkerGroup(0, 1))
    answer_loss(context.model, context.tokenizer, rows)
    count = sum(len(row["input_ids"]) - row["prompt_len"] for row in rows)
    assert {shape[:2] for shape in seen} == {(1, count)}


def test_every_row_is_met_once_an_epoch_in_full_batches_and_in_another_order_each_time():
    rows = [{"input_ids": [i], "prompt_len": 0} for i in range(10)]
    stream = RowStream(rows, 4, seed=3)
    met = [row["input_ids"][0] for k in range(5) for row in stream.batch(k)]
    assert sorted(met[:10]) == sorted(met[10:]) == list(range(10))
    assert met[:10] != met[10:]
    assert [row["input_ids"][0] for row in RowStream(rows, 4, seed=3).batch(2)] == met[8:12]
    assert met != [row["input_ids"][0] for k in range(5) for row in RowStream(rows, 4, seed=4).batch(k)]


def test_rows_of_a_data_set_are_read_all_at_once(tmp_path):
    rows = context_for(spec_for(tmp_path), tmp_path).data.train
    places = [3, 0, 3, 5]
    assert fetch(rows, places) == [rows[place] for place in places] == fetch(list(rows), places)
    together = SimpleNamespace(__getitems__=lambda places: [{"at": place} for place in places])
    assert fetch(together, range(2)) == [{"at": 0}, {"at": 1}], "one read"


def test_a_cpu_is_seeded_as_by_torch_but_without_a_look_at_the_stack(monkeypatch):
    torch.manual_seed(2**40)
    wanted = torch.rand(3)
    monkeypatch.setattr(traceback, "format_stack", lambda: pytest.fail("the stack was kept for an accelerator"))
    seed_numbers(torch.device("cpu"), 2**40)
    assert torch.equal(torch.rand(3), wanted)


def test_slices_deal_every_row_to_exactly_one_worker():
    rows = list(range(11))
    for world in (1, 2, 3):
        for accumulation in (1, 2, 4):
            dealt = [row for rank in range(world) for part in slices(rows, rank, world, accumulation) for row in part]
            assert sorted(dealt) == rows


def test_a_worker_without_rows_adds_nothing_but_takes_part():
    filler = {"input_ids": [1, 2, 3], "prompt_len": 1}
    batch = tensors([], pad_id=0, device="cpu", filler=filler)
    positions, wanted = supervised(batch["labels"])
    logits = torch.randn(1, 3, 5, requires_grad=True)
    loss = token_loss(logits[positions], wanted)
    loss.backward()
    assert loss == 0
    assert torch.count_nonzero(logits.grad) == 0
    assert supervised_tokens([filler]) == 2


def test_no_theta_rows_for_a_method_with_theta_names_both_remedies(tmp_path):
    spec = spec_for(tmp_path)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"theta": 0.0})})
    with pytest.raises(ConfigError, match=r"data.theta: 0 .*training.bilevel=false"):
        context_for(spec, tmp_path)


def test_files_for_theta_validation_and_test_are_used_as_they_are(tmp_path):
    spec = spec_for(tmp_path)
    files = {
        name: str(write_rows(tmp_path / f"{name}.jsonl", count, start))
        for name, count, start in (("theta", 5, 1000), ("validation", 7, 2000), ("test", 9, 3000))
    }
    spec = spec.model_copy(update={"data": spec.data.model_copy(update=files)})
    context = context_for(spec, tmp_path)
    assert (len(context.data.train), len(context.data.theta), len(context.data.validation)) == (72, 5, 7)
    split, rows = context.scored_rows()
    assert (split, len(rows)) == ("test", 9)


def test_without_validation_the_last_parameters_stay_and_nothing_is_scored(tmp_path):
    spec = spec_for(tmp_path, max_steps=2)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"validation": 0.0})})
    trained = worker.train_and_score(context_for(spec, tmp_path), LocalReporter(tmp_path / "run", lambda line: None))
    assert trained.outcome.validation_loss is None
    assert trained.outcome.best_step == 2
    assert trained.metrics["split"] == "none"


def test_the_loss_of_a_batch_is_the_mean_over_its_answer_tokens(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    rows = RowStream(context.data.train, 8, 0).batch(0)
    (loss, right), tokens = batch_step(context.engine, rows, context.plan, context.data.pad_id, salt=0)
    assert tokens == supervised_tokens(rows)
    fresh = context_for(spec_for(tmp_path), tmp_path)
    for accumulation in (1, 2, 4):  # more slices than rows in the end
        means = mean_losses(fresh.engine, rows, 3, fresh.data.pad_id, WorkerGroup(), accumulation=accumulation)
        assert means == pytest.approx([float(loss), float(right)], rel=1e-5)
    assert math.isfinite(loss)


def test_validation_holds_no_more_logits_at_a_time_than_a_slice_of_its_longest_rows(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    row, seen = context.data.train[0], []
    context.model.get_output_embeddings().register_forward_hook(lambda module, args, output: seen.append(output.shape))
    mean_losses(context.engine, [row] * 8, 8, context.data.pad_id, WorkerGroup(), accumulation=4)
    assert [shape[1] for shape in seen] == [2 * supervised_tokens([row])] * 4


@torch.no_grad()
def test_the_token_accuracy_is_the_share_of_answer_tokens_that_are_the_likeliest(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    rows, right, count = RowStream(context.data.train, 8, 0).batch(0), 0, 0
    for row in rows:  # written out, one after the other
        ids, start = torch.tensor([row["input_ids"]]), row["prompt_len"]
        logits = context.model(input_ids=ids, prompt_lens=torch.tensor([start])).logits[0]
        right += sum(int(logits[at - 1].argmax()) == int(ids[0, at]) for at in range(start, ids.shape[1]))
        count += ids.shape[1] - start
    _, share = mean_losses(context.engine, rows, 3, context.data.pad_id, WorkerGroup())
    assert share == pytest.approx(right / count)
    assert 0 < share < 1


def test_scores_of_workers_are_joined_in_the_order_of_the_rows():
    class Three(WorkerGroup):
        def gather(self, value):
            return [Score(1, 3, 1.0, 3, ((0, 0, 1), (3, 0, 1), (6, 0, 1))), value, Score(0, 1, 0.0, 1, ((2, 0, 1),))]

    context = SimpleNamespace(spec=SimpleNamespace(resources=SimpleNamespace(zero_stage=0)))
    joined = worker._joined(context, Score(1, 2, 2.0, 2, ((1, 0, 1), (4, 0, 1))), Three(1, 3))
    assert [row[0] for row in joined.each] == [0, 1, 2, 3, 4, 6]
    assert (joined.correct, joined.rows, joined.tokens) == (2, 6, 6)
