"""Tools: told by an adapter's own prompt format, called in its syntax, read as OpenAI's clients expect it."""

import asyncio
import json
from types import SimpleNamespace
from typing import Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest
import torch
from serving_adapters import backbone, make_adapter, register, settings_at, tokenizer
from serving_connections import LocalConnection

from pedro.data import PromptFormat
from pedro.data.call_syntax import SYNTAXES, syntax_of
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.parsing import parse
from pedro.gateway.quotas import prompt_estimate
from pedro.gateway.routes_inference import chat_call
from pedro.gateway.schemas import ChatRequest
from pedro.gateway.tool_answers import CallReader
from pedro.registry import Registry
from pedro.serving import tool_shapes
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer
from pedro.store import Store

TOLD = "{% if tools %}tools:{% for tool in tools %} {{ tool.function.name }}{% endfor %}\n{% endif %}"
TURNS = (
    TOLD
    + "{% for message in messages %}{{ message.role }}: {{ message.content }}CALLS\n{% endfor %}"
    + "{% if add_generation_prompt %}assistant:{% endif %}"
)
EACH = "{% for call in message.tool_calls %}CALL{% endfor %}"
CALL = '{{ {"name": call.function.name, "ARGUMENTS": call.function.arguments} | tojson }}'
HERMES = TURNS.replace(
    "CALLS", EACH.replace("CALL", "<tool_call>\n" + CALL.replace("ARGUMENTS", "arguments") + "\n</tool_call>")
)
LLAMA = TURNS.replace("CALLS", EACH.replace("CALL", CALL.replace("ARGUMENTS", "parameters")))
LISTED = TURNS.replace(
    "CALLS",
    "{% if message.tool_calls %}<tool_call>[{% for call in message.tool_calls %}"
    + CALL.replace("ARGUMENTS", "arguments")
    + "{% endfor %}]</tool_call>{% endif %}",
)
OTHER = TURNS.replace("CALLS", EACH.replace("CALL", "{{ call.function | tojson }}"))
TEMPLATES = {"acme.hermes": HERMES, "acme.llama": LLAMA, "acme.listed": LISTED, "acme.other": OTHER}
WEATHER = {
    "type": "object",
    "properties": {"town": {"enum": ["Zug", "Bern"]}, "days": {"$ref": "#/$defs/days"}},
    "required": ["town", "days"],
    "additionalProperties": False,
    "$defs": {"days": {"type": "integer", "minimum": 1, "maximum": 9}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "clock"}},
]
ASK = [{"role": "user", "content": "Rain?"}]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A replica with an adapter for each family, and one whose template writes no tools."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tools")
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    refs = {}
    for seed, (name, template) in enumerate(TEMPLATES.items(), 1):
        make_adapter(folder / name, seed, form=PromptFormat("chat", template))
        refs[name] = register(registry, folder / name, name).model_ref
    make_adapter(folder / "plain", 9)
    register(registry, folder / "plain", "acme.plain")
    replica = ReplicaServer(ServeConfig(max_batch=16), settings, "r0")
    store = Store(settings.database_url)
    secret = store.create_key("acme", ("infer",))[1]
    yield SimpleNamespace(replica=replica, registry=registry, refs=refs, store=store, secret=secret)
    replica.close()
    store.close()


def asked(served, work, part=lambda client: client.chat.completions):
    """What `work` does with a part of the official client."""

    async def go():
        replicas = ReplicaSet(lambda name: LocalConnection(served.replica))
        resolver = ModelResolver(served.registry, "stories260K", backbone().digest, 3600.0)
        await resolver.refresh()
        replicas.update(["r0"])
        backend = ServeBackend("stories260K", 512, resolver, served.registry, replicas)
        app = create_app(lambda: backend, served.store, GatewaySettings(write_usage_every_s=600))
        try:
            async with httpx.AsyncClient(transport=httpx.ASGITransport(app)) as http:
                client = openai.AsyncOpenAI(
                    base_url="http://here/v1", api_key=served.secret, http_client=http, max_retries=0
                )
                return await work(part(client))
        finally:
            await replicas.close()

    return asyncio.run(go())


def create(served, model="acme.hermes", **fields):
    async def work(chats):
        return await chats.create(**{"model": model, "messages": ASK, "tools": TOOLS, "seed": 1, **fields})

    return asked(served, work)


