"""Rows of preferences: OpenAI's and TRL's, with the masks of other rows, and what is wrong with them told by line."""

import json

import pytest

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import (
    LineError,
    RowShape,
    check_file,
    encode_completion,
    encode_prompt,
    format_for_shape,
    load_rows,
    parse_line,
    scan,
    show_masks,
)
from pedro.data.row_shapes import read_line, read_row

USER, GOOD, BAD = ({"role": role, "content": text} for role, text in (
    ("user", "Hi"), ("assistant", "Hello"), ("assistant", "What"),
))  # fmt: skip
OPENAI = {"input": {"messages": [USER]}, "preferred_output": [GOOD], "non_preferred_output": [BAD]}
TEXT = {"prompt": "Hi", "chosen": "Hello", "rejected": "What"}
CALL = {
    "role": "assistant",
    "tool_calls": [{"id": "1", "type": "function", "function": {"name": "greet", "arguments": '{"who": "all"}'}}],
}
TOOL = {"type": "function", "function": {"name": "greet", "parameters": {}}}


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(resolve_backbone("stories260K"))


def write(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_is_an_example_of_its_better_answer_that_knows_the_worse_one():
    for row, shape in (
        (OPENAI, RowShape.PREFERENCE),
        ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, RowShape.PREFERENCE),
        (TEXT, RowShape.PREFERENCE_TEXT),
    ):
        parsed = read_line(json.dumps(row), 3)
        (example,) = parsed.examples
        assert (parsed.shape, parsed.ignored) == (shape, ())
        assert (example.messages, example.completion, example.line) == ((USER,), "Hello", 3)
        assert (example.rejected.messages, example.rejected.completion) == ((USER,), "What")
        assert example.rejected.rejected is None


def test_tools_calls_system_and_assistants_before_the_answer_are_read_as_elsewhere():
    row = {
        "input": {"messages": [USER, GOOD, USER], "tools": [TOOL], "parallel_tool_calls": False},
        "preferred_output": [CALL],
        "non_preferred_output": [{**BAD, "mood": "rude"}],
        "system": "Be kind.",
        "score": 3,
    }
    parsed = read_line(json.dumps(row), 1)
    (example,) = parsed.examples
    assert parsed.ignored == ("non_preferred_output[].mood", "score")
    assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "user"]
    assert example.tools == example.rejected.tools != ()
    assert example.answer["tool_calls"][0]["function"]["arguments"] == {"who": "all"}
    assert example.rejected.answer is None


def test_columns_are_named_by_a_mapping():
    row = {"question": "Hi", "good": "Hello", "bad": "What"}
    (example,) = read_row(row, 1, {"prompt": "question", "chosen": "good", "rejected": "bad"}).examples
    assert (example.completion, example.rejected.completion) == ("Hello", "What")


MISTAKES = [
    ({**OPENAI, "input": [USER]}, "input", "expected an object with messages, got a list"),
    ({"preferred_output": [GOOD], "non_preferred_output": [BAD]}, "input", "got null or nothing"),
    ({**OPENAI, "input": {"tools": []}}, "input.messages", "expected a list of turns, got null"),
    ({**OPENAI, "input": {"messages": [{"role": "user"}]}}, "input.messages[0].content", "got null"),
    ({**OPENAI, "tools": [TOOL]}, "tools", "belongs into input"),
    ({**OPENAI, "preferred_output": []}, "preferred_output", "one turn, the assistant's, got an empty"),
    ({**OPENAI, "preferred_output": "Hello"}, "preferred_output", "got text"),
    ({**OPENAI, "non_preferred_output": [BAD, USER, BAD]}, "non_preferred_output", "got 3 turns"),
    ({**OPENAI, "non_preferred_output": [USER]}, "non_preferred_output", "no assistant turn"),
    ({**OPENAI, "non_preferred_output": [GOOD]}, "non_preferred_output", "the same as preferred_output"),
    ({"input": {}, "preferred_output": [GOOD]}, "non_preferred_output", "also needs non_preferred_output"),
    ({**OPENAI, **TEXT}, "line", "fits preference and preference-text at once"),
    ({**OPENAI, "preferred_output": [{**CALL, "tool_calls": [{"id": "1"}]}]},
     "preferred_output[0].tool_calls[0].function", "expected an object"),
    ({"chosen": "a", "rejected": "b"}, "prompt", "give what both conversations begin with as prompt"),
    ({"prompt": "a", "chosen": "b"}, "rejected", "also needs rejected (preference-text)"),
    ({**TEXT, "completion": "c"}, "line", "fits preference-text and completion at once"),
    ({**TEXT, "rejected": "Hello"}, "rejected", "the same as chosen, so there is nothing to prefer"),
    ({**TEXT, "chosen": [GOOD]}, "chosen", "a list of turns, but the prompt is text"),
    ({**TEXT, "prompt": [USER]}, "chosen", "expected a list of one turn"),
    ({**TEXT, "prompt": 3}, "prompt", "expected text or a list of turns, got a number"),
    ({**TEXT, "prompt": " "}, "prompt", "empty"),
    ({**TEXT, "rejected": 0.5}, "rejected", "got a number"),
    ({**TEXT, "tools": [TOOL]}, "tools", "write the row as messages"),
]  # fmt: skip


