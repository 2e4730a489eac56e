"""Runs the engine's tests of graphs and exactness; on a machine with a GPU they run on it as well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parents[2] / "tests"
FILES = ("test_engine_graphs.py",)


class FindingReporter:
    """A pytest plugin that notes each test's end."""

    def __init__(self, note: Callable[[dict[str, Any]], None]) -> None:
        self._note = note

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Of the test itself, or of a set-up that failed."""
        if report.when == "call" or report.failed:
            finding = {"test": report.nodeid.rpartition("::")[2], "ok": report.passed, "seconds": report.duration}
            self._note(finding | ({"error": report.longreprtext[-2000:]} if report.failed else {}))


def run(device: str, _model: str, note: Callable[[dict[str, Any]], None]) -> None:
    """Those of the device: on "cuda" the real capture and, in bfloat16, torch's own paged attention."""
    files = [str(TESTS / name) for name in FILES]
    chosen = ["-k", "cuda"] if device == "cuda" else ["-k", "not cuda"]
    quiet = ["-o", "addopts=", "-s", "-p", "no:terminal", "-p", "no:cacheprovider"]  # findings alone on the output
    code = pytest.main([*quiet, *chosen, *files], plugins=[FindingReporter(note)])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"pytest ended with {code!r}")
