"""Answers held to a schema, an expression, choices or a grammar: by a real replica, and through the gateway."""

import asyncio
import json
import os
import random
import re
from contextlib import aclosing
from types import SimpleNamespace
from typing import Annotated, Literal

import httpx
import jsonschema
import openai
import pytest
import torch
from llguidance import LLParserLimits
from pydantic import BaseModel, Field
from random_schemas import random_schema
from serving_adapters import backbone, make_adapter, register, settings_at
from serving_connections import LocalConnection

from pedro.errors import PedroError
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.backend import AnswerShape
from pedro.gateway.parsing import parse
from pedro.gateway.routes_inference import chat_call, completion_calls
from pedro.gateway.schemas import ChatRequest, CompletionRequest
from pedro.registry import Registry
from pedro.serving import answer_shapes
from pedro.serving.backend import ServeBackend
from pedro.serving.config import ServeConfig
from pedro.serving.resolver import ModelResolver
from pedro.serving.router import ReplicaSet
from pedro.serving.server import ReplicaServer
from pedro.store import Store

MODELS = ("stories260K", "acme.faq", "globex.faq")
SCHEMAS = int(os.environ.get("PEDRO_SCHEMAS", "100"))  # `make fuzz` asks for 1,000
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
STATES = 150  # enough for one answer of the test and not for twelve
TANGLED = "|".join(f".*{letter}.{{{20 + number}}}x.*" for number, letter in enumerate("abcdefghijklmnop"))
TOGETHER = {"allOf": [{"type": "string", "pattern": f"^(.*{letter}.{{30}}){{2}}.*$"} for letter in "abcdefgh"]}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A replica with two tenants' adapters."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("shapes")
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    refs = {"stories260K": None}
    for seed, name in enumerate(MODELS[1:], 1):
        make_adapter(folder / name, seed)
        refs[name] = register(registry, folder / name, name).model_ref
    replica = ReplicaServer(ServeConfig(max_batch=16), settings, "r0")
    yield SimpleNamespace(replica=replica, registry=registry, refs=refs, settings=settings)
    replica.close()


def chat(text="Tell me a story", tenant="acme", **fields):
    body = {"model": "m", "messages": [{"role": "user", "content": text}], "seed": 1, **fields}
    return chat_call(parse(ChatRequest, json.dumps(body).encode()), tenant=tenant, trace_id="t", max_choices=256)


def completion(prompt="Once upon a time", **fields):
    body = {"model": "m", "prompt": prompt, "seed": 1, "max_tokens": 200, **fields}
    [call] = completion_calls(
        parse(CompletionRequest, json.dumps(body).encode()), tenant="acme", trace_id="t", max_choices=256
    )
    return call


def schema_format(schema):
    return {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}


async def _answer(replicas, call, ref, resumed=()):
    """The choices of one call: text, token ids, log-probabilities, why it ended, and its deltas."""
    choices = {}
    async with aclosing(replicas.generate(call, ref, tuple(resumed))) as batches:
        async for batch in batches:
            for delta in batch:
                empty = SimpleNamespace(text="", token_ids=[], logprobs=[], finish=None, deltas=0)
                choice = choices.setdefault(delta.index, empty)
                choice.text += delta.text
                choice.token_ids += delta.token_ids
                choice.logprobs += delta.logprobs or ()
                choice.finish, choice.deltas = delta.finish_reason, choice.deltas + 1
    return [choices[index] for index in sorted(choices)]


def answers(served, calls, alone=False):
    """The choices of each (call, model), together or one after the other; an error in place of those it ended."""

    async def go():
        replicas = ReplicaSet(lambda name: LocalConnection(served.replica))
        replicas.update(["r0"])
        async with asyncio.timeout(120):
            while not replicas.ready:
                await asyncio.sleep(0.01)
        work = [_answer(replicas, call, served.refs[model]) for call, model in calls]
        try:
            if alone:
                return [(await asyncio.gather(one, return_exceptions=True))[0] for one in work]
            return await asyncio.gather(*work, return_exceptions=True)
        finally:
            await replicas.close()

    return asyncio.run(go())


def answer(served, call, model="stories260K"):
    [made] = answers(served, [(call, model)])
    if isinstance(made, Exception):
        raise made
    return made


