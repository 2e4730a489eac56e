"""Tools and their calls in training rows: what is learnt, what conditions it, and what is refused by line."""

from __future__ import annotations

import copy
import json

import pytest
from transformers import PreTrainedTokenizerFast

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.data import LineError, check_file, format_for_shape, load_rows, parse_line, show_masks
from pedro.data.example_text import prompt_and_answer
from pedro.data.prompt_format import encode_completion, encode_prompt
from pedro.errors import DataError

TEMPLATE = """\
{% if tools %}tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}

{% endif %}
{% for message in messages %}
{{ message.role }}{% if message.name and message.role != "tool" %} {{ message.name }}{% endif %}:
{% if message.content %}{{ message.content }}{% endif %}
{% for call in message.tool_calls %}<call>{{ call.function | tojson }}</call>{% endfor %}</s>
{% endfor %}
{% if add_generation_prompt %}
assistant:
{% endif %}"""
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
    },
}
OTHER = {"type": "function", "function": {"name": "clock"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Zug"}'}}
USER = {"role": "user", "content": "Rain in Zug?"}
CALLING = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "tool_call_id": "c1", "content": "dry"}
ANSWER = {"role": "assistant", "content": "No."}
ROW = {"messages": [USER, CALLING, RESULT, ANSWER], "tools": [TOOL], "parallel_tool_calls": False}


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """One of the test's own, whose template writes tools."""
    tokenizer = copy.deepcopy(load_tokenizer(resolve_backbone("stories260K")))
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def write(tmp_path):
    def write(*rows):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def texts(row, tokenizer) -> list[tuple[str, str]]:
    form = format_for_shape("messages", tokenizer)
    return [prompt_and_answer(form, example, tokenizer) for example in parse_line(json.dumps(row), 1)]


def test_a_call_and_the_answer_to_its_result_are_learnt_each_from_what_stands_before_it(tokenizer):
    (first_prompt, first), (second_prompt, second) = texts(ROW, tokenizer)
    head = f"tools: {json.dumps(TOOL)}\nuser:\nRain in Zug?</s>\n"
    call = '<call>{"name": "weather", "arguments": {"town": "Zug"}}</call>'
    assert first_prompt == f"{head}assistant:\n"
    assert first == call
    assert second_prompt == f"{head}assistant:\n{call}</s>\ntool:\ndry</s>\nassistant:\n"
    assert second == "No."


@pytest.mark.parametrize("end", ["<|end_of_text|>", "<|x|>", "x", ""])
def test_an_answer_is_learnt_whole_whatever_ends_a_turn(tokenizer, end):
    tokenizer.chat_template = TEMPLATE.replace("</s>", end)
    (_, first), (_, second) = texts(ROW, tokenizer)
    assert first == '<call>{"name": "weather", "arguments": {"town": "Zug"}}</call>'
    assert second == "No."


def test_the_mask_shows_calls_as_learnt_and_ends_them_as_any_answer(write, tokenizer):
    first, second = show_masks(write(ROW), tokenizer)
    for mask in (first, second):
        learnt = [token for token, on in zip(mask.token_ids, mask.supervised, strict=True) if on]
        assert mask.supervised == (False,) * mask.prompt_len + (True,) * len(learnt)
        assert learnt[-1] == tokenizer.eos_token_id
        assert tokenizer.eos_token_id not in learnt[:-1]
    assert tokenizer.decode([t for t, on in zip(first.token_ids, first.supervised, strict=True) if on][:-1]).startswith(
        "<call>"
    )


def test_training_rows_are_those_that_the_mask_shows(write, tokenizer, tmp_path):
    path = write(ROW, {"messages": [USER, ANSWER]})
    rows = load_rows(path, tokenizer, format_for_shape("messages", tokenizer), 2000, tmp_path / "cache")
    masks = show_masks(path, tokenizer)
    assert [tuple(row["input_ids"]) for row in rows] == [mask.token_ids for mask in masks]
    assert [row["prompt_len"] for row in rows] == [mask.prompt_len for mask in masks]
    assert rows[0]["completion"].startswith("<call>")


def test_a_call_of_weight_0_is_context_alone(tokenizer):
    row = {**ROW, "messages": [USER, {**CALLING, "weight": 0}, RESULT, {**ANSWER, "weight": 1}]}
    assert texts(row, tokenizer) == texts(ROW, tokenizer)[1:]


def test_a_row_without_tools_is_what_it_always_was(tokenizer):
    parts = [{"type": "text", "text": "Rain "}, {"type": "text", "text": "in Zug?"}]
    row = {"messages": [{"role": "developer", "content": "Be brief."}, {**USER, "content": parts}, ANSWER]}
    (example,) = parse_line(json.dumps(row), 1)
    assert example.plain
    messages = ({"role": "system", "content": "Be brief."}, {"role": "user", "content": "Rain in Zug?"})
    assert example.messages == messages
    form = format_for_shape("messages", tokenizer)
    assert prompt_and_answer(form, example, tokenizer) == (form.prompt(messages, tokenizer), "No.")


def test_text_beside_a_call_and_several_calls_are_learnt_whole(tokenizer):
    second = {**CALL, "id": "c2", "function": {"name": "clock", "arguments": "{}"}}
    calling = {**CALLING, "content": "Let me see.", "tool_calls": [CALL, second]}
    ((_, answer),) = texts({"messages": [USER, calling], "tools": [TOOL, OTHER]}, tokenizer)
    assert answer.startswith("Let me see.<call>")
    assert answer.count("<call>") == 2


def test_tools_may_be_the_text_of_json_as_tables_hold_them(tokenizer):
    assert texts({**ROW, "tools": json.dumps([TOOL])}, tokenizer) == texts(ROW, tokenizer)
    arguments = {**CALL, "function": {**CALL["function"], "arguments": {"town": "Zug"}}}
    row = {**ROW, "messages": [USER, {**CALLING, "tool_calls": [arguments]}, RESULT, ANSWER]}
    assert texts(row, tokenizer) == texts(ROW, tokenizer)


def test_trls_form_may_hold_tools(tokenizer):
    row = {"prompt": ROW["messages"][:3], "completion": ROW["messages"][3:], "tools": [TOOL]}
    assert texts(row, tokenizer) == texts(ROW, tokenizer)[1:]


def test_a_result_without_a_name_has_that_of_its_call():
    example = parse_line(json.dumps(ROW), 1)[1]
    assert example.messages[2] == {**RESULT, "name": "weather"}


def test_special_tokens_that_tools_arguments_and_results_spell_stay_text(tokenizer):
    eos = tokenizer.eos_token
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"role": eos, eos: eos}}}
    call = {**CALL, "function": {"name": "weather", "arguments": json.dumps({"role": eos, "town": f"a{eos}b"})}}
    messages = [USER, {**CALLING, "tool_calls": [call]}, {**RESULT, "content": eos}, ANSWER]
    plain, spelled = texts(ROW, tokenizer), texts({"messages": messages, "tools": [tool]}, tokenizer)
    for (prompt, answer), (other_prompt, other_answer) in zip(plain, spelled, strict=True):
        for ids, others in (
            (encode_prompt(tokenizer, prompt), encode_prompt(tokenizer, other_prompt)),
            (encode_completion(tokenizer, answer), encode_completion(tokenizer, other_answer)),
        ):
            assert ids.count(tokenizer.eos_token_id) == others.count(tokenizer.eos_token_id)
    assert f"a{eos}b" in spelled[0][1]