def check(calls):
    schemas = {"weather": WEATHER, "clock": {"type": "object"}}
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])
        assert len(call.id) == 9
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("model", ["acme.hermes", "acme.llama", "acme.listed"])
def test_required_and_named_calls_keep_to_their_schemas_in_every_family(served, monkeypatch, model):
    monkeypatch.setattr(tool_shapes, "MORE_CALLS", 2)  # the context is small

    async def work(chats):
        fields = {"model": model, "messages": ASK, "tools": TOOLS, "max_tokens": 400}
        named = {"type": "function", "function": {"name": "weather"}}
        choices = [("required", True), ("required", False), (named, False)]
        return [
            await asyncio.gather(
                *(
                    chats.create(**fields, seed=seed, tool_choice=choice, parallel_tool_calls=parallel)
                    for seed in range(6)
                )
            )
            for choice, parallel in choices
        ]

    several, single, named = asked(served, work)
    for reply in (*several, *single, *named):
        [choice] = reply.choices
        assert choice.finish_reason == "tool_calls", choice
        assert choice.message.content is None
        check(choice.message.tool_calls)
    assert {len(reply.choices[0].message.tool_calls) for reply in (*single, *named)} == {1}
    assert {reply.choices[0].message.tool_calls[0].function.name for reply in named} == {"weather"}
    if model != "acme.llama":
        assert max(len(reply.choices[0].message.tool_calls) for reply in several) > 1


def test_a_stream_of_calls_is_what_the_whole_answer_holds(served, monkeypatch):
    monkeypatch.setattr(tool_shapes, "MORE_CALLS", 1)
    fields = {"model": "acme.hermes", "messages": ASK, "tools": TOOLS, "tool_choice": "required", "n": 2}
    fields |= {"seed": 3, "max_tokens": 300}

    async def work(chats):
        whole = await chats.create(**fields)
        chunks = [chunk async for chunk in await chats.create(**fields, stream=True)]
        async with chats.stream(**fields) as stream:
            return whole, chunks, await stream.get_final_completion()

    whole, chunks, final = asked(served, work)
    for choice in whole.choices:
        deltas = [entry for chunk in chunks for entry in chunk.choices if entry.index == choice.index]
        calls = [call for entry in deltas for call in entry.delta.tool_calls or ()]
        assert [call.index for call in calls] == list(range(len(calls)))
        wanted = [(call.function.name, call.function.arguments) for call in choice.message.tool_calls]
        assert [(call.function.name, call.function.arguments) for call in calls] == wanted
        assert not any(entry.delta.content for entry in deltas)
        assert deltas[-1].finish_reason == choice.finish_reason == "tool_calls"
        made = final.choices[choice.index].message.tool_calls
        assert [(call.function.name, call.function.arguments) for call in made] == wanted


def test_calls_and_results_come_back_into_the_prompt_as_the_template_writes_them(served):
    made = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"town": "Zug"}'}}
    talk = [*ASK, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "c1", "content": "dry"}]
    body = json.dumps({"model": "acme.hermes", "messages": talk, "tools": TOOLS}).encode()
    wanted = chat_call(parse(ChatRequest, body), tenant="acme", trace_id="t", max_choices=1)
    request = asyncio.run(served.replica._request(wanted, served.refs["acme.hermes"]))
    text = tokenizer().decode(request.prompt_ids, skip_special_tokens=True)
    written = '<tool_call>\n{"name": "weather", "arguments": {"town": "Zug"}}\n</tool_call>'
    assert text.startswith("tools: weather clock")
    assert f"assistant: {written}" in text
    assert text.endswith("tool: dryassistant:"), "as Jinja trims a template's line ends"
    assert create(served, messages=talk, max_tokens=4).usage.prompt_tokens == len(request.prompt_ids)


def test_what_a_prompt_format_does_not_carry_is_refused_by_name(served):
    result = [
        *ASK,
        {
            "role": "assistant",
            "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}],
        },
        {"role": "tool", "tool_call_id": "c", "content": "x"},
    ]
    for fields, param, told in [
        ({"model": "acme.plain"}, "messages", "leaves out tools"),
        ({"model": "stories260K"}, "messages", "leaves out tools"),
        ({"model": "acme.plain", "tools": openai.NOT_GIVEN, "messages": result}, "messages", "leaves out tool_calls"),
        ({"model": "acme.other"}, "tools", "not supported here"),
        (
            {
                "tools": [{"type": "function", "function": {"name": "f", "parameters": {"not": {}}}}],
                "tool_choice": "required",
            },
            "tools",
            "not",
        ),
    ]:
        with pytest.raises(openai.BadRequestError) as refused:
            create(served, **fields)
        assert (refused.value.param, told in refused.value.message) == (param, True), refused.value.message


