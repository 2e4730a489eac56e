"""The rows that runs of a comparison keep: each question once, bounded, read back as they were answered."""

from __future__ import annotations

import gzip

import pytest

from pedro.comparison import kept_rows
from pedro.comparison.kept_rows import AnsweredRow, AnsweredTask, answered, kept_runs, read_rows, write_rows
from pedro.data.tasks import TaskRow

ROWS = [TaskRow("play jazz", "play"), TaskRow("Is it true?", "yes", input="It is.")]


def test_rows_are_read_back_and_questions_are_kept_once(tmp_path):
    for run, answers, scores in (("aa", ["play", "no"], [1.0, 0.0]), ("bb", ["stop", "yes"], [0.0, 0.66666])):
        write_rows(tmp_path, run, [answered("snips", ROWS, answers, scores)])
    assert read_rows(tmp_path, "bb", "snips") == [
        AnsweredRow("play jazz", "play", "stop", 0.0),
        AnsweredRow("Is it true?\nIt is.", "yes", "yes", 0.6667),
    ]
    assert kept_runs(tmp_path) == {"aa", "bb"}
    assert len(list((tmp_path / "rows").iterdir())) == 3, "two runs and their questions"
    assert read_rows(tmp_path, "aa", "sst2") == read_rows(tmp_path, "cc", "snips") == []


def test_a_run_without_rows_leaves_no_file(tmp_path):
    write_rows(tmp_path, "aa", [])
    assert not (tmp_path / "rows").exists()
    assert kept_runs(tmp_path) == set()


def test_rows_and_texts_are_bounded(monkeypatch):
    monkeypatch.setattr(kept_rows, "MOST_ROWS", 3)
    monkeypatch.setattr(kept_rows, "MOST_CHARS", 5)
    kept = answered("t", [TaskRow(f"question {at}", "a long answer") for at in range(9)], ["answered"] * 9, [0.0] * 9)
    assert kept.rows == tuple(AnsweredRow(f"ion {at}", "a lon", "answe", 0.0) for at in range(3))


@pytest.mark.parametrize(
    "broken", [b"nothing", gzip.compress(b"{", mtime=0), gzip.compress(b'{"task": "t"}', mtime=0)]
)  # with the time in them, workers that collect in different seconds have different tests
def test_a_broken_file_is_an_error_that_names_the_run(tmp_path, broken):
    write_rows(tmp_path, "aa", [AnsweredTask("t", (AnsweredRow("p", "w", "a", 1.0),))])
    (tmp_path / "rows" / "aa.jsonl.gz").write_bytes(broken)
    with pytest.raises(ValueError, match="aa"):
        read_rows(tmp_path, "aa", "t")


def test_questions_that_are_gone_or_fewer_are_an_error(tmp_path):
    write_rows(tmp_path, "aa", [AnsweredTask("t", (AnsweredRow("p", "w", "a", 1.0),))])
    next((tmp_path / "rows").glob("questions-*")).unlink()
    with pytest.raises(ValueError, match="run aa"):
        read_rows(tmp_path, "aa", "t")


def test_no_run_names_a_file_elsewhere(tmp_path):
    with pytest.raises(ValueError, match="names no file"):
        read_rows(tmp_path / "rows", "../../aa", "t")