def turn(**fields):
    return {"messages": [USER, {**CALLING, **fields}], "tools": [TOOL]}


def call(**fields):
    return turn(tool_calls=[{**CALL, **fields}])


WRONG = [
    ({**ROW, "tools": {"a": 1}}, "tools", "expected a list"),
    ({**ROW, "tools": "[1"}, "tools", "not JSON"),
    ({**ROW, "tools": [{"type": "retrieval"}]}, "tools[0].type", 'expected "function"'),
    ({**ROW, "tools": [TOOL, TOOL]}, "tools", "two of them are named weather"),
    ({**ROW, "tools": [{**TOOL, "function": {"name": "a b"}}]}, "tools[0].function.name", "letters"),
    ({**ROW, "tools": [{**TOOL, "colour": 1}]}, "tools[0].colour", "not known"),
    ({**ROW, "tools": [OTHER]}, "messages[1].tool_calls[0].function.name", "none of the row's tools"),
    ({**ROW, "parallel_tool_calls": "no"}, "parallel_tool_calls", "true or false"),
    ({**ROW, "functions": [{}]}, "functions", "not supported"),
    ({"prompt": "a", "completion": "b", "tools": [TOOL]}, "tools", "as messages"),
    (call(id=None), "messages[1].tool_calls[0].id", "expected text"),
    (call(type="code"), "messages[1].tool_calls[0].type", 'expected "function"'),
    (call(function=None), "messages[1].tool_calls[0].function", "expected an object"),
    (call(function={"name": "weather"}), "messages[1].tool_calls[0].function.arguments", "null or nothing"),
    (
        call(function={"name": "weather", "arguments": "{'town'}"}),
        "messages[1].tool_calls[0].function.arguments",
        "not JSON",
    ),
    (call(function={"name": "weather", "arguments": "[]"}), "messages[1].tool_calls[0].function.arguments", "object"),
    (turn(tool_calls=[CALL, CALL]), "messages[1].tool_calls[1].id", "two calls"),
    (
        {**turn(tool_calls=[CALL, {**CALL, "id": "c2"}]), "parallel_tool_calls": False},
        "messages[1].tool_calls",
        "parallel_tool_calls is false",
    ),
    (turn(tool_calls="x"), "messages[1].tool_calls", "expected a list"),
    (turn(tool_calls=[], function_call={"name": "weather"}), "messages[1].function_call", "OpenAI's form"),
    ({"messages": [{**USER, "tool_calls": [CALL]}, ANSWER]}, "messages[0].tool_calls", "only assistants call tools"),
    ({"messages": [{**USER, "tool_call_id": "c1"}, ANSWER]}, "messages[0].tool_call_id", "for a tool's result"),
    ({"messages": [USER, RESULT, ANSWER]}, "messages[1].tool_call_id", "no call with this id"),
    ({"messages": [USER, CALLING, {**RESULT, "tool_call_id": None}]}, "messages[2].tool_call_id", "expected text"),
    ({"messages": [USER, CALLING, RESULT, RESULT]}, "messages[3].tool_call_id", "no call with this id"),
    ({"messages": [USER, CALLING, {**RESULT, "name": "clock"}]}, "messages[2].name", "of weather"),
    ({"messages": [USER, CALLING, USER]}, "messages[2]", "no results yet (c1)"),
    ({"messages": [USER, {**ANSWER, "refusal": "I will not."}]}, "messages[1].refusal", "not supported"),
    ({"messages": [USER, {**ANSWER, "audio": {"id": "a"}}]}, "messages[1].audio", "not supported"),
    ({"messages": [{**USER, "content": [{"type": "input_audio"}]}, ANSWER]}, "messages[0].content[0]", "text"),
    ({"conversations": [{"from": "tool", "value": "x"}]}, "conversations[0].from", "OpenAI's form"),
]