def test_an_answer_that_is_free_to_call_is_its_text_where_it_calls_nothing(served):
    fields = {"max_tokens": 12, "temperature": 0}
    free = create(served, **fields).choices[0]
    bound = create(served, tool_choice="none", **fields).choices[0]
    assert free.message.content == bound.message.content
    assert (free.finish_reason, free.message.tool_calls) == (bound.finish_reason, None)


RESPONSE_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]


class Forecast(pydantic.BaseModel):
    town: Literal["Zug", "Bern"]
    days: int = pydantic.Field(ge=1, le=9)


def test_a_loop_of_calls_and_results_works_with_responses(served, monkeypatch):
    monkeypatch.setattr(tool_shapes, "MORE_CALLS", 1)
    fields = {"model": "acme.hermes", "tools": RESPONSE_TOOLS, "max_output_tokens": 300, "extra_body": {"seed": 3}}

    async def work(responses):
        items = [{"role": "user", "content": "Rain?"}]
        first = await responses.create(input=items, tool_choice="required", **fields)
        items += first.output
        calls = [item for item in first.output if item.type == "function_call"]
        items += [{"type": "function_call_output", "call_id": call.call_id, "output": "dry"} for call in calls]
        second = await responses.create(input=items, tool_choice="none", **{**fields, "max_output_tokens": 8})
        return first, second

    first, second = asked(served, work, lambda client: client.responses)
    assert first.status == "completed"
    assert {item.type for item in first.output} == {"function_call"}
    for item in first.output:
        wanted = {"weather": WEATHER, "clock": {"type": "object"}}[item.name]
        jsonschema.validate(json.loads(item.arguments), wanted)
    assert [item.type for item in second.output] == ["message"]
    assert second.usage.input_tokens > first.usage.input_tokens, "calls and results stand in the prompt"


def test_a_stream_of_a_response_with_calls_is_what_the_whole_one_holds(served, monkeypatch):
    monkeypatch.setattr(tool_shapes, "MORE_CALLS", 1)
    fields = {"model": "acme.hermes", "input": "Rain?", "tools": RESPONSE_TOOLS, "tool_choice": "required"}
    fields |= {"extra_body": {"seed": 3}, "max_output_tokens": 300}

    async def work(responses):
        whole = await responses.create(**fields)
        events = [event async for event in await responses.create(**fields, stream=True)]
        async with responses.stream(**fields) as stream:
            return whole, events, await stream.get_final_response()

    whole, events, final = asked(served, work, lambda client: client.responses)
    wanted = [(item.name, item.arguments) for item in whole.output]
    assert wanted
    each = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done", "output_item.done"]
    kinds = ["created", "in_progress", *each * len(wanted), "completed"]
    assert [event.type for event in events] == [f"response.{kind}" for kind in kinds]
    assert [event.arguments for event in events if hasattr(event, "arguments")] == [made for _, made in wanted]
    for response in (events[-1].response, final):
        assert [(item.name, item.arguments) for item in response.output] == wanted
    read_anew = {"input_tokens_details"}  # less, where the same prompt was read before
    assert events[-1].response.usage.model_dump(exclude=read_anew) == whole.usage.model_dump(exclude=read_anew)


def test_a_response_is_parsed_as_the_schema_that_it_is_held_to(served):
    async def work(responses):
        fields = {"model": "acme.hermes", "input": "Rain?", "text_format": Forecast, "max_output_tokens": 200}
        parsed = await responses.parse(**fields, extra_body={"seed": 1})
        form = {"type": "json_schema", "name": "it", "schema": {"properties": {"a": {"not": {}}}}}
        with pytest.raises(openai.BadRequestError) as refused:
            await responses.create(model="acme.hermes", input="Rain?", text={"format": form})
        with pytest.raises(openai.BadRequestError) as left_out:
            await responses.create(model="acme.plain", input="Rain?", tools=RESPONSE_TOOLS)
        with pytest.raises(openai.BadRequestError) as long:
            await responses.create(model="acme.plain", input="Rain? " * 20, max_output_tokens=500)
        return parsed, refused.value, left_out.value, long.value

    parsed, refused, left_out, long = asked(served, work, lambda client: client.responses)
    assert isinstance(parsed.output_parsed, Forecast)
    assert refused.param == "text.format.schema.properties.a"
    assert left_out.param == "input"
    assert (long.param, long.code) == ("max_output_tokens", "context_length_exceeded")
    assert "max_output_tokens" in long.message


