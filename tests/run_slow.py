"""Runs the slow tests: processes of one or several files, two at a time, the longest first.

What starts a cluster or Streamlit has a process of its own, on which they leave marks; the rest shares processes, whose
imports take seconds each. Two at a time, since each keeps about one core busy. What a process prints comes whole when
it ends, in the end the ten slowest tests.

    python tests/run_slow.py [--at-once 2] [--again] [FILE …] [-- words for pytest]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
PROCESSES = (
    ("serving_http",),
    ("bench_failures",),
    ("chaos",),
    ("training_job",),
    ("docs_commands",),
    ("dashboard_browser",),
    ("training_workers", "gpu_check", "equality"),
    ("data_dataset", "data_check", "evaluation_harness", "bench", "bench_from_spec", "bench_scaling", "methods_peft"),
    ("demo",),
    ("cluster",),
    ("serving_usage", "store_racing", "registry_server", "registry_takeover", "training_queue_database"),
    ("comparison_grid",),
    ("backbones",),
)
"""In the order in which they start. A file that is not named here comes last, in a process of its own."""
NOTHING_COLLECTED = 5
TimedTest = tuple[float, str]
Targets = tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """What came of one process: pytest's status, what it printed, how long each test took, and what is to run again."""

    targets: Targets
    status: int
    output: str
    seconds: float
    tests: tuple[TimedTest, ...]
    failed: Targets


def processes() -> list[Targets]:
    """The files that hold slow tests, by process."""
    files = {path.stem: f"tests/{path.relative_to(TESTS)}" for path in TESTS.rglob("test_*.py")}
    slow = {name for name, file in files.items() if "mark.slow" in (TESTS.parent / file).read_text(encoding="utf-8")}
    named = [tuple(f"test_{name}" for name in names if f"test_{name}" in slow) for names in PROCESSES]
    left = [(name,) for name in sorted(slow.difference(*named))]
    return [tuple(files[name] for name in names) for names in (*named, *left) if names]


def run(targets: Targets, words: list[str]) -> Ended:
    """The slow tests of some files, or some of these tests, in one process."""
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        times = Path(folder) / "times.xml"
        command = [sys.executable, "-m", "pytest", "-m", "slow", *targets, f"--junitxml={times}", *words]
        env = {"OMP_NUM_THREADS": "1", **os.environ}
        done = subprocess.run(
            command, cwd=TESTS.parent, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
        cases = list(ElementTree.parse(times).iter("testcase")) if times.is_file() else []
    status = 0 if done.returncode == NOTHING_COLLECTED else done.returncode
    tests = tuple((float(case.get("time", 0)), _name(case)) for case in cases)
    broken = (_name(case) for case in cases if case.find("failure") is not None or case.find("error") is not None)
    again = tuple(dict.fromkeys(broken)) or targets  # a process that was killed names no test
    if not all(
        name.startswith("tests/") and ".py" in name and "::" in name for name in again
    ):  # a file that cannot be imported
        again = targets
    return Ended(targets, status, done.stdout, time.monotonic() - began, tests, again if status else ())


def _name(case: ElementTree.Element) -> str:
    """A test as pytest is asked for it."""
    return f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}"


def main() -> int:
    """Run them all; 1 if any failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="only these files")
    parser.add_argument("--at-once", type=int, default=2, help="how many processes run side by side")
    ours, words = sys.argv[1:], []
    parser.add_argument("--again", action="store_true", help="run tests that failed once more, alone; then it counts")
    if "--" in ours:
        ours, words = ours[: ours.index("--")], ours[ours.index("--") + 1 :]
    given = parser.parse_args(ours)
    began, ended = time.monotonic(), []
    with ThreadPoolExecutor(max_workers=given.at_once) as pool:
        asked = [(str(file),) for file in given.files] or processes()
        waiting = [pool.submit(run, targets, words) for targets in asked]
        for future in as_completed(waiting):
            one = future.result()
            ended.append(one)
            show(one)
    print(f"== {len(ended)} processes in {time.monotonic() - began:.0f} s; the ten slowest tests:")
    for seconds, name in sorted((test for one in ended for test in one.tests), reverse=True)[:10]:
        print(f"{seconds:8.1f} s  {name}")
    failed = [one.failed for one in ended if one.status]
    if failed:
        print(f"== failed: {told(failed)}", flush=True)
    if failed and given.again:
        once_more = [run(targets, words) for targets in failed]
        for one in once_more:
            show(one)
        failed = [one.failed for one in once_more if one.status]
        verdict = told(failed) or "none; what failed before needs a machine without load: mend it"
        print(f"== failed alone, too: {verdict}")
    return bool(failed)


def show(one: Ended) -> None:
    print(f"== slow tests of {', '.join(one.targets)}: {one.seconds:.0f} s\n{one.output}", flush=True)


def told(failed: Iterable[Targets]) -> str:
    return ", ".join(target for targets in failed for target in targets)


if __name__ == "__main__":
    sys.exit(main())