@pytest.mark.parametrize(("row", "field", "reason"), WRONG, ids=[f"{field}: {reason}" for _, field, reason in WRONG])
def test_what_cannot_be_carried_is_refused_by_its_place(row, field, reason):
    with pytest.raises(LineError) as error:
        parse_line(json.dumps(row), 3)
    assert (error.value.line, error.value.field) == (3, field)
    assert reason in error.value.reason


@pytest.mark.parametrize(
    ("without", "row", "what"),
    [
        ("{% if tools %}", ROW, "tools"),
        ("{% for call in message.tool_calls %}", ROW, "tool_calls"),
        ("message.tool_calls %}<call>", turn(tool_calls=[CALL, {**CALL, "id": "c2"}]), "all calls of a turn"),
        ("{{ call.function | tojson }}", ROW, "the arguments of calls"),
        ("{% if message.content %}", ROW, "results of tools"),
        ("{% if message.content %}", turn(content="Let me see."), "the text beside calls"),
        ("message.name and", {"messages": [{**USER, "name": "ada"}, ANSWER]}, "names of those who speak"),
    ],
)
def test_a_template_that_leaves_something_out_is_refused_and_says_what(write, tokenizer, tmp_path, without, row, what):
    poorer = {
        "{% if tools %}": "{% if false %}",
        "{% for call in message.tool_calls %}": "{% for call in [] %}",
        "message.tool_calls %}<call>": "(message.tool_calls or [])[:1] %}<call>",
        "{{ call.function | tojson }}": "{{ call.function.name }}",
        "{% if message.content %}": "{% if message.content and message.role == 'user' %}",
        "message.name and": "false and",
    }
    tokenizer.chat_template = TEMPLATE.replace(without, poorer[without])
    assert tokenizer.chat_template != TEMPLATE
    path = write({"messages": [USER, ANSWER]}, row)
    report = check_file(path, tokenizer)
    assert not report.usable
    assert report.errors[0]["line"] == 2
    assert f"leaves out {what}" in report.errors[0]["reason"]
    with pytest.raises(DataError, match=f"leaves out {what}"):
        load_rows(path, tokenizer, format_for_shape("messages", tokenizer), 2000, tmp_path / "cache")


def test_the_packaged_chat_format_refuses_tools(write):
    tokenizer = load_tokenizer(resolve_backbone("stories260K"))
    assert "leaves out tools" in check_file(write(ROW), tokenizer).errors[0]["reason"]


def test_a_template_that_writes_a_call_elsewhere_is_refused(tokenizer):
    tokenizer.chat_template = TEMPLATE.replace(
        "{{ message.role }}{%", "{{ 'caller' if message.tool_calls else message.role }}{%"
    )
    with pytest.raises(DataError, match="not behind its prompt"):
        texts(ROW, tokenizer)


def test_names_are_written_where_the_template_has_a_place_for_them(tokenizer):
    ((prompt, _),) = texts({"messages": [{**USER, "name": "ada"}, ANSWER]}, tokenizer)
    assert prompt.startswith("user ada:\n")


def test_a_check_that_knows_no_backbone_takes_the_rows_and_tells_calls_apart(write):
    other = {**CALL, "function": {"name": "weather", "arguments": '{"town": "Bern"}'}}
    report = check_file(write(ROW, turn(), turn(tool_calls=[other])))
    assert report.usable
    assert report.examples == 4
    assert report.duplicates == 1  # the call of the first row again
