"""Objective dpo: the formula written out naively, gradients of the adapter alone, the one loop and its worker."""

import math

import pytest
import torch
from training_runs import (
    BETA,
    DiesAfterCheckpoint,
    Interrupted,
    LocalReporter,
    context_for,
    dpo_spec_for,
    parameters,
    run,
    same,
    spec_for,
    write_pairs,
)

from pedro.adapter_directory import read_manifest
from pedro.backbone import load_model
from pedro.config import Settings
from pedro.errors import ConfigError, DataError, NotFoundError
from pedro.evaluation.saved import score_file
from pedro.training import worker
from pedro.training.batches import Preferences
from pedro.training.bilevel import OMEGA, THETA
from pedro.training.estimate import dry_run
from pedro.training.job import check_data, judge_version
from pedro.training.job_events import checkpoint_metrics, metrics_event, step_metrics
from pedro.training.loop import batch_step, mean_losses, train
from pedro.training.memory import Sizes, training_memory
from pedro.training.spec import FineTuneSpec
from pedro.training.trainer import Result
from pedro.training.worker_group import ALONE


def naive_loss(context, backbone, row, beta):
    """TRL's formula, a token at a time: no batch, no padding, no mask, no logits left out, and another backbone."""

    def log_likelihood(model, ids, **also):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), **also).logits[0].double()
        return sum(float(logits[at - 1].log_softmax(-1)[ids[at]]) for at in range(row["prompt_len"], len(ids)))

    prompt_lens = torch.tensor([row["prompt_len"]])
    chosen, rejected = (
        beta * (log_likelihood(context.model, ids, prompt_lens=prompt_lens) - log_likelihood(backbone, ids))
        for ids in (row["input_ids"], row["rejected_ids"])
    )
    return -math.log(1 / (1 + math.exp(rejected - chosen))), chosen - rejected, chosen, rejected


@pytest.fixture
def moved(tmp_path):
    """A context whose adapter is not the backbone any more."""
    context = context_for(dpo_spec_for(tmp_path), tmp_path)
    torch.manual_seed(1)
    for _, parameter in context.engine.parameters:
        parameter.data += 0.05 * torch.randn_like(parameter)
    context.engine.mode(training=False)
    return context


def test_loss_and_measures_are_those_of_the_formula_written_out_for_each_pair(moved):
    rows = [moved.data.train[i] for i in range(7)]
    backbone = load_model(moved.backbone)
    naive = [naive_loss(moved, backbone, row, BETA) for row in rows]
    loss, margin, chosen, rejected = (sum(column) / len(rows) for column in zip(*naive, strict=True))
    right = sum(pair[1] > 0 for pair in naive) / len(rows)
    assert len({len(row["rejected_ids"]) for row in rows}) > 1, "padding is part of what is compared"
    assert not math.isclose(loss, math.log(2), abs_tol=1e-3), "the adapter moved"
    for batch, slices in ((1, 1), (3, 1), (3, 2), (7, 1)):  # the last of batches of 3 has one row for two slices
        found = mean_losses(moved.engine, rows, batch, moved.data.pad_id, ALONE, moved.plan.objective, slices)
        assert found == pytest.approx([loss, right, margin, chosen, rejected], rel=1e-4, abs=1e-5), batch


def test_a_fresh_adapter_has_the_loss_of_its_reference_which_prefers_nothing(tmp_path):
    context = context_for(dpo_spec_for(tmp_path), tmp_path)
    rows = [context.data.train[i] for i in range(5)]
    found = mean_losses(context.engine, rows, 2, context.data.pad_id, ALONE, context.plan.objective)
    assert found == pytest.approx([math.log(2), 0.5, 0, 0, 0], abs=1e-6)


@pytest.mark.parametrize("method", ["pedro", "lora", "lpt", "p-tuning-v2", "adalora"])
def test_only_the_active_group_of_the_adapter_gets_a_gradient(tmp_path, method):
    context = context_for(dpo_spec_for(tmp_path, method), tmp_path)
    batch = [context.data.train[i] for i in range(4)]
    roles = (OMEGA,) if context.plan.bilevel else (OMEGA, THETA)
    context.alternation.activate(*roles)
    trains = {name for name, p in context.model.named_parameters() if p.requires_grad}
    context.engine.mode(training=True)
    loss, _ = context.plan.objective.sums(context.engine, batch, context.data.pad_id, batch[0])
    assert {name for name, p in context.model.named_parameters() if p.requires_grad} == trains
    assert context.model.training
    loss.backward()
    reached = {name for name, p in context.model.named_parameters() if p.grad is not None}
    assert reached <= trains
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for _, p in context.model.named_parameters())


