"""Metrics give the published numbers on the published cases."""

import random
import sqlite3
from dataclasses import replace

import pytest

from pedro.data.tasks import TaskRow, get_task
from pedro.errors import ConfigError, DataError
from pedro.evaluation.metrics import f1_em, normalise_answer, score_answers, token_f1
from pedro.evaluation.sql import execution_match, normalise_sql

QA = get_task("squad")


def qa(references, answers):
    rows = [TaskRow("", texts[0], tuple(texts)) for texts in references]
    return score_answers(replace(QA, stops=()), rows, answers)


# SQuAD: the cases with which T5's metrics (t5/evaluation/metrics_test.py, qa_utils_test.py) and the `squad` metric of
# huggingface/evaluate (its README) check their copies of evaluate-v1.1.py


def test_squads_normalisation():
    assert normalise_answer("`Needs\tA_LOT of the 'normalization'.\"‘") == "needs alot of normalization‘"
    assert normalise_answer("needs no normalization") == "needs no normalization"


@pytest.mark.parametrize(
    ("references", "answers", "f1", "exact"),
    [
        ([["", "this is a string"], ["this is a string"] * 2], ["this is a string"] * 2, 100, 100),
        ([["this is a string"] * 2] * 2, ["", ""], 0, 0),
        (
            [["big moose", "hippo"], ["correct1"], ["correct2.1", "correct2.2"], ["a", "b"]],
            ["a big  Moose!", "wrong", "correct2.2", "c"],
            50,
            50,
        ),
        ([["abc abd", "$$$$"]], ["abd"], 200 / 3, 0),
        ([["1976"]], ["1976"], 100, 100),
        ([["1976"]], ["1999"], 0, 0),
        (
            [["1976"], ["Beyoncé and Bruno Mars"], ["climate change"]],
            ["1976", "Beyonce", "climate change"],
            200 / 3,
            200 / 3,
        ),
    ],
)
def test_squads_published_cases(references, answers, f1, exact):
    score = qa(references, answers)
    assert 100 * score.parts["f1"] == pytest.approx(f1)
    assert 100 * score.parts["exact_match"] == pytest.approx(exact)
    assert score.value == pytest.approx((score.parts["f1"] + score.parts["exact_match"]) / 2)


def slow_f1(answer, reference):
    """SQuAD's F1 by its definition: words matched one by one."""
    ours, theirs = normalise_answer(answer).split(), normalise_answer(reference).split()
    left, shared = list(theirs), 0
    for word in ours:
        if word in left:
            left.remove(word)
            shared += 1
    return 2 * shared / (len(ours) + len(theirs)) if shared else 0.0


def test_squads_f1_equals_a_slow_count_by_definition():
    words = ["the", "a", "Oil", "oil,", "crisis", "1973", "in", "October", "U.S.", "—", "naïve", "an"]
    draw = random.Random(0)
    for _ in range(2000):
        answer, reference = (" ".join(draw.choices(words, k=draw.randint(1, 6))) for _ in range(2))
        assert token_f1(answer, reference) == pytest.approx(slow_f1(answer, reference))
        assert f1_em(answer, ["unlike", reference])[0] == token_f1(answer, reference)


# accuracy


def test_accuracy_counts_rows_and_the_unread_ones_are_wrong():
    task = get_task("sst2")
    rows = [TaskRow("", "positive"), TaskRow("", "negative"), TaskRow("", "negative")]
    score = score_answers(task, rows, ["Positive!", "who knows", "positive"])
    assert (score.value, score.unparsed, score.per_row) == (pytest.approx(1 / 3), 1, (1.0, 0.0, 0.0))
    assert score.to_dict()["metric"] == "accuracy"


def test_mmlu_is_a_mean_over_rows_and_bbh_over_sub_tasks():
    choices = {"choices": ("w", "x", "y", "z")}
    rows = [TaskRow("", "A", group="physics", extra=choices)] * 3 + [TaskRow("", "B", group="law", extra=choices)]
    score = score_answers(get_task("mmlu"), rows, ["A", "A", "B", "B"])
    assert score.value == pytest.approx(3 / 4)
    assert score.groups == {"law": 1.0, "physics": pytest.approx(2 / 3)}
    rows = [TaskRow("", "True", group="boolean")] * 3 + [TaskRow("", "(A)", group="dates")]
    score = score_answers(get_task("bbh"), rows, ["So the answer is true.", "True", "False", "(A)"])
    assert score.value == pytest.approx((2 / 3 + 1) / 2)


