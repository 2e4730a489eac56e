"""The benchmark of a known model beside published figures: every part on a packaged backbone and a handful of rows."""

import json
from dataclasses import replace

import pytest
from task_files import EXCERPTS

from jobs.bench import benchmarks
from jobs.benchmarks import published
from jobs.benchmarks.command_line import main
from jobs.benchmarks.published_parts import PARTS, Sizes, Subject
from jobs.benchmarks.stats import mean_of_groups, wilson

SIZES = Sizes(mmlu=4, mmlu_chat=2, harness=3, endpoint=0, bbh_each=1, gsm8k=2, windows=2)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Excerpts of the tasks, and a text of a few windows."""
    folder = tmp_path_factory.mktemp("data")
    for name in ("mmlu", "bbh"):
        (folder / name).symlink_to(EXCERPTS / name)
    (folder / "gsm8k").mkdir()
    question = json.dumps({"question": "Ann has 2 apples and buys 3. How many?", "answer": "2 + 3 = 5\n#### 5"}) + "\n"
    (folder / "gsm8k" / "train.jsonl").write_text(question * 6)
    (folder / "gsm8k" / "test.jsonl").write_text(question.replace("Ann", "Bob") + question.replace("Ann", "Tim"))
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "test.txt").write_text(" \n = Robert <unk> = \n The dog went to the park .\n" * 300)
    return folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    return tmp_path


def test_every_part_is_asked_and_a_part_that_is_done_is_not_asked_again(data, home, monkeypatch):
    said = []
    subject = Subject("pedro-nano", data, threads=1)
    report = published.measure(subject, SIZES, {"MMLU, cloze": 101.0}, said.append)
    scores = {(row["task"], row["asked"]): row for row in report.rows}
    assert len(scores) == len(report.rows)
    assert all(row["interval"][0] <= row["score"] <= row["interval"][1] for row in report.rows)
    rows = {row["task"]: row["rows"] for row in report.rows}
    assert rows["BBH, 3-shot"] == 2
    assert rows["GSM8K, 5-shot"] == 2
    assert next(row["within"] for row in report.rows if row["task"] == "MMLU, cloze") is False
    assert scores["WikiText-2, perplexity of a word", "windows of 1,024"]["score"] > 1
    if any("lm-eval" in asked for _, asked in scores):
        lm_eval = next(row for (_, asked), row in scores.items() if "lm-eval" in asked)
        assert lm_eval["score"] == scores["MMLU, cloze", "our task, the same rows"]["score"]
    monkeypatch.setattr(published, "PARTS", dict.fromkeys(PARTS, "not called"))
    again = published.measure(Subject("pedro-nano", data, threads=1), SIZES, {}, said.append)
    assert [row["score"] for row in again.rows] == [row["score"] for row in report.rows]


@pytest.mark.slow
def test_lm_eval_finds_the_same_through_a_server(data, home):
    subject = Subject("pedro-nano", data, threads=1)
    (through,) = PARTS["endpoint"](subject, replace(SIZES, endpoint=3))
    in_process, _ = PARTS["harness"](subject, SIZES)
    assert through["score"] == in_process["score"]
    assert through["rows"] == 3
    assert through["asked"].endswith("through the server")


def test_what_is_missing_is_said_in_one_line(data, home, tmp_path, monkeypatch, capsys):
    arguments = ["published", "--quick", "--threads", "1"]
    monkeypatch.delenv("PEDRO_TASK_DATA", raising=False)
    assert main(benchmarks(), tmp_path, arguments) == 2
    monkeypatch.setenv("PEDRO_TASK_DATA", str(data))
    assert main(benchmarks(), tmp_path, [*arguments, "--backbones", "nowhere"]) == 2
    assert main(benchmarks(), tmp_path, [*arguments, "--backbones", "pedro-nano,stories260K"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == ["PEDRO_TASK_DATA", "backbone", "backbones"]


def test_shares_and_means_have_the_intervals_of_their_textbooks():
    found = wilson(0, 10)
    assert (found.value, found.low, found.high) == pytest.approx((0, 0, 0.2775), abs=1e-4)
    assert wilson(5, 10).interval == [0.2366, 0.7634]
    even = mean_of_groups([[0, 1] * 50, [1] * 100])
    assert even.value == 0.75
    assert even.low == pytest.approx(0.70, abs=0.01)
    assert even.high == pytest.approx(0.80, abs=0.01)
