"""The script that compares two checkouts: what it trains, what it finds, and a checkout against itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from equality import DEMO_TENANTS, Checkout, Report, compare_tables, demo_spec, differences

from pedro.demo.stories import SMALL
from pedro.demo.stories import demo_spec as packaged_spec
from pedro.spec_reader import validate_spec
from pedro.training.spec import FineTuneSpec

ROOT = Path(__file__).resolve().parents[1]


def test_the_script_trains_the_last_version_of_each_demo_adapter_just_as_the_demo_does():
    assert {part.tenant.name: (part.tenant.adapter, part.steps[-1]) for part in SMALL.parts} == DEMO_TENANTS
    for part in SMALL.parts:
        spec = validate_spec(demo_spec(part.tenant.name, part.steps[-1]), FineTuneSpec)
        spec = spec.model_copy(update={"data": spec.data.located(ROOT)})
        assert spec == packaged_spec(SMALL, part, part.steps[-1])


def test_a_value_that_changed_came_or_went_is_told_with_its_place(capsys):
    before = {"greedy": {"a/0": [1, 2], "a/1": [3]}, "same": 1}
    after = {"greedy": {"a/0": [1, 9], "b/0": [4]}, "same": 1}
    assert differences(before, before) == []
    assert differences(before, after) == [
        "greedy.a/0: [1, 2] → [1, 9]",
        "greedy.a/1: [3] → null",
        "greedy.b/0: null → [4]",
    ]
    report = Report()
    report.compared("answers", before, after)
    assert capsys.readouterr().out.startswith("DIFFERS  answers")
    assert len(report.differ) == 3


def test_a_comparison_with_new_runs_is_named_and_its_earlier_folder_alone_is_compared(tmp_path, capsys, monkeypatch):
    def checkout(name, runs):
        for comparison, lines in {"alike": "a\n", "grown": runs}.items():
            folder = tmp_path / name / "jobs" / "results" / comparison
            folder.mkdir(parents=True)
            (folder / "runs.jsonl").write_text(lines)
            (folder / "table.md").write_text(lines.upper())
            (tmp_path / name / "jobs" / f"{comparison}.yaml").touch()
        return Checkout(tmp_path / name, tmp_path / name / "scratch")

    def report_of(_checkout, _part, asked):
        folders = [Path(folder) for _, folder in asked]
        return {folder.name: {"table.md": (folder / "table.md").read_text()} for folder in folders}

    monkeypatch.setattr(Checkout, "probe", report_of)
    report = Report()
    compare_tables(checkout("earlier", "a\n"), checkout("here", "a\nb\n"), report, quick=False)
    said = capsys.readouterr().out
    assert "new runs grown: 1 before, 2 now" in said
    assert "equal    alike: `pedro compare --report` makes the same table.md" in said
    assert "grown: `pedro" not in said
    assert report.differ == []


@pytest.mark.slow
def test_a_checkout_equals_itself():
    command = [sys.executable, str(ROOT / "tests" / "equality.py"), str(ROOT), "--quick", "--only", "answers,tables"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "greedy answers of 12 prompts over 6 adapters" in done.stdout
    assert "`pedro compare --report` makes the same table.csv, table.md" in done.stdout
    assert done.stdout.endswith("nothing differs\n")