def test_answers_to_random_schemas_always_validate_with_any_adapter(served):
    for first in range(0, SCHEMAS, 100):
        schemas = {seed: random_schema(seed) for seed in range(first, min(first + 100, SCHEMAS))}
        calls = [
            (chat(seed=seed, temperature=seed % 3 / 2, response_format=schema_format(schema)), model)
            for seed, schema in schemas.items()
            for model in MODELS
        ]
        made = answers(served, calls)
        for (call, _), choices in zip(calls, made, strict=True):
            assert not isinstance(choices, Exception), f"{choices}: {call.shape.text}"
            [choice] = choices
            assert choice.finish == "stop", (call.shape.text, choice.text)
            jsonschema.validate(json.loads(choice.text), json.loads(call.shape.text))
        texts = {tuple(made[at + number][0].text for number in range(3)) for at in range(0, len(made), 3)}
        assert any(len(set(of_one)) > 1 for of_one in texts), "adapters answer differently"


def test_answers_of_a_byte_level_tokenizer_validate_too(tmp_path):
    replica = ReplicaServer(ServeConfig(backbone="pedro-nano", max_batch=16), settings_at(tmp_path / "home"), "r0")
    here = SimpleNamespace(replica=replica, refs={"pedro-nano": None})
    schemas = [random_schema(seed) for seed in range(100, 120)]
    calls = [
        (kind(seed=seed, temperature=seed % 2, max_tokens=400, response_format=schema_format(schema)), "pedro-nano")
        for seed, schema in enumerate(schemas)
        for kind in (chat, completion)
    ]
    try:
        for (call, _), [choice] in zip(calls, answers(here, calls), strict=True):
            assert choice.finish == "stop", (call.shape.text, choice.text)
            jsonschema.validate(json.loads(choice.text), json.loads(call.shape.text))
    finally:
        replica.close()


def test_held_and_free_answers_of_one_batch_are_what_they_are_alone(served):
    held = {"response_format": schema_format(PERSON), "logprobs": True, "top_logprobs": 2, "n": 2}
    kinds = [held, {}, {"structured_outputs": {"regex": r"[a-c]{40}"}}, {"stop": "e"}, {"top_k": 5, **held}]
    calls = [
        (chat(seed=seed, temperature=seed % 2, max_tokens=60, **kinds[seed % 5]), MODELS[seed % 3])
        for seed in range(15)
    ]
    for together, alone in zip(answers(served, calls), answers(served, calls, alone=True), strict=True):
        for one, other in zip(together, alone, strict=True):
            assert (one.token_ids, one.text, one.finish) == (other.token_ids, other.text, other.finish)
            assert [round(entry.logprob, 3) for entry in one.logprobs] == [
                round(entry.logprob, 3) for entry in other.logprobs
            ]


def test_an_object_cut_by_max_tokens_ends_for_its_length_and_a_stop_text_where_it_stands(served):
    whole = answer(served, chat(response_format=schema_format(PERSON)))[0]
    assert json.loads(whole.text).keys() == {"name", "age"}
    cut = answer(served, chat(response_format=schema_format(PERSON), max_tokens=5))[0]
    assert (cut.finish, len(cut.token_ids)) == ("length", 5)
    assert whole.text.startswith(cut.text)
    stopped = answer(served, chat(response_format=schema_format(PERSON), stop=["age"]))[0]
    assert (stopped.finish, stopped.text) == ("stop", whole.text[: whole.text.index("age")])


def test_json_object_gives_an_object(served):
    for seed in range(4):
        made = answer(served, chat(seed=seed, response_format={"type": "json_object"}, max_tokens=300))[0]
        assert made.text.startswith("{")
        assert made.finish == "length" or isinstance(json.loads(made.text), dict)


CHOICES = ["yes", "no", 'say "maybe"', "naïve \U0001f600", "two\nlines", "back\\slash"]


