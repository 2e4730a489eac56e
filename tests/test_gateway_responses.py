"""The official openai client's `responses` against the gateway: what is asked of the backend, and what comes back."""

from __future__ import annotations

import json
import time

import openai
import pytest
from gateway_backend import BACKBONE
from gateway_server import Gateway, serve
from store_moves import fill

from pedro.errors import PedroError
from pedro.gateway.app import GatewaySettings
from pedro.gateway.parsing import parse
from pedro.gateway.response_fields import ResponsesRequest
from pedro.gateway.response_input import Translation

SCHEMA = {"type": "object", "properties": {"a": {"enum": [None, 1]}}, "required": ["a"], "additionalProperties": False}
FORMAT = {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": True}
TOOL = {"type": "function", "name": "weather", "description": "of a town", "parameters": {"type": "object"}}
CALL = {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "weather", "arguments": '{"town": "Zug"}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "dry"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("responses"), settings=GatewaySettings(write_usage_every_s=0.01)) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway):
    return gateway.client(gateway.key())


def translated(**fields):
    return Translation(parse(ResponsesRequest, json.dumps({"model": "m", "input": "hi", **fields}).encode()))


def turns(items, **fields):
    return [
        {name: value for name, value in message.model_dump().items() if value is not None}
        for message in translated(input=items, **fields).chat.messages
    ]


def test_a_text_is_answered_with_one_message_and_its_usage(gateway, client):
    reply = client.responses.create(
        model="acme.support",
        input="one two three",
        instructions="be brief",
        max_output_tokens=4,
        metadata={"ticket": "7"},
        user="u",
    )
    call = gateway.backend.calls[-1]
    assert call.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one two three"},
    )
    assert (call.params, call.user) == ({"temperature": 1.0, "top_p": 1.0, "max_tokens": 4}, "u")
    assert (reply.object, reply.model, reply.status) == ("response", "acme.support", "incomplete")
    assert reply.incomplete_details.reason == "max_output_tokens"
    assert reply.output_text == "be brief one two "
    [item] = reply.output
    assert (item.type, item.role, item.status, item.content[0].annotations) == (
        "message",
        "assistant",
        "incomplete",
        [],
    )
    assert (reply.instructions, reply.metadata, reply.max_output_tokens) == ("be brief", {"ticket": "7"}, 4)
    assert (reply.store, reply.previous_response_id, reply.tools, reply.tool_choice) == (False, None, [], "auto")
    assert reply.system_fingerprint == "fp_1"
    assert (reply.usage.input_tokens, reply.usage.output_tokens, reply.usage.total_tokens) == (5, 4, 9)
    assert reply.usage.input_tokens_details.cached_tokens == 0
    assert reply.usage.output_tokens_details.reasoning_tokens == 0
    assert reply.id.startswith("resp_")
    assert reply.id != client.responses.create(model=BACKBONE, input="a", max_output_tokens=1).id


def test_a_stream_has_openais_events_in_their_order_and_holds_what_the_whole_answer_does(client):
    fields = {"model": BACKBONE, "input": "a bb", "max_output_tokens": 3}
    events = list(client.responses.create(**fields, stream=True))
    deltas = ["response.output_text.delta"] * 3
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert (events[0].response.status, events[0].response.output) == ("in_progress", [])
    assert "".join(event.delta for event in events[4:7]) == events[7].text == "a bb a "
    assert events[2].item.content == []
    assert len({event.item_id for event in events if hasattr(event, "item_id")}) == 1
    last, whole = events[-1].response, client.responses.create(**fields)
    assert last.id == events[0].response.id
    assert (last.output_text, last.usage, last.status) == (whole.output_text, whole.usage, whole.status)
    with client.responses.stream(**fields) as stream:
        kinds = [event.type for event in stream]
    assert kinds == [event.type for event in events]


def test_obfuscation_hides_how_long_the_pieces_are(gateway):
    body = {"model": BACKBONE, "input": "a bbbbbbb", "max_output_tokens": 4, "stream": True}
    with gateway.http(gateway.key()) as http:
        plain = http.post("/v1/responses", json=body).text.split("\n\n")
        hidden = http.post("/v1/responses", json={**body, "stream_options": {"include_obfuscation": True}}).text
    assert not any("obfuscation" in frame for frame in plain)
    assert "[DONE]" not in hidden, "OpenAI sends none here"
    sizes = [len(frame) for frame in hidden.split("\n\n") if frame.startswith("event: response.output_text.delta")]
    assert len(sizes) == 4
    assert len({size % 64 for size in sizes}) == 1, "whole blocks"


def test_items_become_the_turns_of_a_chat():
    said = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"}
    said["content"] = [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]
    other = {**CALL, "call_id": "c2", "arguments": '{"town": "Bern"}'}
    items = [
        {"role": "developer", "content": "x"},
        {"role": "user", "content": [{"type": "input_text", "text": "Rain "}, {"type": "input_text", "text": "here?"}]},
        said,
        CALL,
        other,
        RESULT,
        {**RESULT, "call_id": "c2", "output": [{"type": "input_text", "text": "wet"}]},
        {"role": "assistant", "content": "Dry, and wet."},
        {"type": "message", "role": "user", "content": "Thanks"},
    ]

    def call(name, town):
        return {"id": name, "type": "function", "function": {"name": "weather", "arguments": town}}

    assert turns(items, instructions="be brief") == [
        {"role": "system", "content": "be brief"},
        {"role": "developer", "content": "x"},
        {"role": "user", "content": "Rain here?"},
        {
            "role": "assistant",
            "content": "Let me see.",
            "tool_calls": [call("c1", '{"town": "Zug"}'), call("c2", '{"town": "Bern"}')],
        },
        {"role": "tool", "content": "dry", "tool_call_id": "c1"},
        {"role": "tool", "content": "wet", "tool_call_id": "c2"},
        {"role": "assistant", "content": "Dry, and wet."},
        {"role": "user", "content": "Thanks"},
    ]
    assert turns([CALL, said, RESULT])[0]["content"] == "Let me see.", "said beside the call, in whichever order"


def test_fields_become_those_of_a_chat():
    chat = translated(
        tools=[{**TOOL, "strict": True, "defer_loading": False}],
        tool_choice={"type": "function", "name": "weather"},
        parallel_tool_calls=False,
        text={"format": FORMAT},
        logit_bias={"5": 1.5},
        seed=3,
        stop=["x"],
        store=False,
        include=[],
        truncation="disabled",
        reasoning={"effort": None, "summary": None},
    ).chat
    function = {name: value for name, value in TOOL.items() if name != "type"}
    assert chat.tools == [{"type": "function", "function": {**function, "strict": True}}]
    assert chat.tool_choice == {"type": "function", "function": {"name": "weather"}}
    assert chat.parallel_tool_calls is False
    assert chat.response_format.json_schema.schema_ == SCHEMA
    assert (chat.logit_bias, chat.seed, chat.stop) == ({5: 1.5}, 3, ("x",))


def test_the_request_comes_back_as_it_was_asked(client):
    reply = client.responses.create(
        model=BACKBONE,
        input="a",
        max_output_tokens=1,
        temperature=0.5,
        top_p=0.25,
        text={"format": FORMAT},
        tools=[TOOL],
        tool_choice="none",
    )
    assert (reply.temperature, reply.top_p, reply.tool_choice) == (0.5, 0.25, "none")
    assert reply.text.format.to_dict() == FORMAT
    assert reply.tools[0].to_dict() == {**TOOL, "strict": None}


BAD = [
    ({"previous_response_id": "resp_1"}, "previous_response_id", "send the turns so far in input"),
    ({"conversation": {"id": "conv_1"}}, "conversation", "send the turns so far in input"),
    ({"store": True}, "store", "store=false"),
    ({"background": True}, "background", "batch"),
    ({"prompt": {"id": "pmpt_1"}}, "prompt", "instructions"),
    ({"truncation": "auto"}, "truncation", "send the turns that fit"),
    ({"reasoning": {"effort": "high"}}, "reasoning", "leave it out"),
    ({"include": ["message.output_text.logprobs"]}, "include", "chat"),
    ({"top_logprobs": 2}, "top_logprobs", "chat"),
    ({"n": 2}, "n", "one answer"),
    ({"use_beam_search": True}, "use_beam_search", "chat"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "web_search"),
    ({"tools": [{"type": "function"}]}, "tools[0].name", "name"),
    ({"tools": [{**TOOL, "output_schema": {"type": "object"}}]}, "tools[0].output_schema", "not known"),
    ({"tools": [TOOL], "tool_choice": {"type": "file_search"}}, "tool_choice", "required"),
    ({"tools": [TOOL], "tool_choice": "maybe"}, "tool_choice", "maybe"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "clock"}}, "tool_choice", "clock"),
    ({"tools": [TOOL], "text": {"format": {"type": "json_object"}}}, "text.format", "tools"),
    ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema", "required"),
    ({"text": {"format": {"type": "json_object", "name": "a"}}}, "text.format.name", "json_schema"),
    ({"text": {"format": {"type": "xml"}}}, "text.format.type", "json_object"),
    ({"text": {"verbosity": "high"}}, "text.verbosity", "high"),
    ({"text": {"format": FORMAT}, "ignore_eos": True}, "ignore_eos", "text.format"),
    ({"max_output_tokens": 0}, "max_output_tokens", "1"),
    ({"max_tokens": 5}, "max_tokens", "max_output_tokens"),
    ({"metadata": {"a": 1}}, "metadata", "texts"),
    ({"input": []}, "input", "items"),
    ({"input": None}, "input", "string"),
    ({"input": ["hi"]}, "input", "items"),
    ({"tool_choice": 5}, "tool_choice", "required"),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input[0].type", "send the item itself"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "leave it out"),
    (
        {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
        "input[0].content[0].type",
        "text",
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "x"}]}]},
        "input[0].content[0].type",
        "text",
    ),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "developer"),
    ({"input": [{"role": "user"}]}, "input[0].content", "string"),
    ({"input": [{"role": "user", "content": "x", "mood": 1}]}, "input[0]", "mood"),
    ({"input": [{**CALL, "arguments": "{"}, RESULT]}, "input[0].arguments", "JSON"),
    ({"input": [{"role": "user", "content": "x"}, RESULT], "instructions": "y"}, "input[1].call_id", "c1"),
    ({"input": [CALL, {"role": "user", "content": "x"}]}, "input[1]", "results"),
]


