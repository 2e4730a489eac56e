"""How long the dashboard's pages take to open, on a small home and among 10,000 runs of 500 adapters.

Every page runs in a process of its own kind (Streamlit's AppTest): what the server does, without the browser.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import ROOT, Log
from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from pedro.config import Settings
from pedro.errors import NotFoundError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options

COLUMNS = ("home", "page", "first_s", "cpu_s", "again_s", "failed")
HOMES = {"demo": (12, 3), "synthetic": (10_000, 500)}  # runs, adapters
QUICK = {"demo": (12, 3), "synthetic": (500, 50)}
OPEN_S, AGAIN_S = 2.0, 1.0


def dashboard_report(options: Options, log: Log) -> BenchmarkReport:
    """Fabricate the homes, open every page of each twice."""
    from jobs.benchmarks.synthetic_data import fabricate

    timing = ROOT / "dashboard" / "timing.py"
    if not timing.is_file():
        raise NotFoundError("dashboard/ is not beside the package; run this in a checkout of pedro")
    homes = QUICK if options.quick else HOMES
    report = BenchmarkReport(
        "dashboard", {name: {"runs": runs, "adapters": count} for name, (runs, count) in homes.items()}
    )
    for name, (runs, count) in homes.items():
        home = bench_folder() / f"dashboard-{name}"
        shutil.rmtree(home, ignore_errors=True)
        try:
            log(f"{name}: fabricating {runs:,} runs of {count:,} adapters")
            fabricate(Settings.from_env({"PEDRO_HOME": str(home)}), runs, count)
            log(f"{name}: opening the pages")
            rows = _pages(timing, home)
        finally:
            shutil.rmtree(home, ignore_errors=True)
        report.rows += [{"home": name, **row} for row in rows]
        report.targets += _targets(name, rows)
    return report


def _pages(timing: Path, home: Path) -> list[dict[str, Any]]:
    env = {key: value for key, value in os.environ.items() if not key.startswith(("MLFLOW_", "PEDRO_", "RAY_"))}
    done = subprocess.run(
        [sys.executable, str(timing)],
        env={**env, "PEDRO_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return rows


def _targets(name: str, rows: list[dict[str, Any]]) -> list[Target]:
    """The first page of a process pays for the imports, which `pedro dashboard` makes while the browser opens."""
    warm = [row for row in rows if not row["imports"]]
    return [
        Target(f"{name}: pages that failed", 0, exactly(float(sum(bool(row["failed"]) for row in rows))), at_most=True),
        Target(f"{name}: slowest page to open, s", OPEN_S, exactly(max(row["first_s"] for row in warm)), at_most=True),
        Target(f"{name}: slowest page again, s", AGAIN_S, exactly(max(row["again_s"] for row in rows)), at_most=True),
    ]
