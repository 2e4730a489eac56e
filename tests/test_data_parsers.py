"""Answers are found in what models really write, and nothing is made up where there is none."""

import pytest

from pedro.data.tasks import TaskRow, get_task

CHOICES = TaskRow("", "B", extra={"choices": ("Paris", "Berlin", "Rome", "Madrid")})


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("positive", "positive"),
        (" Positive.", "positive"),
        ("**Negative**", "negative"),
        ("negative\n\nSentence: a new one\nAnswer: positive", "negative"),
        ("The sentiment of this sentence is positive.", "positive"),
        ("It is neither positive nor negative, so the answer is: negative", "negative"),
        ("Positive and negative at once", "positive"),
        ("It could be positive or negative", ""),
        ("positively dreadful", ""),
        ("I cannot say", ""),
        ("", ""),
    ],
)
def test_a_class_is_read(text, answer):
    assert get_task("sst2").parse(text, TaskRow("", "positive")) == answer


def test_a_class_of_two_words_or_within_another_is_read():
    row = TaskRow("", "")
    assert get_task("clinc_domains").parse("Small talk.", row) == "small talk"
    assert get_task("clinc_domains").parse("this is about my work", row) == "work"
    assert get_task("rte").parse("No, it does not entail it.", row) == "no"
    assert get_task("rte").parse("nothing", row) == ""


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("B", "B"),
        (" B\n", "B"),
        ("(B)", "B"),
        ("B. Berlin", "B"),
        ("B) Berlin is the capital", "B"),
        ("**B**", "B"),
        ("The answer is (C).", "C"),
        ("The correct answer is **D**.", "D"),
        ("Answer: B", "B"),
        ("At first A seemed right. The answer is B: Berlin", "B"),
        ("Berlin.", "B"),
        ("A good question! It is Berlin", ""),
        ("E", ""),
        ("", ""),
    ],
)
def test_a_choice_is_read(text, answer):
    assert get_task("mmlu").parse(text, CHOICES) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She sells 16 - 3 - 4 = 9 eggs.\nShe makes 9 * 2 = $18.\n#### 18", "18"),
        ("9 * 2 = 18. The answer is $18.00.", "18"),
        ("So the total is 70,000 dollars.", "70000"),
        ("#### 70,000", "70000"),
        ("The answer is -3.50", "-3.5"),
        ("Answer: 5\n\nQ: What of 7?\nA: 9", "5"),
        ("It takes 3 bolts.\nQuestion: How many are 4?", "3"),
        ("the answer is forty, that is 40", "40"),
        ("no idea", ""),
        ("0", "0"),
    ],
)
def test_a_number_is_read(text, answer):
    assert get_task("gsm8k").parse(text, TaskRow("", "")) == answer


@pytest.mark.parametrize(
    ("text", "wanted", "answer"),
    [
        ("We get Z = True. So the answer is True.", "True", "True"),
        ("So the answer is (B).", "(B)", "(B)"),
        ("(B)", "(B)", "(B)"),
        ("B) 12/25/1937", "(B)", "(B)"),
        ("**The answer is:** (C)", "(C)", "(C)"),
        ("Because of that", "(C)", ""),
        ("The final stack is empty. So the answer is ] } ].", "] } ]", "] } ]"),
        ("credulity hypochlorite phone\n\nQ: Sort", "credulity hypochlorite phone", "credulity hypochlorite phone"),
        ("-219.", "-219", "-219"),
    ],
)
def test_a_reasoned_answer_is_read(text, wanted, answer):
    assert get_task("bbh").parse(text, TaskRow("", wanted)) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("Denver Broncos", "Denver Broncos"),
        ('"Denver Broncos"\n\nPassage: next', "Denver Broncos"),
        ("\nAnswer: in October 1973", "in October 1973"),
        ("The answer is 1979", "1979"),
        ("answering machines", "answering machines"),
        ("", ""),
    ],
)
def test_a_span_is_read(text, answer):
    assert get_task("squad").parse(text, TaskRow("", "")) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("SELECT a FROM t", "SELECT a FROM t"),
        (
            "Here you are:\n```sql\nSELECT a\n\nFROM t\nWHERE b = 'x;y';\n```\nIt selects a.",
            "SELECT a FROM t WHERE b = 'x;y'",
        ),
        ("select a from t;\nselect b from t;", "select a from t"),
        ("The query is SELECT a FROM t\n\nThis reads the table.", "SELECT a FROM t"),
        ("WITH c AS (SELECT 1) SELECT * FROM c", "WITH c AS (SELECT 1) SELECT * FROM c"),
        ("I do not know the table", ""),
    ],
)
def test_a_query_is_read(text, answer):
    assert get_task("wikisql").parse(text, TaskRow("", "")) == answer
