"""Every shape is read, and every mistake in a line is said by number, field and reason."""

import json
import pickle

import pytest

from pedro.data import LineError, RowShape, parse_line
from pedro.data.row_shapes import read_line, read_row

USER = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def parse(row):
    return parse_line(json.dumps(row), 7)


def test_a_chat_line_becomes_one_example_per_assistant_turn():
    again = {"role": "user", "content": "Bye"}
    first, second = parse({"messages": [USER, ANSWER, again, {"role": "assistant", "content": "Ciao"}]})
    assert (first.messages, first.completion, first.line) == ((USER,), "Hello", 7)
    assert (second.messages, second.completion) == ((USER, ANSWER, again), "Ciao")


def test_an_assistant_turn_of_weight_0_is_context_only():
    (example,) = parse({"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER]})
    assert len(example.messages) == 3
    assert example.messages[1] == ANSWER


def test_text_parts_are_joined_and_developer_is_system():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (example,) = parse({"messages": [{"role": "developer", "content": parts}, ANSWER]})
    assert example.messages == ({"role": "system", "content": "ab"},)


@pytest.mark.parametrize("answer", ["completion", "response"])
def test_a_prompt_line_has_either_name_for_its_answer(answer):
    (example,) = parse({"prompt": "Hi", answer: "Hello"})
    assert (example.messages, example.completion) == ((USER,), "Hello")


@pytest.mark.parametrize("given", [{}, {"input": ""}, {"input": None}, {"input": "  "}])
def test_an_alpaca_line_without_input_is_a_user_message(given):
    (example,) = parse({"instruction": "Hi", "output": "Hello", **given})
    assert example.messages == (USER,)


def test_an_alpaca_line_with_input_is_a_system_and_a_user_message():
    (example,) = parse({"instruction": "Translate.", "input": "Hi", "output": "Salut"})
    assert example.messages == ({"role": "system", "content": "Translate."}, USER)


def test_a_sharegpt_line_becomes_the_same_as_a_chat_line():
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert parse({"conversations": turns}) == parse({"messages": [USER, ANSWER]})


def test_what_is_not_learnt_from_is_named():
    parsed = read_line(json.dumps({"id": 3, "messages": [{**USER, "mood": "Bo"}, ANSWER, USER]}), 1)
    assert parsed.shape is RowShape.MESSAGES
    assert parsed.ignored == ("id", "messages: turns after the last answer", "messages[].mood")


def test_system_and_history_stand_before_the_turns():
    """They were ignored with a count, which trained another task than the file says."""
    pirate, before = {"role": "system", "content": "A pirate."}, [{**USER, "content": "q"}, {**ANSWER, "content": "a"}]
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    assert parse({"conversations": turns, "system": "A pirate."})[0].messages == (pirate, USER)
    assert parse({"messages": [USER, ANSWER], "system_prompt": "A pirate."})[0].messages == (pirate, USER)
    assert parse({"prompt": "Hi", "completion": "Hello", "system": "A pirate."})[0].messages == (pirate, USER)
    alpaca = {"instruction": "Hi", "input": "there", "output": "y", "system": "A pirate.", "history": [["q", "a"]]}
    asked = {**USER, "content": "Hi\nthere"}
    parsed = read_line(json.dumps(alpaca), 1)
    assert (parsed.shape, parsed.examples[0].messages) == (RowShape.MESSAGES, (pirate, *before, asked))
    assert len(parsed.examples) == 1, "history is context, not learnt"


@pytest.mark.parametrize("nothing", [None, "", [], "[]"])
def test_a_blank_system_or_history_is_absent(nothing):
    row = {"instruction": "Hi", "output": "y", "system": nothing, "history": nothing, "weight": nothing}
    parsed = read_line(json.dumps(row), 1)
    assert (parsed.shape, parsed.examples[0].messages, parsed.ignored) == (RowShape.ALPACA, (USER,), ())


def test_assistants_in_trls_prompt_are_context_and_all_in_its_completion_are_learnt():
    again = {"role": "assistant", "content": "Ciao"}
    first, second = parse({"prompt": [USER, ANSWER, USER], "completion": [ANSWER, USER, again]})
    assert (first.messages, first.completion) == ((USER, ANSWER, USER), "Hello")
    assert (second.messages[3:], second.completion) == ((ANSWER, USER), "Ciao")


def test_columns_are_named_by_a_mapping():
    row = {"question": "Hi", "answer": "Hello", "input": "unused before"}
    fields = {"prompt": "question", "completion": "answer", "input": "other"}
    with pytest.raises(LineError, match="given, but fields name a column that is not here, other"):
        read_row(row, 1, fields)
    with pytest.raises(LineError, match="given beside other"):
        read_row({**row, "other": "both"}, 1, fields)
    (example,) = read_row({**row, "input": None}, 1, fields).examples
    assert (example.messages, example.completion) == ((USER,), "Hello")


def test_an_empty_answer_is_an_example():
    (example,) = parse({"prompt": "Hi", "completion": ""})
    assert example.completion == ""


MISTAKES = [
    ("{", "line", "not JSON"),
    ("[1, 2]", "line", "expected a JSON object, got a list"),
    ("[", "line", "put one object on each line"),
    ("3", "line", "expected a JSON object, got a number"),
    ("[" * 100_000, "line", "JSON that cannot be read"),
    ('{"prompt": ' + "9" * 5000 + "}", "line", "JSON that cannot be read"),
    ("{}", "line", "no known shape in an empty object"),
    ({"text": "x"}, "line", "no known shape in text"),
    ({"prompt": "x"}, "completion", "also needs completion or response"),
    ({"completion": "x"}, "prompt", "also needs prompt"),
    ({"instruction": "x"}, "output", "also needs output"),
    ({"output": "x"}, "instruction", "also needs instruction"),
    ({"prompt": "x", "completion": "y", "messages": []}, "line", "messages and completion at once"),
    ({"prompt": "x", "completion": "y", "response": "z"}, "response", "keep one"),
    ({"prompt": 3, "completion": "y"}, "prompt", "got a number; put it in quotes"),
    ({"prompt": "x", "completion": 1.5}, "completion", "got a number; put it in quotes"),
    ('{"prompt": "x", "a": {"b": 1, "b": 2}, "completion": "y"}', "b", "given twice in one object"),
    ('{"prompt": "x", "completion": "y"}\r{"prompt": "x"}', "line", "tr '\\r' '\\n'"),
    ({"prompt": "x", "completion": True}, "completion", "got true or false"),
    ({"prompt": "x", "completion": None}, "completion", "missing or null"),
    ({"prompt": " ", "completion": "y"}, "prompt", "empty"),
    ({"prompt": "x\ud800", "completion": "y"}, "prompt", "surrogate"),
    ({"instruction": "", "output": "y"}, "instruction", "empty"),
    ({"instruction": "x", "input": 1, "output": "y"}, "input", "got a number"),
    ({"messages": "x"}, "messages", "expected a list of turns, got text"),
    ({"messages": []}, "messages", "got an empty list"),
    ({"messages": [USER]}, "messages", "no assistant turn"),
    ({"messages": [ANSWER]}, "messages[0]", "nothing before it"),
    ({"messages": [USER, "Hello"]}, "messages[1]", "expected an object with role and content, got text"),
    ({"messages": [{"role": "function", "content": "x"}, ANSWER]}, "messages[0].role", "OpenAI's form alone"),
    ({"messages": [{"role": "narrator", "content": "x"}, ANSWER]}, "messages[0].role", "got 'narrator'"),
    ({"messages": [{"role": ["user"], "content": "x"}, ANSWER]}, "messages[0].role", "got a list"),
    ({"messages": [{"content": "x"}, ANSWER]}, "messages[0].role", "got null or nothing"),
    ({"messages": [{"role": "user"}, ANSWER]}, "messages[0].content", "got null or nothing"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWER]}, "messages[0].content[0]", "text"),
    ({"messages": [USER, {"role": "assistant", "function_call": {"name": "f"}}]}, "messages[1].function_call", "form"),
    ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "messages[1].weight", "expected 0 or 1, got 0.5"),
    ({"conversations": [{"from": "bot", "value": "x"}]}, "conversations[0]", "nothing before it"),
    ({"conversations": [{"from": "narrator", "value": "x"}]}, "conversations[0].from", "got 'narrator'"),
    ({"conversations": [{"from": "human", "content": "x"}]}, "conversations[0]", "keep one of the two forms"),
    ({"messages": [USER, {**ANSWER, "train": False}]}, "messages[1].train", "`weight: 0`"),
    ({"messages": [{"role": "system", "content": "a"}, USER, ANSWER], "system": "b"}, "system", "keep one of the two"),
    ({"instruction": "x", "output": "y", "history": "z"}, "history", "expected a list of [question, answer] pairs"),
    ({"instruction": "x", "output": "y", "history": [["z"]]}, "history[0]", "expected a pair"),
    ({"prompt": "x", "completion": "y", "history": [["q", "a"]]}, "history", "put it into the prompt"),
    ({"prompt": "x", "completion": "y", "input": "z"}, "input", "put it into the prompt"),
    ({"prompt": "x", "completion": "y", "label": False}, "label", "KTO"),
    ({"prompt": "x", "completion": "y", "images": ["a.png"]}, "images", "not supported yet"),
    ({"prompt": [USER], "completion": "y"}, "completion", "expected a list of turns as in prompt"),
    ({"conversations": [{"from": "human", "value": 1}]}, "conversations[0].value", "got a number"),
    ({"conversations": ["x"]}, "conversations[0]", "expected an object with from and value"),
    ({"conversations": {}}, "conversations", "got an object"),
]


@pytest.mark.parametrize(("row", "field", "reason"), MISTAKES)
def test_a_mistake_is_said_by_line_field_and_reason(row, field, reason):
    line = row if isinstance(row, str) else json.dumps(row)
    with pytest.raises(LineError) as caught:
        parse_line(line, 12)
    error = caught.value
    assert (error.line, error.field) == (12, field)
    assert reason in error.reason
    assert error.message == f"line 12: {field}: {error.reason}"
    assert len(error.message) < 400


def test_a_line_error_survives_pickling():
    error = pickle.loads(pickle.dumps(LineError(3, "prompt", "empty")))
    assert (error.line, error.field, error.reason, error.param) == (3, "prompt", "empty", "prompt")
