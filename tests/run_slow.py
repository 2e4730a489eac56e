"""Runs the slow tests: each file in a process of its own, two at a time, the longest first.

A process a file, since Ray and Streamlit leave marks on the one they ran in; two at a time, since each keeps about one
core busy. Each file's output comes whole when it ends, in the end the ten slowest tests.

    python tests/run_slow.py [--at-once 2] [FILE …] [-- words for pytest]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
LONGEST = (
    "docs_commands",
    "training_job",
    "serving_http",
    "dashboard_browser",
    "demo",
    "training_sweep",
    "cluster",
    "backbones",
    "training_workers",
    "comparison_grid",
    "dashboard_live",
    "gpu_check",
)
NOTHING_COLLECTED = 5
TimedTest = tuple[float, str]


@dataclass(frozen=True)
class Ended:
    """What came of one file: pytest's status, what it printed, and how long each of its tests took."""

    file: Path
    status: int
    output: str
    seconds: float
    tests: tuple[TimedTest, ...]


def slow_files() -> list[Path]:
    """The files that hold slow tests, the longest first."""
    files = [path for path in sorted(TESTS.glob("test_*.py")) if "mark.slow" in path.read_text(encoding="utf-8")]
    names = [f"test_{name}.py" for name in LONGEST]
    return sorted(files, key=lambda path: names.index(path.name) if path.name in names else len(names))


def run(file: Path, words: list[str]) -> Ended:
    """The slow tests of one file."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", str(file), f"--junitxml={times}", *words]
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(
            command, cwd=TESTS.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        tests = _timed(times) if times.is_file() else ()
    status = 0 if done.returncode == NOTHING_COLLECTED else done.returncode
    return Ended(file, status, done.stdout, time.monotonic() - began, tests)


def _timed(times: Path) -> tuple[TimedTest, ...]:
    cases = ElementTree.parse(times).iter("testcase")
    return tuple((float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases)


def main() -> int:
    """Run them all; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="only these files")
    parser.add_argument("--at-once", type=int, default=2, help="how many files run side by side")
    ours, words = sys.argv[1:], []
    parser.add_argument("--again", action="store_true", help="run files that failed once more, alone; then it counts")
    if "--" in ours:
        ours, words = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    given = parser.parse_args(ours)
    began, ended = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=given.at_once) as pool:
        waiting = [pool.submit(run, file, words) for file in given.files or slow_files()]
        for future in as_completed(waiting):
            one = future.result()
            ended.append(one)
            show(one)
    print(f"== {len(ended)} files in {time.monotonic() - began:.0f} s; the ten slowest tests:")
    for seconds, name in sorted((test for one in ended for test in one.tests), reverse=True)[:10]:
        print(f"{seconds:8.1f} s  {name}")
    failed = [one for one in ended if one.status]
    if failed:
        print(f"== failed: {names(failed)}", flush=True)
    if failed and given.again:
        once_more = [run(one.file, words) for one in failed]
        for one in once_more:
            show(one)
        failed = [one for one in once_more if one.status]
        verdict = names(failed) or "none; what failed before needs a machine without load: mend it"
        print(f"== failed alone, too: {verdict}")
    return bool(failed)


def show(one: Ended) -> None:
    print(f"== slow tests of {one.file.name}: {one.seconds:.0f} s\n{one.output}", flush=True)


def names(files: list[Ended]) -> str:
    return ", ".join(sorted(one.file.name for one in files))


if __name__ == "__main__":
    sys.exit(main())
