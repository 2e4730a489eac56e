"""What a result says of the code that made it, and which results may be committed."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from jobs import bench
from jobs.benchmarks import command_line
from jobs.benchmarks.command_line import Benchmark
from jobs.benchmarks.report import BenchmarkReport
from pedro import provenance as provenance_file
from pedro.errors import ConfigError
from pedro.provenance import check_unchanged, code_state, provenance

RESULTS = Path(bench.__file__).parent / "results"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A small repository with a clean tree."""
    root = tmp_path / "checkout"
    for folder in ("platform/pedro", "jobs/results", "docs"):
        (root / folder).mkdir(parents=True)
    shutil.copy(provenance_file.__file__, root / "platform/pedro/provenance.py")
    (root / "jobs/work.py").write_text("print(1)\n")
    (root / "jobs/results/speed.json").write_text("{}\n")
    (root / "docs/page.md").write_text("words\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "-qm", "all")
    return root


def git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()


def test_a_result_names_the_commit_and_the_code(checkout):
    state = code_state(checkout)
    assert state["commit"] == git(checkout, "rev-parse", "HEAD")
    assert state["code"].startswith("sha256:")
    assert provenance(state).items() >= state.items()


@pytest.mark.parametrize("name", ["jobs/results/speed.json", "jobs/results/new.json", "docs/page.md"])
def test_results_and_pages_are_no_part_of_the_code(checkout, name):
    before = code_state(checkout)
    (checkout / name).write_text("other\n")
    assert code_state(checkout) == before


@pytest.mark.parametrize("name", ["jobs/work.py", "platform/pedro/new.py"])
def test_changed_code_is_marked_and_has_another_hash(checkout, name):
    before = code_state(checkout)
    (checkout / name).write_text("print(2)\n")
    after = code_state(checkout)
    assert after["commit"] == f"{before['commit']}+"
    assert after["code"] != before["code"]


def test_without_a_repository_the_code_is_still_named(checkout, tmp_path):
    shutil.rmtree(checkout / ".git")
    assert code_state(checkout)["commit"] is None
    assert code_state(tmp_path)["code"] != code_state(checkout)["code"], "the package's own files"


def test_a_result_to_be_committed_wants_committed_code():
    changed, clean = {"commit": "c0ffee+", "code": "sha256:1"}, {"commit": "c0ffee", "code": "sha256:1"}
    with pytest.raises(ConfigError, match="--allow-dirty"):
        check_unchanged(changed, RESULTS / "speed.json", allow_dirty=False)
    check_unchanged(changed, RESULTS / "speed.json", allow_dirty=True)
    check_unchanged(clean, RESULTS / "speed.json", allow_dirty=False)
    check_unchanged(changed, RESULTS.parent / "speed.json", allow_dirty=False)


def test_a_benchmark_of_changed_code_is_refused_before_it_measures(monkeypatch, capsys, tmp_path):
    measured = []

    def run(options, say):
        measured.append(options)
        return BenchmarkReport("speed", {})

    monkeypatch.setattr(command_line, "code_state", lambda: {"commit": "c0ffee+", "code": "sha256:1"})
    benchmarks = {"speed": Benchmark("made up", run, ())}
    assert command_line.main(benchmarks, RESULTS, ["speed"]) == 2
    assert "code has changed since commit c0ffee+" in capsys.readouterr().err
    assert not measured
    out = tmp_path / "speed.json"
    assert command_line.main(benchmarks, RESULTS, ["speed", "--out", str(out)]) == 0
    saved = json.loads(out.read_text())
    assert (saved["commit"], saved["code"]) == ("c0ffee+", "sha256:1")


def test_committed_benchmarks_were_measured_on_committed_code():
    found = {path.name: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    commits = {name: (result.get("provenance") or result)["commit"] for name, result in found.items()}
    assert len(commits) > 10
    assert not {name for name, commit in commits.items() if commit.endswith("+")}