@pytest.mark.parametrize(("change", "param", "told"), BAD, ids=lambda value: str(value)[:40])
def test_what_cannot_be_had_is_a_400_that_names_the_field_as_it_was_sent(gateway, change, param, told):
    before = len(gateway.backend.calls)
    with gateway.http(gateway.key()) as http:
        reply = http.post("/v1/responses", json={"model": BACKBONE, "input": "hi", **change})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], told in error["message"]) == (param, True), error
    assert len(gateway.backend.calls) == before


def test_errors_of_the_engine_speak_of_the_requests_own_fields():
    translation = translated(input=[{"role": "user", "content": "a"}], instructions="b")
    told = translation.named(
        PedroError("messages[1]: with max_tokens = 9 exceeds the context", param="max_tokens", code="c")
    )
    assert told.message == "input[0]: with max_output_tokens = 9 exceeds the context"
    assert (told.param, told.code, str(told)) == ("max_output_tokens", "c", told.message)
    shape = translation.named(PedroError("x", param="response_format.json_schema.schema.properties.a"))
    assert shape.param == "text.format.schema.properties.a"


def test_an_error_before_the_first_event_has_a_status_and_a_later_one_is_a_failed_response(gateway, client):
    for stream in (False, True):
        with pytest.raises(openai.RateLimitError):
            client.responses.create(model=BACKBONE, input="queue", stream=stream)
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="globex.faq", input="a", stream=stream)
    for word, code, message in (("refuse", "adapter_gone", "went away"), ("break", "internal_error", "request id")):
        events = list(client.responses.create(model=BACKBONE, input=word, max_output_tokens=9, stream=True))
        assert events[-1].type == "response.failed"
        failed = events[-1].response
        assert (failed.status, failed.error.code) == ("failed", code)
        assert message in failed.error.message
        assert [event.type for event in events].count("response.output_item.done") == 1
        assert failed.output_text == f"{word} {word} "
        assert failed.output[0].status == "incomplete"
    with pytest.raises(openai.InternalServerError):
        client.responses.create(model=BACKBONE, input="vanish", max_output_tokens=9)


def test_a_response_counts_as_any_request_does(gateway):
    key, secret = gateway.store.create_key("initech", ("infer", "read"))
    gateway.store.set_quota(tenant="initech", requests_per_minute=2)
    client = gateway.client(secret)
    client.responses.create(model=BACKBONE, input="a b c", max_output_tokens=2)
    list(client.responses.create(model=BACKBONE, input="a b c", max_output_tokens=2, stream=True))
    with pytest.raises(openai.RateLimitError, match="initech"):
        client.responses.create(model=BACKBONE, input="a b c", max_output_tokens=2)
    deadline = time.monotonic() + 60
    while not (rows := [row for row in gateway.store.usage() if row.key_id == key.id and row.requests == 2]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows] == [(6, 4)]


def test_a_key_that_is_held_to_an_adapter_meets_the_404_of_an_unknown_name(gateway):
    fill(gateway.store, 1, "acme.support")
    client = gateway.client(gateway.store.create_key("acme", ("infer",), adapters=("support",))[1])
    assert client.responses.create(model="acme.support", input="a", max_output_tokens=1).output_text == "a "
    with pytest.raises(openai.NotFoundError):
        client.responses.create(model=BACKBONE, input="a")