@pytest.mark.parametrize(
    ("outputs", "fits"),
    [
        ({"regex": r"(\d{1,3}\.){3}\d{1,3}"}, lambda text: re.fullmatch(r"(\d{1,3}\.){3}\d{1,3}", text)),
        ({"choice": CHOICES}, lambda text: text in CHOICES),
        ({"json": json.dumps(PERSON)}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
        ({"json": PERSON}, lambda text: jsonschema.validate(json.loads(text), PERSON) is None),
        (
            {"grammar": 'start: "SELECT " column " FROM t"\ncolumn: "a" | "b"'},
            lambda text: re.fullmatch("SELECT [ab] FROM t", text),
        ),
        (
            {"grammar": 'root ::= "SELECT " column " FROM t"\ncolumn ::= "a" | "b"'},
            lambda text: re.fullmatch("SELECT [ab] FROM t", text),
        ),
    ],
    ids=["regex", "choice", "json as text", "json", "Lark", "GBNF"],
)
def test_each_of_vllms_structured_outputs_holds_chats_and_completions(served, outputs, fits):
    for seed in range(6):
        model = MODELS[seed % 3]
        for call in (
            chat(seed=seed, structured_outputs=outputs),
            completion(seed=seed, structured_outputs=outputs),
        ):
            [made] = answer(served, call, model)
            assert made.finish == "stop"
            assert fits(made.text), made.text


def test_every_choice_can_be_made(served):
    for text in CHOICES:
        assert answer(served, chat(structured_outputs={"choice": [text]}))[0].text == text


@pytest.mark.parametrize(
    ("fields", "param", "told"),
    [
        (
            {"response_format": schema_format({"properties": {"a": {"items": {"type": "strnig"}}}, "type": "object"})},
            "response_format.json_schema.schema.properties.a.items",
            "strnig",
        ),
        (
            {"response_format": schema_format({"anyOf": [{"type": "null"}, {"type": "array", "uniqueItems": True}]})},
            "response_format.json_schema.schema.anyOf[1]",
            "uniqueItems",
        ),
        ({"structured_outputs": {"json": {"$ref": "#/$defs/none"}}}, "structured_outputs.json", "none"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs.regex", "unclosed"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs.grammar", "nothing"),
        ({"structured_outputs": {"regex": "a|" * 50_001}}, "structured_outputs.regex", "at most 100,000 characters"),
        ({"structured_outputs": {"json": TOGETHER}}, "structured_outputs.json", ""),
        ({"structured_outputs": {"regex": TANGLED}}, "structured_outputs.regex", "exceeds the time or memory limit"),
    ],
    ids=["type", "keyword", "reference", "expression", "grammar", "size", "intersection", "states"],
)
def test_what_cannot_be_compiled_is_refused_with_its_place_and_the_next_is_answered(served, fields, param, told):
    with pytest.raises(PedroError) as caught:
        answer(served, chat(**fields))
    assert caught.value.status == 400
    assert caught.value.code in ("invalid_shape", "shape_bounds", None)
    assert caught.value.param == param, caught.value.message
    assert param.partition(".")[0] in caught.value.message
    assert told in caught.value.message
    assert answer(served, chat(structured_outputs={"choice": ["fine"]}))[0].text == "fine"


def test_a_shape_is_compiled_once_for_each_tenant_and_the_oldest_is_forgotten(served, monkeypatch):
    compiled = []
    real = answer_shapes.ShapeWorker.grammar
    monkeypatch.setattr(
        answer_shapes.ShapeWorker, "grammar", lambda *args: compiled.append(args[1].text) or real(*args)
    )
    monkeypatch.setattr(answer_shapes, "MAX_SHAPES", 2)

    def ask(text, tenant):
        asyncio.run(served.replica._shapes.new_mask(AnswerShape("regex", text, "structured_outputs.regex"), tenant))

    for text, tenant in [("x1", "a"), ("x1", "a"), ("x1", "b"), ("x2", "a"), ("x1", "a"), ("x3", "a"), ("x1", "a")]:
        ask(text, tenant)
    assert compiled == ["x1", "x1", "x2", "x3"], "one tenant's is not another's"
    ask("x2", "a")
    assert compiled[-1] == "x2", "which had been asked for least recently"


def walk(mask, seed):
    """Tokens that the mask lets through, drawn at random up to the end."""
    draw, taken = random.Random(seed), []
    while not taken or not mask.accept(taken[-1]):
        words = mask.bits().tolist()
        allowed = [token for token in range(512) if words[token // 32] >> token % 32 & 1]
        taken.append(draw.choice([token for token in allowed if token > 3] or allowed))
        if taken[-1] <= 3:
            break
    return taken


@pytest.mark.parametrize(
    "shape",
    [
        AnswerShape("regex", r"([a-z]{1,9} ){3}|\\d+", "structured_outputs.regex"),
        AnswerShape("json", json.dumps(PERSON), "response_format"),
    ],
)
def test_a_token_is_let_through_without_a_mask_only_where_the_mask_would(served, shape):
    start = asyncio.run(served.replica._shapes.new_mask(shape, "lets"))
    told = 0
    for seed in range(4):
        mask, draw, steps = start(), random.Random(seed), 0
        while steps < 40:
            words = mask.bits().tolist()
            allowed = [token for token in range(512) if words[token // 32] >> token % 32 & 1]
            known = [token for token in range(512) if mask.lets(token)]
            assert set(known) <= set(allowed), "of tokens that are spelled alike, masks know one"
            told += len(known)
            steps += 1
            taken = draw.choice([token for token in allowed if token > 3] or allowed)
            if taken <= 3 or mask.accept(taken):
                break
        assert steps > 1
    assert told > 100


def test_what_other_answers_of_its_shape_met_ends_no_answer(served, monkeypatch):
    shape = AnswerShape("regex", r"([a-z]{1,30} ){8}", "structured_outputs.regex")
    shapes = served.replica._shapes
    start = asyncio.run(shapes.new_mask(shape, "acme", apart=True))
    free = [walk(start(), seed) for seed in range(12)]
    read = []
    real = answer_shapes.CompiledShape.read
    monkeypatch.setattr(answer_shapes.CompiledShape, "read", lambda shape: read.append(shape) or real(shape))
    monkeypatch.setattr(answer_shapes, "CHEAP_S", 60.0)  # however slow this machine is
    monkeypatch.setattr(answer_shapes, "FIRST_S", 60.0)
    monkeypatch.setattr(answer_shapes, "limits", lambda: LLParserLimits(max_lexer_states=STATES, verbose_errors=False))
    start = asyncio.run(shapes.new_mask(shape, "other", apart=True))
    assert [walk(start(), seed) for seed in range(12)] == free
    assert len(read) > 1, "the limit was met"
    asyncio.run(shapes.new_mask(shape, "other", apart=True))
    assert read[-1] is not read[0], "a shape that is used up is compiled again"


class Step(BaseModel):
    explanation: Literal["because", "so"]
    done: bool


class Maths(BaseModel):
    steps: Annotated[list[Step], Field(max_length=2)]
    answer: int | None


def test_the_official_client_parses_answers_into_pydantic_models(served):
    store = Store(served.settings.database_url)
    secret = store.create_key("acme", ("infer",))[1]

    async def go():
        replicas = ReplicaSet(lambda name: LocalConnection(served.replica))
        resolver = ModelResolver(served.registry, "stories260K", backbone().digest, 3600.0)
        await resolver.refresh()
        replicas.update(["r0"])
        backend = ServeBackend("stories260K", 512, resolver, served.registry, replicas)
        app = create_app(lambda: backend, store, GatewaySettings(write_usage_every_s=600))
        transport = httpx.ASGITransport(app)
        messages = [{"role": "user", "content": "solve it"}]
        async with httpx.AsyncClient(transport=transport) as http:
            client = openai.AsyncOpenAI(base_url="http://here/v1", api_key=secret, http_client=http, max_retries=0)
            fields = {"model": "acme.faq", "messages": messages, "seed": 3}
            parsed = await client.chat.completions.parse(**fields, response_format=Maths)
            async with client.chat.completions.stream(**fields, response_format=Maths) as stream:
                streamed = await stream.get_final_completion()
            with pytest.raises(openai.BadRequestError) as refused:
                await client.chat.completions.create(
                    **fields, response_format=schema_format({"type": "object", "properties": {"a": {"type": "x"}}})
                )
        await replicas.close()
        return parsed, streamed, refused.value

    try:
        parsed, streamed, refused = asyncio.run(go())
    finally:
        store.close()
    assert isinstance(parsed.choices[0].message.parsed, Maths)
    assert streamed.choices[0].message.parsed == parsed.choices[0].message.parsed
    assert parsed.choices[0].finish_reason == "stop"
    assert refused.param == "response_format.json_schema.schema.properties.a"
    assert refused.code == "invalid_shape"
