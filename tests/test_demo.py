"""The demo as a user runs it, from nothing and once more; and what it makes of bad outcomes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pedro.config import Settings
from pedro.data.demo import CHAT_TENANTS, DEMO_TENANTS
from pedro.demo import _server_of, choose_story
from pedro.demo.questions import Questions, read_questions
from pedro.demo.report import problems, show, side_by_side
from pedro.demo.stories import FULL, SMALL, demo_spec
from pedro.errors import BackboneError, ConflictError, UnavailableError
from pedro.serving.deploy import Served

STORIES = pytest.mark.parametrize("story", [SMALL, FULL], ids=lambda story: story.backbone)
WHOLE = "PEDRO_FULL_DEMO"


def outcome(row=None, **swap):
    made = {"tenant": "acme", "adapter": "voice", "metric": "accuracy", "score": 0.8}
    made |= {"majority": 0.2, "zero_shot": 0.1, "few_shot": None, **(row or {})}
    return {"tenants": [made], "swap": {"failed": 0, "mixed": 0, "answered_by_new": 5, **swap}}


def test_a_good_outcome_has_no_problems():
    assert problems(outcome(), 0.2) == []


@pytest.mark.parametrize("swap", [{"failed": 1}, {"mixed": 1}, {"answered_by_new": 0}])
def test_a_failed_or_mixed_or_unseen_swap_is_a_problem(swap):
    assert len(problems(outcome(**swap), 0.2)) == 1


@pytest.mark.parametrize(
    ("row", "rival"),
    [
        ({"score": 0.39}, r"\+0.190 over the most frequent answer"),
        ({"score": 0.29, "majority": None}, r"\+0.190 over the bare backbone"),
        ({"few_shot": 0.75}, r"\+0.050 over the backbone with examples"),
    ],
)
def test_an_adapter_near_what_needs_no_training_is_a_problem(row, rival):
    (found,) = problems(outcome(row), 0.2)
    assert found == f"acme.voice is only {rival}".replace("\\", "")


@STORIES
def test_every_part_of_a_story_has_a_valid_spec_and_packaged_files(story):
    assert {part.tenant.name for part in story.parts} == {"acme", "globex", "initech"}
    for part in story.parts:
        spec = demo_spec(story, part, 10)
        assert Path(spec.data.train).is_file()
        assert Path(str(spec.data.test)).is_file()
        assert spec.training.theta_lr == 1e-4
    assert len(story.swapped.steps) == 2


@STORIES
def test_an_adapter_is_asked_in_the_words_of_its_file_and_the_backbone_is_told_what_to_do(story):
    for part in story.parts:
        questions = Questions(part.tenant, 20)
        assert len(questions.asked) == 20
        for question, told in zip(questions.asked, questions.to_backbone(), strict=True):
            own, (message,) = question.messages[-1]["content"], told
            assert message["content"].endswith(part.tenant.template.replace("{prompt}", own))
            assert message["content"].startswith(questions.task.words.instruction + "\n\n")
            assert all(label in message["content"] for label in questions.task.words.labels.values())
            assert question.row.prompt.endswith(questions.task.words.ending), "as the benchmark task asks it"
        assert questions.score([row.completion for row in questions.rows]) == 1
        assert questions.score([""] * 20) == 0


def test_examples_are_training_rows_and_as_many_as_the_story_says():
    for part in FULL.parts:
        questions = Questions(part.tenant, 5)
        rows = [question.row for question in read_questions(part.tenant.train, part.tenant.template)]
        told, *examples, asked = questions.with_examples(part.shots)[0].split("\n\n")
        assert told == questions.task.words.instruction
        assert len(examples) == (7 if part.shots == "label" else part.shots)
        assert set(examples) <= {f"{row.prompt} {row.completion}" for row in rows}
        assert asked == questions.rows[0].prompt


def test_a_passages_question_counts_by_its_best_answer():
    reader = Questions(CHAT_TENANTS[1], 200)
    several = next(row for row in reader.rows if len(row.references) > 1)
    reader.asked = [question for question in reader.asked if question.row == several]
    assert reader.metric == "f1"
    assert reader.score([several.references[1]]) == 1
    assert reader.majority() is None


@pytest.mark.parametrize("error", [UnavailableError("pip has no\nnetwork"), BackboneError("the file is damaged")])
def test_without_its_backbone_the_demo_says_so_in_a_line_and_is_the_small_one(tmp_path, monkeypatch, error):
    def refuse(*_):
        raise error

    monkeypatch.setattr("pedro.demo.pull", refuse)
    said = []
    assert choose_story(tmp_path, False, said.append) is SMALL
    assert said == [f"smollm2-135m cannot be had, so the demo runs on pedro-nano: {' '.join(error.message.split())}"]


def test_the_small_demo_pulls_nothing(tmp_path):
    assert choose_story(tmp_path, True, print) is SMALL
    assert not any(tmp_path.iterdir())


def test_a_server_of_another_backbone_is_told_before_anything_trains(tmp_path, monkeypatch):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    monkeypatch.setattr("pedro.demo.find", lambda _: Served("http://127.0.0.1:9", "stories260K"))
    with pytest.raises(
        ConflictError, match=r"server of stories260K runs .* wants pedro-nano; end it with `pedro down`"
    ):
        _server_of(SMALL, settings)


def test_answers_stand_side_by_side_and_what_was_not_asked_is_left_out():
    answers = [{"asked": "play\nsome jazz", "wanted": "play", "zero_shot": "The intent\nis music.", "adapter": "play"}]
    row = {**outcome()["tenants"][0], "answers": answers}
    assert side_by_side(row).splitlines() == [
        "acme.voice",
        "  asked                      play some jazz",
        "  wanted                     play",
        "  backbone, told what to do  The intent is music.",
        "  adapter                    play",
    ]
    row |= {"rows": 9, "steps": 1, "trainable_parameters": 2, "test_rows": 1, "version": 1, "aliases": ["champion"]}
    numbers = {"old_version": 1, "new_version": 2, "in_flight": 1, "requests": 5, "answered_by_old": 0}
    swap = {"model": "acme.voice", **numbers, "seconds_to_first_new": 0.1, "old_accuracy": 0.1, "new_accuracy": 0.8}
    said = []
    show({"tenants": [row], "swap": {**outcome()["swap"], **swap}, "seconds": 9, "training_seconds": 5}, said.append)
    assert "0.800" in said[0]
    assert "accuracy 0.100 → 0.800" in said[-2]


@pytest.mark.slow
def test_the_small_demo_reaches_its_marks_from_nothing_and_starts_from_what_is_there():
    with tempfile.TemporaryDirectory(prefix="pedro-", ignore_cleanup_errors=True) as home:
        first, second = run_twice(home, "--small")
    for result in (first, second):
        check_result(result, SMALL)
        assert {row["few_shot"] for row in result["tenants"]} == {None}
    assert [row["digest"] for row in first["tenants"]] == [row["digest"] for row in second["tenants"]]
    assert [row["title"] for row in first["tenants"]] == [tenant.title for tenant in DEMO_TENANTS]


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not os.environ.get(WHOLE), reason=f"takes 11 minutes of two idle cores; set {WHOLE}=1")
def test_the_demo_on_a_language_model_reaches_its_marks_and_starts_from_what_is_there():
    with tempfile.TemporaryDirectory(prefix="pedro-", ignore_cleanup_errors=True) as home:
        for result in run_twice(home):
            check_result(result, FULL)
            assert all(row["score"] > row["few_shot"] for row in result["tenants"])


def run_twice(home, *options):
    env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
    env["PEDRO_HOME"] = home
    try:
        first, second = run(env, *options, "--keep"), run(env, *options)  # on the server that the first one left
    finally:  # a demo that was cut off leaves its cluster
        subprocess.run([sys.executable, "-m", "pedro.cli", "down", "--yes"], env=env, timeout=300, check=False)
    assert json.loads((Path(home) / "demo" / "result.json").read_text()) == second
    return first, second


def check_result(result, story):
    assert result["backbone"] == story.backbone
    assert [row["tenant"] for row in result["tenants"]] == ["acme", "globex", "initech"]
    rows = {part.tenant.name: part.rows for part in story.parts}
    for row in result["tenants"]:
        assert row["test_rows"] == rows[row["tenant"]]
        assert row["score"] >= row["zero_shot"] + story.margin
        assert row["majority"] is None or row["score"] >= row["majority"] + story.margin
        assert all(answer["adapter"] for answer in row["answers"])
    swap = result["swap"]
    assert (swap["failed"], swap["mixed"]) == (0, 0)
    assert swap["in_flight"] > 0
    assert swap["answered_by_old"] > 0
    assert swap["answered_by_new"] > 0
    assert swap["new_accuracy"] > swap["old_accuracy"]


def run(env, *options):
    command = [sys.executable, "-m", "pedro.cli", "demo", "--json", *options]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1500)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