@pytest.mark.parametrize(("row", "field", "reason"), MISTAKES)
def test_a_mistake_is_said_by_line_field_and_reason(row, field, reason):
    with pytest.raises(LineError) as caught:
        parse_line(json.dumps(row), 12)
    assert (caught.value.line, caught.value.field) == (12, field)
    assert reason in caught.value.reason


def test_a_file_of_preferences_holds_nothing_else(tmp_path):
    path = write(tmp_path, OPENAI, {"messages": [USER, GOOD]}, TEXT)
    _, second, third = scan(path)
    assert second.message == "line 2: shape: this is messages, but line 1 is preference; a file holds one shape"
    assert third.line == 3


def test_rows_have_both_sides_behind_one_prompt_cut_alike(tmp_path, tokenizer):
    path = write(tmp_path, TEXT, {**TEXT, "prompt": "Hey", "rejected": "What is it now " * 4})
    form = format_for_shape("preference-text", tokenizer)
    rows = load_rows(path, tokenizer, form, 12, tmp_path / "cache")
    before = encode_prompt(tokenizer, "Hi")
    assert rows[0]["input_ids"] == [*before, *encode_completion(tokenizer, "Hello")]
    assert rows[0]["rejected_ids"] == [*before, *encode_completion(tokenizer, "What")]
    assert (rows[0]["prompt_len"], rows[0]["completion"]) == (len(before), "Hello")
    assert len(rows[1]["rejected_ids"]) == 12
    assert len(rows[1]["input_ids"]) < 12
    plain = write(tmp_path, {"prompt": "Hi", "completion": "Hello"})
    alone = load_rows(plain, tokenizer, form, 12, tmp_path / "cache")
    assert "rejected_ids" not in alone.column_names
    assert alone[0]["split_hash"] == rows[0]["split_hash"]


def test_the_check_and_its_masks_show_both_sides(tmp_path, tokenizer):
    path = write(tmp_path, OPENAI, OPENAI, {**OPENAI, "non_preferred_output": [{**BAD, "content": "play " * 30}]})
    report = check_file(path, tokenizer, 40)
    assert report.usable
    assert (report.shape, report.examples, report.duplicates, report.truncated) == ("preference", 3, 1, 1)
    assert report.rejected_tokens.max > report.completion_tokens.max
    assert "rejected    tokens: min" in report.text()
    assert check_file(path).duplicates == 1
    masks = show_masks(path, tokenizer, 2)
    assert [mask.side for mask in masks] == ["preferred", "rejected"] * 2
    assert masks[0].prompt == masks[1].prompt
    assert masks[0].prompt_len == masks[1].prompt_len
    assert [mask.completion for mask in masks[:2]] == ["Hello", "What"]
    assert masks[1].supervised == (False,) * masks[1].prompt_len + (True,) * (
        len(masks[1].tokens) - masks[1].prompt_len
    )
    assert masks[1].text().startswith("line 1, rejected: ")