def test_gsm8k_compares_numbers_not_their_spelling():
    rows = [TaskRow("", "", ("70000",)), TaskRow("", "", ("18",))]
    assert score_answers(get_task("gsm8k"), rows, ["#### 70,000", "that makes $18.00"]).value == 1


@pytest.mark.parametrize(("name", "where"), [("alpaca", "answer_loss"), ("mt_bench", "mt_bench")])
def test_a_metric_that_needs_more_than_answers_says_where_it_is(name, where):
    with pytest.raises(ConfigError, match=where):
        score_answers(get_task(name), [], [])


# SQL

SAME = [
    ("SELECT a FROM t WHERE b = 'X'", 'select  a from T where B="x" ;'),
    ("SELECT a FROM t WHERE b <> 1", "SELECT a FROM t WHERE b != 1"),
    ("SELECT COUNT( * ) FROM t", "select count(*) from t"),
    ("SELECT c.a FROM course AS c", "SELECT x.a FROM course AS x"),
    ("SELECT a FROM t ORDER BY a ASC", "SELECT a FROM t ORDER BY a"),
    ("SELECT a FROM t INNER JOIN u ON t.i = u.i", "SELECT a FROM t JOIN u ON t.i = u.i"),
    ("SELECT a FROM t WHERE n = 'O''Neil'", 'SELECT a FROM t WHERE n = "O\'Neil"'),
]
OTHER = [
    ("SELECT a FROM t", "SELECT b FROM t"),
    ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a"),
    ("SELECT a FROM t WHERE b = 'x y'", "SELECT a FROM t WHERE b = 'xy'"),
    ("SELECT c.a FROM x AS c , y AS d", "SELECT d.a FROM x AS c , y AS d"),
    ("SELECT 1.5", "SELECT 15"),
]


@pytest.mark.parametrize(("query", "other"), SAME)
def test_queries_that_differ_in_looks_alone_match(query, other):
    assert normalise_sql(query) == normalise_sql(other)


@pytest.mark.parametrize(("query", "other"), OTHER)
def test_queries_that_differ_do_not(query, other):
    assert normalise_sql(query) != normalise_sql(other)


TABLES = {
    "t": {
        "columns": ["player", "points"],
        "types": ["text", "real"],
        "rows": [["Ann", "3"], ["Bob", "5"], ["Cid", "5"]],
    }
}


@pytest.mark.parametrize(
    ("query", "reference", "same"),
    [
        ("SELECT player FROM t WHERE points > 4", "SELECT player FROM t WHERE points = '5'", True),
        ("SELECT player FROM t ORDER BY player DESC", "SELECT player FROM t", True),
        ("SELECT player FROM t ORDER BY player DESC", "SELECT player FROM t ORDER BY player", False),
        ("SELECT DISTINCT points FROM t", "SELECT points FROM t", False),
        ("SELECT nothing FROM t", "SELECT player FROM t", False),
        ("", "SELECT player FROM t", False),
        ("SELECT player FROM t", "SELECT nothing FROM t", None),
        ("DROP TABLE t", "SELECT player FROM t", False),
        ("ATTACH DATABASE 'stolen.db' AS s", "SELECT player FROM t", False),
        ("SELECT player FROM t; DROP TABLE t", "SELECT player FROM t", False),
    ],
)
def test_queries_match_by_what_they_return(query, reference, same):
    assert execution_match(query, reference, TABLES) is same


def test_an_endless_query_is_stopped(monkeypatch):
    monkeypatch.setattr("pedro.evaluation.sql.MAX_STEPS", 100_000)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n"
    assert execution_match(endless, "SELECT 1", TABLES) is False


def test_a_sqlite_file_is_read_and_never_written(tmp_path):
    path = tmp_path / "courses.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE course (name TEXT)")
        connection.execute("INSERT INTO course VALUES ('Databases')")
    before = path.read_bytes()
    assert execution_match("SELECT name FROM course", "SELECT * FROM course", path) is True
    assert execution_match("DELETE FROM course", "SELECT * FROM course", path) is False
    assert path.read_bytes() == before
    with pytest.raises(DataError, match="give a sqlite file"):
        execution_match("SELECT 1", "SELECT 1", tmp_path / "none.db")


def test_execution_is_scored_where_there_is_a_database_and_exact_match_everywhere():
    reference = "SELECT player FROM t WHERE points = '5'"
    rows = [TaskRow("", reference, extra={"database": TABLES}), TaskRow("", reference)]
    answers = ["SELECT player FROM t WHERE points > 4", f"```sql\n{reference};\n```"]
    score = score_answers(get_task("wikisql"), rows, answers)
    assert score.value == score.parts["exact_match"] == 0.5
    assert score.parts["execution"] == 1.0
