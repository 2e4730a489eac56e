"""The gate: a pure function of numbers."""

import math

import pytest

from pedro.training.promotion_gate import decide
from pedro.training.spec import GateSpec

BARE = {"accuracy": 0.2, "loss": 2.0}


def _decide(metrics, champion=None, **gate):
    return decide(GateSpec(**gate), metrics, champion, BARE)


def test_without_a_champion_the_backbone_is_the_rival():
    assert _decide({"accuracy": 0.9}).passed
    refused = _decide({"accuracy": 0.1})
    assert not refused.passed
    assert refused.reason == "accuracy 0.1000 against 0.2000 of the backbone: gain -0.1000, gate wants -0.005"


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
