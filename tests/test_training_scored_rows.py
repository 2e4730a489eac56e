"""The rows behind a job's scores: from a real training into the storage and back, bounded, gone with the job."""

from __future__ import annotations

import gzip
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from training_runs import LocalReporter, context_for, dpo_spec_for, spec_for

from pedro.adapter_directory import read_manifest
from pedro.errors import UnavailableError
from pedro.evaluation.scoring import Score
from pedro.methods.pedro import PedroLayer
from pedro.methods.pedro.activation_inputs import BINS, summary
from pedro.training import scored_rows, worker
from pedro.training.scored_rows import FILE, ScoredRow, keep_rows, read_rows, write_rows


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    context = context_for(spec_for(folder, max_steps=2, eval_every=2), folder)
    return context, worker.train_and_score(context, LocalReporter(folder / "run", lambda line: None))


def test_each_row_that_was_scored_has_its_prompt_its_answers_and_its_scores(trained, tmp_path):
    context, made = trained
    rows = worker.rows_behind(context, made)
    _, scored = context.scored_rows()
    assert [row.wanted for row in rows] == list(scored["completion"])
    assert all("shade" in row.prompt for row in rows)
    assert sum(row.right for row in rows) / len(rows) == pytest.approx(made.metrics["accuracy"])
    assert sum(bool(row.backbone_right) for row in rows) / len(rows) == pytest.approx(made.metrics["backbone_accuracy"])
    assert all(row.right == (row.answer.strip() == row.wanted.strip()) for row in rows)
    assert all(row.backbone_answer for row in rows)
    write_rows(tmp_path / FILE, rows)
    keep_rows(str(tmp_path / "storage"), "ftjob-1", tmp_path / FILE, pytest.fail)
    assert read_rows(str(tmp_path / "storage"), "ftjob-1") == rows


def test_where_the_inputs_of_each_activation_lay_is_in_the_manifest(trained, tmp_path):
    context, made = trained
    layers = [module for module in context.model.modules() if isinstance(module, PedroLayer)]
    assert list(made.activation_inputs) == [str(layer.index) for layer in layers]
    for given in made.activation_inputs.values():
        assert given["low"] < given["high"]
        assert sum(given["shares"]) == pytest.approx(1.0, abs=1e-3)
    worker.save(context, made, tmp_path / "adapter")
    assert read_manifest(tmp_path / "adapter")["activation_inputs"] == made.activation_inputs
    assert not any(layer._forward_hooks for layer in layers), "nothing records any more"


def test_recorded_inputs_are_counted_in_equal_bins():
    values = torch.linspace(-1.0, 3.0, 10_001)
    told = summary({3: [values[:5000, None], values[5000:, None]], 4: [torch.full((4, 2), 0.5)]})
    assert list(told) == ["3"], "what is always the same has no bins"
    assert (told["3"]["low"], told["3"]["high"]) == pytest.approx((-0.996, 2.996), abs=1e-3)
    assert told["3"]["shares"] == pytest.approx([1 / BINS] * BINS, abs=1e-3)


def test_answers_of_several_workers_are_in_the_order_of_the_rows():
    parts = [Score(answers=("a", "c", "e")), Score(answers=("b", "d"))]
    assert worker._in_turn([part.answers for part in parts]) == ("a", "b", "c", "d", "e")
    assert (parts[0] + parts[1]).answers == ("a", "c", "e", "b", "d")


def test_preferences_keep_no_rows(tmp_path):
    context = context_for(dpo_spec_for(tmp_path, max_steps=2, eval_every=2), tmp_path)
    made = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    assert worker.rows_behind(context, made) == []
    write_rows(tmp_path / FILE, [])
    keep_rows(str(tmp_path / "storage"), "ftjob-1", tmp_path / FILE, pytest.fail)
    assert read_rows(str(tmp_path / "storage"), "ftjob-1") == []


def test_rows_and_texts_are_bounded(monkeypatch):
    monkeypatch.setattr(scored_rows, "MOST_ROWS", 2)
    monkeypatch.setattr(scored_rows, "MOST_CHARS", 5)
    score = Score(answers=("answer one", "b", "c"), each=((1.0, 4.0, 2),) * 3)
    rows = scored_rows.scored_rows(["a long prompt", "p", "q"], ["wanted one", "b", "c"], score, Score())
    assert rows == [
        ScoredRow("rompt", "wante", "answe", True, 2.0),
        ScoredRow("p", "b", "b", True, 2.0),
    ]


def test_a_file_that_is_broken_is_an_error_and_one_of_a_later_release_is_read(tmp_path):
    target = tmp_path / "jobs" / "ftjob-1" / FILE
    target.parent.mkdir(parents=True)
    for broken in (b"no gzip", gzip.compress(b"{"), gzip.compress(b'{"prompt": 3}')):
        target.write_bytes(broken)
        with pytest.raises(ValueError, match="ftjob-1 cannot be read"):
            read_rows(str(tmp_path), "ftjob-1")
    row = ScoredRow("p", "w", "a", False, 0.5)
    write_rows(target, [replace(row, answer="ünï")])
    text = gzip.decompress(target.read_bytes()).decode().replace('"prompt"', '"later": 1, "prompt"')
    target.write_bytes(gzip.compress(text.encode()))
    assert read_rows(str(tmp_path), "ftjob-1") == [replace(row, answer="ünï")]


def test_a_storage_that_is_away_costs_the_rows_and_not_the_job(tmp_path, monkeypatch):
    write_rows(tmp_path / FILE, [ScoredRow("p", "w", "a", False, 0.5)])

    def away(source: str, target: str) -> None:
        raise UnavailableError("the storage does not answer")

    monkeypatch.setattr(scored_rows, "put_file", away)
    said: list[str] = []
    keep_rows(str(tmp_path), "ftjob-1", Path(tmp_path / FILE), said.append)
    assert said == ["the rows behind the scores could not be stored: the storage does not answer"]