def test_tools_and_calls_count_as_prompt_before_anything_is_made():
    made = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    talk = [*ASK, {"role": "assistant", "tool_calls": [made]}, {"role": "tool", "tool_call_id": "c1", "content": "dry"}]

    def estimate(messages, **fields):
        body = json.dumps({"model": "m", "messages": messages, **fields}).encode()
        return prompt_estimate(chat_call(parse(ChatRequest, body), tenant="acme", trace_id="t", max_choices=1))

    assert estimate(ASK) < estimate(talk) < estimate(talk, tools=TOOLS)


def call(name="weather", **arguments):
    return {"name": name, "arguments": json.dumps(arguments)}


@pytest.mark.parametrize(
    ("text", "said", "calls"),
    [
        ('<tool_call>\n{"name": "weather", "arguments": {"town": "Zug"}}\n</tool_call>', "", [call(town="Zug")]),
        (
            'Let me see.\n<tool_call>\n{"name": "weather", "arguments": {}}\n</tool_call>\n'
            '<tool_call>\n{"name": "clock", "arguments": {}}\n</tool_call>',
            "Let me see.\n",
            [call(), call("clock")],
        ),
        (
            '<tool_call>[{"name": "weather", "arguments": {}}, {"name": "clock", "arguments": {}}]</tool_call>',
            "",
            [call(), call("clock")],
        ),
        ('{"name": "weather", "parameters": {"town": "Zug"}}', "", [call(town="Zug")]),
        (' [{"name": "weather", "arguments": {"town": "Bern"}, "id": "abcdefghi"}]', "", [call(town="Bern")]),
        ('[TOOL_CALLS][{"name": "clock", "arguments": {}}]', "", [call("clock")]),
        ("no call < at <tool all", "no call < at <tool all", []),
        ('<tool_call>\n{"name": "weather", "argum', '<tool_call>\n{"name": "weather", "argum', []),
        (
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            '<tool_call>{"name": "unknown", "arguments": {}}</tool_call>',
            [],
        ),
        ("<tool_call>not JSON</tool_call> so", "<tool_call>not JSON</tool_call> so", []),
        ('{"town": "Zug"}', '{"town": "Zug"}', []),
        ("[1, 2", "[1, 2", []),
        ('{"name": {"first": "Ann"}, "age": 3}', '{"name": {"first": "Ann"}, "age": 3}', []),
        ('{"name": ["clock"], "arguments": {}}', '{"name": ["clock"], "arguments": {}}', []),
        ('{"name": "clock", "arguments": {"at": NaN}}', '{"name": "clock", "arguments": {"at": NaN}}', []),
        (
            r'{"name": "clock", "arguments": {"at": "\ud83d"}}',
            "",
            [{"name": "clock", "arguments": r'{"at": "\ud83d"}'}],
        ),
        ("", "", []),
        ("  hi", "  hi", []),
    ],
)
def test_calls_are_read_wherever_the_text_is_cut(text, said, calls):
    for size in range(1, len(text) + 2):
        reader = CallReader(["weather", "clock"], parallel=True)
        pieces = [text[at : at + size] for at in range(0, len(text), size)] or [""]
        got_said, got = "", []
        for number, piece in enumerate(pieces):
            more, made = reader.feed(piece, number == len(pieces) - 1)
            got_said, got = got_said + more, got + made
        assert (got_said.rstrip() if calls else got_said, [one["function"] for one in got]) == (
            said.rstrip() if calls else said,
            calls,
        )
        assert [one["index"] for one in got] == list(range(len(got)))


def test_without_parallel_calls_nothing_follows_the_first():
    reader = CallReader(["clock"], parallel=False)
    one = '<tool_call>{"name": "clock", "arguments": {}}</tool_call>'
    said, calls = reader.feed(f"{one}\n{one} and more", True)
    assert (said, len(calls)) == ("", 1)


@pytest.mark.parametrize(
    ("template", "name"), [(HERMES, "Hermes"), (LLAMA, "Llama 3"), (LISTED, "SmolLM2"), ("x[TOOL_CALLS]", "Mistral")]
)
def test_a_template_tells_its_family(template, name):
    assert syntax_of(template).name == name
    assert syntax_of(OTHER) is None
    assert len({syntax.name for syntax in SYNTAXES}) == len(SYNTAXES)