def test_slices_add_up_to_the_mean_over_all_pairs_and_a_worker_without_any_takes_part(tmp_path):
    whole, sliced = (
        context_for(dpo_spec_for(tmp_path, gradient_accumulation=parts, clip=0), tmp_path) for parts in (1, 3)
    )
    batch = [whole.data.train[i] for i in range(5)]
    results = []
    for context in (whole, sliced):
        context.alternation.activate(OMEGA)
        sums, tokens = batch_step(context.engine, batch, context.plan, context.data.pad_id, salt=0)
        state = context.engine.optimizer.state
        gradients = [state[p]["exp_avg"] for _, p in context.engine.parameters]  # a tenth of them after one step
        results.append([sums, *gradients])
        sides = [ids for row in batch for ids in (row["input_ids"], row["rejected_ids"])]
        assert tokens == sum(map(len, sides)) - 2 * sum(row["prompt_len"] for row in batch)
    torch.testing.assert_close(results[0], results[1], rtol=1e-3, atol=1e-7)
    assert any(gradient.abs().sum() > 0 for gradient in results[0][1:])
    loss, measures = Preferences(BETA).sums(whole.engine, [], whole.data.pad_id, batch[0])
    loss.backward()
    assert (float(loss.detach()), measures.tolist()) == (0, [0, 0, 0, 0])


@pytest.mark.parametrize("method", ["pedro", {"name": "lora", "dropout": 0.2}])
def test_an_interrupted_run_ends_with_the_same_bits(tmp_path, method):
    spec = dpo_spec_for(tmp_path, method, checkpoint_every=2)
    whole = context_for(spec, tmp_path)
    outcome = run(whole, tmp_path / "whole")
    broken = context_for(spec, tmp_path)
    with pytest.raises(Interrupted):
        train(broken.engine, broken.alternation, broken.plan, broken.data, DiesAfterCheckpoint(tmp_path / "run", 4))
    resumed = context_for(spec, tmp_path)
    again = run(resumed, tmp_path / "run")
    assert same(parameters(resumed), parameters(whole))
    assert (again.validations, again.tokens, again.all_tokens) == (
        outcome.validations,
        outcome.tokens,
        outcome.all_tokens,
    )


class Remembers(LocalReporter):
    """Keeps the points of the curves and the lines."""

    def __init__(self, directory):
        super().__init__(directory, self.keep)
        self.points, self.lines = [], []

    def metrics(self, step, values):
        self.points.append((step, dict(values)))

    def keep(self, line):
        self.lines.append(line)


def test_a_worker_learns_to_prefer_and_saves_what_the_gate_compares(tmp_path):
    spec = dpo_spec_for(tmp_path, max_steps=40, batch_size=16, eval_every=20, theta_lr=1e-4)
    context = context_for(spec, tmp_path)
    reporter = Remembers(tmp_path / "run")
    trained = worker.train_and_score(context, reporter)
    metrics = trained.metrics
    assert (metrics["backbone_preference_accuracy"], metrics["split"]) == (0.5, "validation")
    assert metrics["backbone_loss"] == pytest.approx(math.log(2))
    assert metrics["preference_accuracy"] > 0.9
    assert metrics["loss"] == pytest.approx(trained.outcome.validation_loss, rel=1e-3)
    assert "accuracy" not in metrics
    curve = [values["train/reward_accuracy"] for _, values in reporter.points if "train/reward_accuracy" in values]
    assert curve[0] < curve[-1]
    assert curve[-1] > 0.9
    validated = next(values for _, values in reporter.points if "dev/loss" in values)
    assert set(validated) == {
        "dev/loss", "dev/reward_accuracy", "dev/reward_margin", "dev/chosen_reward", "dev/rejected_reward",
    }  # fmt: skip
    assert any("(reward accuracy " in line for line in reporter.lines)
    events = [metrics_event(step, values) for step, values in reporter.points]
    assert ", validation reward accuracy=" in next(event for event in events if "valid_loss" in event.data).message
    header, *lines = step_metrics(event.data for event in events).splitlines()
    assert header.endswith(",train_reward_accuracy,train_reward_margin,valid_reward_accuracy,valid_reward_margin")
    assert len(lines[-1].split(",")) == len(header.split(","))
    assert checkpoint_metrics(metrics)["full_valid_reward_accuracy"] == metrics["preference_accuracy"]
    digest = worker.save(context, trained, tmp_path / "adapter")
    manifest = read_manifest(tmp_path / "adapter")
    assert (manifest["spec"]["objective"], manifest["spec"]["dpo"]) == ("dpo", {"beta": BETA})
    again = worker.compared(context, worker.score_directory(context, tmp_path / "adapter"))
    assert again == pytest.approx({name: metrics[name] for name in ("preference_accuracy", "loss")}, rel=1e-4)
    held_out = score_file(tmp_path / "adapter", write_pairs(tmp_path / "all.jsonl"), tmp_path / "cache")
    assert held_out["rows"] == 48
    assert held_out["preference_accuracy"] > 0.9
    assert (held_out["backbone_preference_accuracy"], held_out["backbone_loss"]) == (0.5, pytest.approx(math.log(2)))
    assert held_out["loss"] < 0.3
    result = Result(digest, metrics, 1, None, tmp_path / "adapter")
    decision = judge_version(spec, result, NoChampion())
    assert decision.passed
    assert decision.reason.startswith("preference_accuracy ")
    assert "against 0.5000 of the backbone" in decision.reason


