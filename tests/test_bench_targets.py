"""The page of targets: verdicts, what is said of each benchmark, and the figure."""

import math

import pytest

from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.stats import Ratio
from jobs.benchmarks.targets_page import better_than_wanted, figure, results, verdict, written

TARGETS = [
    Target("speed", 2.0, Ratio(3.0, 2.5, 3.5)),
    Target("seconds", 10.0, Ratio(12.0, 9.0, 14.0), at_most=True),
    Target("failed", 0.0, exactly(0), at_most=True),
]


def saved(folder):
    """A result with one target met, one missed but not for sure, and one of 0; and another without targets."""
    code = {"commit": "0123456789abcdef", "code": None}
    BenchmarkReport("serving", {}, targets=TARGETS, facts={"command": "jobs.bench serving"}).save(
        folder / "serving.json", code
    )
    BenchmarkReport("stall", {}).save(folder / "stall.json", code)
    return results(folder)


def test_a_target_says_how_far_from_it_its_figure_is_and_whether_it_is_kept():
    speed, seconds, failed = (target.as_dict() for target in TARGETS)
    assert [verdict(one) for one in (speed, seconds, failed)] == ["met", "not met, unclear", "met"]
    assert better_than_wanted(speed) == 1.5
    assert better_than_wanted(seconds) == pytest.approx(10 / 12)
    assert better_than_wanted(failed) is None
    assert better_than_wanted(Target("none answered", 2.0, exactly(0)).as_dict()) == 0
    assert better_than_wanted(Target("none leaked", 4.0, exactly(0), at_most=True).as_dict()) == math.inf


def test_the_page_lists_every_target_and_those_that_are_not_met_apart(tmp_path):
    held = saved(tmp_path)
    blocks = "".join(f"<!-- measured: {name} -->\noutdated\n<!-- end -->\n" for name in ("count", "missed", "all"))
    count, missed, every = written(f"# A\n{blocks}", held, {"serving": "tokens per second"}).split("<!-- end -->")[:3]
    assert "2 of 3 targets are met, 1 are not. Of 1, met or not" in count
    assert missed.count("\n| [") == 1
    assert "| [serving](#serving) | seconds | at most 10 | 12 [9, 14] | not met, unclear |" in missed
    assert "### serving\n\nTokens per second. `python -m jobs.bench serving`, " in every
    assert "commit 01234567" in every
    assert "| speed | at least 2 | 3 [2.5, 3.5] | met |" in every
    assert "| failed | at most 0 | 0 | met |" in every
    assert "stall" not in every
    assert "outdated" not in count + missed + every


def test_the_figure_is_drawn(tmp_path):
    figure(saved(tmp_path), tmp_path / "targets.png")
    assert (tmp_path / "targets.png").stat().st_size > 5_000
