"""The soak's verdict: what grows from half of the time to its end is told, and what an allocator gathers is not."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace

import pytest

from jobs.benchmarks import soak
from jobs.benchmarks.report import BenchmarkReport


def seen(name, mb, fds=(20,), threads=(9,)):
    return soak._Seen(name, *(list(values) * (200 // len(values)) for values in (mb, fds, threads)))


def report_of(*processes, after=None, failures=()):
    report = BenchmarkReport("soak", {})
    churn = SimpleNamespace(done=Counter({"POST files": 3}), failures=list(failures))
    before = {"files": 1, "storage/": 2, "audit": 5}
    soak._report(report, dict(enumerate(processes)), before, before | (after or {}), churn)
    return report


def missed(report):
    return {target.name for target in report.targets if not target.met}


def test_what_stays_is_met_though_it_grew_at_first_and_goes_up_and_down():
    warming = [100.0] * 20 + [300.0] * 80 + [301.0, 299.0] * 50
    report = report_of(soak._Seen("engine", warming, [20] * 200, [9] * 200), seen("raylet", (20.0, 23.0)))
    assert missed(report) == set()
    assert [row["process"] for row in report.rows] == ["engine", "raylet"]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"mb": [100.0 + number / 5 for number in range(200)]}, "engine: memory at the end to that at half"),
        ({"fds": list(range(200))}, "engine: fds gained"),
        ({"threads": list(range(200))}, "engine: threads gained"),
    ],
)
def test_what_grows_without_end_is_missed_by_name(values, name):
    held = {"mb": [100.0] * 200, "fds": [20] * 200, "threads": [9] * 200, **values}
    assert missed(report_of(soak._Seen("engine", **held))) == {name}


def test_rows_and_files_that_are_left_and_requests_that_failed_are_missed():
    after = {"files": 2, "storage/": 3, "audit": 900}  # the audit is kept for 400 days
    assert missed(report_of(seen("engine", (100.0,)), after=after, failures=["_file: 500"])) == {
        "rows left in files",
        "files left in the storage",
        "requests that failed",
    }
