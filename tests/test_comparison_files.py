"""Where a comparison's runs lie: a file each while it runs, one runs.jsonl where it is committed."""

import json
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml
from comparisons import printed, result, write_comparison
from typer.testing import CliRunner

from pedro.cli import app
from pedro.comparison.report import as_markdown, make_report
from pedro.comparison.run_files import count_runs, held, last_change, pack_runs, read_comparison, read_runs, write_run
from pedro.errors import ConfigError

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "jobs" / "results"
COMMITTED = sorted(file.parent for file in RESULTS.glob("*/comparison.json"))
MOST_FILES = 80
# Its table was printed while the folder held runs on a second backbone, so its titles name the backbone.
OLDER_TITLE = {"nano_table1": " · stories260K"}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A comparison of four runs, one of which failed, each in a file of its own."""
    runs = [result(label, "sst2", seed, [1, 0, 1]) for label in ("PEDRO", "LoRA") for seed in (0, 1)]
    return write_comparison(tmp_path / "made", [*runs[:3], replace(result("LoRA", "sst2", 1), message="it broke")])


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_packed_runs_are_one_sorted_file_with_every_key_that_their_files_had(folder):
    (one, *_) = (folder / "runs").iterdir()
    one.write_text(json.dumps({**json.loads(one.read_text()), "weather": "fine"}))  # of a newer version, perhaps
    before = [json.loads(path.read_text()) for path in sorted((folder / "runs").iterdir())]
    text = printed(read_comparison(folder))
    assert pack_runs(folder) == 4
    lines = (folder / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == before
    assert [values["id"] for values in before] == sorted(values["id"] for values in before)
    assert files_of(folder) == {"comparison.json", "runs.jsonl"}
    assert printed(read_comparison(folder)) == text


def test_packing_twice_changes_nothing(folder):
    pack_runs(folder)
    before = (folder / "runs.jsonl").read_bytes()
    assert pack_runs(folder) == 4
    assert (folder / "runs.jsonl").read_bytes() == before


def test_a_run_that_is_made_after_packing_lies_in_a_file_of_its_own_and_is_the_newer(folder):
    (first, *_), _ = read_runs(folder)
    pack_runs(folder)
    write_run(folder, replace(first, label="renamed"))
    write_run(folder, replace(first, id="added"))
    found, problems = read_runs(folder)
    assert problems == []
    assert len(found) == 5
    assert {run.label for run in found if run.id == first.id} == {"renamed"}
    assert pack_runs(folder) == 5
    assert read_runs(folder)[0] == found


def test_a_folder_of_an_earlier_version_is_read_and_can_be_packed(folder):
    found, _ = read_runs(folder)
    (folder / "runs").rename(folder / "cells")
    assert read_runs(folder) == (found, [])
    assert count_runs(folder) == 4
    write_run(folder, replace(found[0], label="renamed"))
    assert read_runs(folder)[0][0].label == "renamed", "what is written now is the newer"
    pack_runs(folder)
    assert files_of(folder) == {"comparison.json", "runs.jsonl"}


def test_what_cannot_be_read_is_not_packed_and_stays(folder):
    (folder / "runs" / "half.json").write_text('{"id": ')
    before = files_of(folder)
    with pytest.raises(ConfigError, match=r"cannot be packed: runs/half\.json: not JSON"):
        pack_runs(folder)
    assert files_of(folder) == before
    with pytest.raises(ConfigError, match="it holds no runs"):
        pack_runs(folder.parent)


def test_a_broken_line_is_named_by_its_number_and_the_others_are_read(folder):
    pack_runs(folder)
    lines = (folder / "runs.jsonl").read_bytes().splitlines()
    (folder / "runs.jsonl").write_bytes(b"\n".join([lines[0], lines[1][:40], b"\xff\xfe", lines[3]]) + b"\n")
    found = read_comparison(folder)
    assert len(found.runs) == 2
    assert [problem.partition(": ")[0] for problem in found.problems] == ["runs.jsonl:2", "runs.jsonl:3"]


def test_a_packed_folder_is_counted_and_its_changes_are_seen_without_reading_runs(folder):
    assert count_runs(folder) == 4
    pack_runs(folder)
    assert count_runs(folder) == 4
    before = last_change(folder)
    write_run(folder, result("IA3", "sst2", 0, [1, 0, 1]))
    assert count_runs(folder) == 5
    assert last_change(folder) >= before


def test_pedro_compare_packs_and_says_so(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    spec = tmp_path / "made.yaml"
    spec.write_text(yaml.safe_dump({"name": "made", "tasks": ["sst2"], "methods": ["pedro", "lora"]}))
    done = CliRunner().invoke(app, ["compare", str(spec), "--out", str(folder), "--pack"])
    assert done.exit_code == 0, done.output
    assert f"4 runs packed into {folder / 'runs.jsonl'}" in done.stderr
    assert "made: 4 runs, 1 failed" in done.stdout
    made = {"table.txt", "table.md", "table.tex", "table.csv", "table.png", "activations.png", "summary.json"}
    assert files_of(folder) == {"comparison.json", "runs.jsonl", ".lock", *made}


@pytest.mark.parametrize("also", [(), ("--pack",)], ids=["run", "pack"])
def test_a_folder_in_which_a_comparison_is_at_work_is_refused_and_can_be_read(folder, tmp_path, monkeypatch, also):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    spec = tmp_path / "made.yaml"
    spec.write_text(yaml.safe_dump({"name": "made", "tasks": ["snips"], "methods": ["pedro", "lora"]}))
    before = files_of(folder)
    with held(folder):
        done = CliRunner().invoke(app, ["compare", str(spec), "--out", str(folder), *also])
        assert isinstance(done.exception, ConfigError)
        assert f"--out: another `pedro compare` is at work in {folder}; let it end" in str(done.exception)
        assert files_of(folder) == {*before, ".lock"}
        read = CliRunner().invoke(app, ["compare", str(spec), "--out", str(folder), "--report"])
        assert read.exit_code == 0, read.output


def test_a_lock_that_cannot_be_taken_is_a_clear_error(folder):
    (folder / ".lock").mkdir()
    with pytest.raises(ConfigError, match=r"--out: .* cannot be written \(.*\); name another folder"), held(folder):
        pass


# what is committed


def ignored(path: Path) -> bool:
    """Whether .gitignore names a file below jobs/results."""
    patterns = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("jobs/")]
    name = path.relative_to(ROOT).as_posix()
    return any(fnmatch(name, f"{pattern}*" if pattern.endswith("/") else pattern) for pattern in patterns)


def test_there_are_at_most_eighty_committed_results():
    found = [path for path in RESULTS.rglob("*") if path.is_file() and not ignored(path)]
    assert len(found) <= MOST_FILES, "\n".join(sorted(path.relative_to(RESULTS).as_posix() for path in found))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_comparison_is_its_metadata_its_runs_a_table_and_figures(folder):
    found = {name for name in files_of(folder) if not ignored(folder / name)}
    assert {name for name in found if not name.endswith(".png")} == {"comparison.json", "runs.jsonl", "table.md"}
    ids = [json.loads(line)["id"] for line in (folder / "runs.jsonl").read_text().splitlines()]
    assert ids == sorted(set(ids))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_a_committed_table_is_what_is_printed_of_its_runs_byte_for_byte(folder):
    committed = (folder / "table.md").read_text()
    title = read_comparison(folder).title
    assert f"{as_markdown(make_report(read_comparison(folder)))}\n" == committed.replace(
        f"{title}{OLDER_TITLE.get(folder.name, '')}", title
    )
