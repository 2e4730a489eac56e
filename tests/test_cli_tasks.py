"""`pedro tasks`: the list, the rows, the files."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pedro.cli import app
from pedro.data import check_file
from pedro.data.tasks import TASKS
from pedro.errors import ConfigError, DataError

EXCERPTS = Path(__file__).parent / "fixtures" / "tasks"


def pedro(*words):
    result = CliRunner().invoke(app, ["tasks", *map(str, words)], env={"PEDRO_TASK_DATA": ""}, catch_exceptions=True)
    if isinstance(result.exception, Exception) and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_list_has_every_task_with_metric_rows_and_licence():
    records = json.loads(pedro("--json").stdout)
    assert [record["name"] for record in records] == list(TASKS)
    by_name = {record["name"]: record for record in records}
    assert by_name["gsm8k"]["rows"] == {"train": 7473, "test": 1319}
    assert by_name["snips"]["rows"] == {"train": 2800, "test": 334}
    assert by_name["squad"]["licence"] == "CC-BY-SA-4.0"
    assert all(record["metric"] and record["source"] for record in records)


def test_rows_are_counted_in_a_directory():
    (record,) = json.loads(pedro("gsm8k", "--data", EXCERPTS, "--json").stdout)
    assert record["rows"] == {"train": 2, "test": 3}
    assert "gsm8k" in pedro("gsm8k", "--data", EXCERPTS).stdout


def test_rows_are_shown_and_written(tmp_path):
    shown = pedro("boolq", "--data", EXCERPTS, "--show", 1).stdout
    assert "Answer:\nno\n" in shown
    written = json.loads(pedro("boolq", "--data", EXCERPTS, "--write", tmp_path, "--limit", 2, "--json").stdout)
    assert written["rows"] == {"train": 2, "test": 2}
    assert check_file(tmp_path / "train.jsonl").usable


def test_writing_leaves_what_is_there_as_it_is(tmp_path):
    (tmp_path / "test.jsonl").write_text("mine\n")
    with pytest.raises(DataError, match=r"write: .*test\.jsonl is there already; remove it"):
        pedro("boolq", "--data", EXCERPTS, "--write", tmp_path)
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("test.jsonl", "mine\n")]
    with pytest.raises(ConfigError, match="fewer than 999999 worked examples"):
        pedro("snips", "--shots", 999999, "--write", tmp_path / "new")
    assert not list((tmp_path / "new").iterdir())


def test_mistakes_are_named():
    with pytest.raises(ConfigError, match="did you mean 'gsm8k'"):
        pedro("gsm8")
    assert pedro("--show", 2).exit_code == 2
