"""The gate: a pure function of numbers."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from serving_adapters import register, settings_at
from training_runs import LocalReporter, context_for, spec_for

from pedro.registry import Registry
from pedro.training import trainer, worker
from pedro.training.handed_adapters import hand
from pedro.training.job import judge_version
from pedro.training.paired_test import compare_rows
from pedro.training.promotion_gate import decide
from pedro.training.spec import GateSpec

BARE = {"accuracy": 0.2, "loss": 2.0}


def _decide(metrics, champion=None, **gate):
    return decide(GateSpec(**gate), metrics, champion, BARE)


def test_without_a_champion_the_backbone_is_the_rival():
    assert _decide({"accuracy": 0.9}).passed
    refused = _decide({"accuracy": 0.1})
    assert not refused.passed
    assert refused.reason == "accuracy 0.1000 against 0.2000 of the backbone: gain -0.1000, gate requires -0.005"


def test_a_champion_is_the_rival_once_there_is_one():
    assert not _decide({"accuracy": 0.8}, {"accuracy": 0.9}).passed
    assert _decide({"accuracy": 0.95}, {"accuracy": 0.9}).passed
    assert "of the champion" in _decide({"accuracy": 0.95}, {"accuracy": 0.9}).reason


@pytest.mark.parametrize(("value", "passed"), [(0.895, True), (0.8949, False), (0.9, True)])
def test_a_gain_of_exactly_min_gain_passes(value, passed):
    assert _decide({"accuracy": value}, {"accuracy": 0.9}, min_gain=-0.005).passed is passed


def test_the_floor_holds_whatever_the_rival_has():
    refused = _decide({"accuracy": 0.79}, {"accuracy": 0.1}, floor=0.8)
    assert not refused.passed
    assert refused.reason == "accuracy 0.7900 is below the gate's floor of 0.8"
    assert _decide({"accuracy": 0.8}, {"accuracy": 0.1}, floor=0.8).passed


def test_for_loss_less_is_better():
    assert _decide({"loss": 1.0}, {"loss": 1.5}, metric="loss").passed
    assert not _decide({"loss": 1.6}, {"loss": 1.5}, metric="loss").passed
    assert not _decide({"loss": 1.0}, {"loss": 1.5}, metric="loss", floor=0.9).passed


@pytest.mark.parametrize("metrics", [{}, {"accuracy": math.nan}])
def test_what_was_not_measured_never_passes(metrics):
    decision = _decide(metrics)
    assert not decision.passed
    assert "could not be measured" in decision.reason


def _rows(right, losses=None):
    return [(float(good), loss, 1) for good, loss in zip(right, losses or [1.0] * len(right), strict=True)]


def _against(better, worse, same, **gate):
    mine = _rows([1] * better + [0] * worse + [1] * same)
    champions = _rows([0] * better + [1] * worse + [1] * same)
    paired = compare_rows("accuracy", mine, champions)
    metrics, champion = {"accuracy": paired.score}, {"accuracy": paired.champion_score}
    return paired, decide(GateSpec(**gate), metrics, champion, BARE, paired)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (9, 1), (3, 3), (40, 70)])
def test_mcnemars_test_is_exact(better, worse):
    paired, _ = _against(better, worse, 100)
    tries = better + worse
    for least, found in ((better, paired.p_better), (worse, paired.p_worse)):
        assert found == pytest.approx(sum(math.comb(tries, k) for k in range(least, tries + 1)) / 2**tries)
    assert (paired.rows, paired.better, paired.worse) == (tries + 100, better, worse)


def test_a_proven_loss_is_refused_though_the_gain_alone_would_let_it_pass():
    paired, decision = _against(5, 20, 9975)
    assert paired.p_worse < 0.05
    assert not decision.passed
    assert "of 10,000 rows 5 better and 20 worse (exact McNemar: p = " in decision.reason
    assert decision.reason.endswith("significantly worse at 0.05")
    assert _against(5, 20, 9975, evidence="none")[1].passed
    assert _against(5, 20, 9975, level=0.0001)[1].passed


def test_a_gain_by_chance_passes_only_where_no_proof_is_asked_for():
    assert _against(12, 8, 180)[1].passed
    refused = _against(12, 8, 180, evidence="better")[1]
    assert not refused.passed
    assert "not significantly better" in refused.reason
    assert _against(20, 4, 176, evidence="better")[1].passed


@pytest.mark.parametrize("evidence", ["none", "not_worse", "better"])
def test_the_test_never_lets_pass_what_lacks_the_gain(evidence):
    assert not _against(0, 2, 98, evidence=evidence)[1].passed
    assert not _against(30, 0, 170, evidence=evidence, min_gain=0.2)[1].passed


def test_without_scores_by_row_the_gain_decides_and_the_reason_says_so():
    decision = _decide({"accuracy": 0.95}, {"accuracy": 0.9}, evidence="better")
    assert decision.passed
    assert decision.reason.endswith("decided by the gain, since there are no scores by row")
    assert compare_rows("accuracy", _rows([1, 0]), _rows([1])) is None
    assert compare_rows("loss", _rows([1], [math.nan]), _rows([1])) is None


def test_losses_are_compared_by_a_bootstrap_that_gives_the_same_each_time():
    random = Random(7)
    champion = [random.uniform(1, 3) for _ in range(300)]
    lower = [loss - random.gauss(0.05, 0.1) for loss in champion]
    chance = [loss - random.gauss(0, 0.1) for loss in champion]
    right = [1] * 300
    paired = compare_rows("loss", _rows(right, lower), _rows(right, champion))
    assert paired == compare_rows("loss", _rows(right, lower), _rows(right, champion))
    assert paired.method == "paired bootstrap"
    assert 0 < paired.low < paired.champion_score - paired.score < paired.high
    assert paired.p_better < 0.001 < 0.99 < paired.p_worse
    same = compare_rows("loss", _rows(right, chance), _rows(right, champion))
    assert same.low < 0 < same.high
    metrics, rival = {"loss": paired.champion_score}, {"loss": paired.score}
    reverse = compare_rows("loss", _rows(right, champion), _rows(right, lower))
    assert not decide(GateSpec(metric="loss", min_gain=-1), metrics, rival, BARE, reverse).passed


def test_a_gates_later_keys_are_not_part_of_a_spec_that_does_not_use_them():
    assert "evidence" not in GateSpec().model_dump()
    assert GateSpec(**GateSpec(evidence="better", level=0.01).model_dump()).level == 0.01


def test_a_job_compares_its_version_with_the_champion_row_by_row_and_the_gate_is_told(tmp_path):
    settings = settings_at(tmp_path / "home")
    registry = Registry.open(settings)
    context = context_for(spec_for(tmp_path, "lora", max_steps=2), tmp_path)
    reporter = LocalReporter(tmp_path / "run", lambda line: None)
    trained = worker.train_and_score(context, reporter)
    worker.save(context, trained, tmp_path / "adapter")
    handed = hand(register(registry, tmp_path / "adapter", context.spec.name), registry, settings, "ftjob-1")
    lost = replace(handed, problem="its files are gone")
    assert trainer._score_champion(context, trained.score, None, reporter) is None
    gone = trainer.Champion(**trainer._score_champion(context, trained.score, lost, reporter))
    assert (gone.version, gone.metrics, gone.problem) == (1, None, "its files are gone")
    told = json.loads(
        json.dumps(trainer._score_champion(context, trained.score, handed, reporter))
    )  # as the driver reads it
    champion = trainer.Champion(**told)
    assert champion.version == 1
    assert (champion.paired["better"], champion.paired["worse"]) == (0, 0)
    assert champion.paired["rows"] == trained.metrics["rows"] > 0
    result = trainer.Result("", trained.metrics, 1, champion, Path(tmp_path / "adapter"))
    decision = judge_version(context.spec, result, registry)
    assert decision.passed
    assert f"of {trained.metrics['rows']} rows 0 better and 0 worse (exact McNemar: p = 1.0000" in decision.reason
    earlier = trainer.Champion(champion.version, champion.metrics)  # of a trial from before rows were kept
    result = trainer.Result("", trained.metrics, 1, earlier, Path(tmp_path / "adapter"))
    assert "decided by the gain" in judge_version(context.spec, result, registry).reason