class NoChampion:
    """A registry in which nothing is registered yet."""

    def get(self, name, alias):
        raise NotFoundError(f"{name}@{alias}")


def test_a_whole_model_that_is_champion_is_compared_with_the_backbone_too(tmp_path):
    other = context_for(spec_for(tmp_path, "full", max_steps=1), tmp_path)
    worker.save(other, worker.train_and_score(other, LocalReporter(tmp_path / "o", lambda _: None)), tmp_path / "full")
    context = context_for(dpo_spec_for(tmp_path, max_steps=1), tmp_path)
    worker.save(context, worker.train_and_score(context, LocalReporter(tmp_path / "r", lambda _: None)), tmp_path / "a")
    score = worker.score_directory(context, tmp_path / "full")
    assert 0 <= score.accuracy <= 1
    assert score.rows == len(context.scored_rows()[1])
    assert score.loss != pytest.approx(math.log(2), abs=1e-6)


def test_what_does_not_go_with_the_objective_is_refused_by_name(tmp_path):
    tree = dpo_spec_for(tmp_path).to_dict()
    wrong = {
        "which method full changes": {"method": {"name": "full"}},
        "gate.metric: accuracy is not measured with dpo; use preference_accuracy or loss": {
            "gate": {"metric": "accuracy"}
        },
        "dpo: only for objective dpo; set objective: dpo": {"objective": "supervised", "gate": {}},
        "greater than 0": {"dpo": {"beta": 0}},
    }
    for reason, change in wrong.items():
        with pytest.raises(ValueError, match=reason):
            FineTuneSpec.model_validate({**tree, **change})
    supervised = {name: value for name, value in tree.items() if name not in ("objective", "dpo", "gate")}
    with pytest.raises(ValueError, match=r"preference_accuracy is not measured with supervised"):
        FineTuneSpec.model_validate({**supervised, "gate": {"metric": "preference_accuracy"}})
    biased = dpo_spec_for(tmp_path, {"peft_type": "LORA", "r": 2, "bias": "all", "target_modules": ["q_proj"]})
    for refusing in (lambda: context_for(biased, tmp_path), lambda: dry_run(biased, calibrated=False)):
        with pytest.raises(ConfigError, match="objective: dpo compares the adapter with its backbone"):
            refusing()


def test_rows_of_the_other_objective_are_refused_by_the_driver_and_by_the_worker(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    settings = Settings.from_env()
    spec = dpo_spec_for(tmp_path)
    plain = tmp_path / "plain.jsonl"
    plain.write_text('{"prompt": "a", "completion": "b"}\n')
    no_pairs = spec.model_copy(update={"data": spec.data.model_copy(update={"train": str(plain)})})
    supervised = FineTuneSpec.model_validate({"tenant": "acme", "adapter": "tone", "data": spec.data.model_dump()})
    for wrong, reason in (
        (no_pairs, "data.train: holds completion, but objective dpo learns from preferences"),
        (supervised, "data.train: holds preferences, which objective supervised does not learn from"),
    ):
        for refusing in (lambda w=wrong: check_data(w, settings, print), lambda w=wrong: context_for(w, tmp_path)):
            with pytest.raises(DataError, match=reason):
                refusing()
    assert list(supervised.to_dict()) == [
        "tenant",
        "adapter",
        "backbone",
        "data",
        "method",
        "training",
        "resources",
        "gate",
    ]
    assert FineTuneSpec.model_validate(spec.to_dict()) == spec
    assert (spec.gate.metric, spec.beta, supervised.beta) == ("preference_accuracy", BETA, None)


def test_the_dry_run_counts_both_sides_of_a_pair(tmp_path):
    spec = dpo_spec_for(tmp_path, max_steps=2)
    report = dry_run(spec)
    rows = context_for(spec, tmp_path).prepared.splits(with_theta=False)[0]
    measured = [len(row["input_ids"]) + len(row["rejected_ids"]) for row in pairs_of(spec, tmp_path)]
    assert report.tokens_per_row == pytest.approx(sum(measured) / len(measured))
    assert len(rows) < len(measured)
    assert f"objective    dpo, β {BETA:g}: two sequences per row" in str(report)
    assert report.seconds_per_step > 0
    assert report.seconds_by_part["of scoring"] > 0
    estimate = dry_run(spec, calibrated=False).memory_bytes["activations"]
    longest = max(max(len(row["input_ids"]), len(row["rejected_ids"])) for row in pairs_of(spec, tmp_path))
    assert estimate > training_memory_of(spec, tokens=8 * longest), "more than one side of each of eight pairs"


def training_memory_of(spec, tokens):
    return training_memory(
        Sizes(64, 5, 512), frozen=0, trainable=0, precision="fp32", full=False, tokens=tokens, answer_tokens=0,
        gradient_checkpointing=False,
    )["activations"]  # fmt: skip


def pairs_of(spec, folder):
    return list(context_for(spec, folder).prepared._rows["train"])
