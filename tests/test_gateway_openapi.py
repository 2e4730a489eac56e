"""Who gets the gateway's OpenAPI document, and that it has every route with what it takes."""

from __future__ import annotations

import asyncio

import httpx
import jsonschema
import pytest

from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.openapi import document
from pedro.gateway.openapi_routes import ROUTES
from pedro.gateway.schemas import Body
from pedro.store import Store

HERE, ELSEWHERE = ("127.0.0.1", 40_000), ("192.0.2.7", 40_000)


def no_backend():
    pytest.fail("no backend is asked")


def test_the_document_is_for_operators_and_for_who_sits_at_the_machine(tmp_path):
    store = Store(f"sqlite:///{tmp_path}/pedro.db")
    keys = {scope: store.create_key("acme", (scope,))[1] for scope in ("infer", "admin")}
    app = create_app(no_backend, store, GatewaySettings(follow_keys_every_s=0.0))

    async def ask(client, scope=None, **headers):
        given = {"authorization": f"Bearer {keys[scope]}"} if scope else {}
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app, client=client), base_url="http://here") as http:
            reply = await http.get("/openapi.json", headers={**headers, **given})
        assert (reply.status_code == 200) == ("paths" in reply.json())
        return reply.status_code

    async def answers():
        return [
            await ask(ELSEWHERE, "admin"),
            await ask(ELSEWHERE, "infer"),
            await ask(ELSEWHERE),
            await ask(HERE),
            await ask(HERE, "infer"),
            await ask(HERE, **{"x-forwarded-for": "192.0.2.7"}),
            await ask(("a-name", 1)),
        ]

    assert asyncio.run(answers()) == [200, 403, 401, 200, 403, 401, 401]
    store.close()


@pytest.fixture(scope="module")
def told():
    return document(create_app(no_backend, store=None))


def test_every_route_is_told_with_its_body_and_every_reference_leads_somewhere(told):
    served = {f"{method.upper()} {path}": each for path, of in told["paths"].items() for method, each in of.items()}
    assert served.keys() == ROUTES.keys()
    for route, each in served.items():
        takes = ROUTES[route].body is not None or ROUTES[route].form is not None
        assert ("requestBody" in each) == takes, route
        assert {"200", "431", "500"} <= each["responses"].keys()
        assert bool(each["security"]) == ("401" in each["responses"]) == ("403" in each["responses"]), route
    text = str(told)
    known = told["components"]["schemas"]
    named = {part.split("'")[0] for part in text.split("#/components/schemas/")[1:]}
    assert named - known.keys() == set()


def test_a_stream_is_told_as_its_events(told):
    streams = [
        content["schema"]
        for of in told["paths"].values()
        for operation in of.values()
        for media, content in operation["responses"]["200"].get("content", {}).items()
        if media == "text/event-stream"
    ]
    assert len(streams) >= 3
    assert all((each["type"], each["required"]) == ("object", ["data"]) for each in streams)


def test_lists_tell_that_an_unknown_after_is_a_404(told):
    lists = [
        operation
        for of in told["paths"].values()
        for operation in of.values()
        if any(
            each["name"] == "after" and each["schema"]["type"] == "string" for each in operation.get("parameters", ())
        )
    ]
    assert len(lists) >= 5
    assert all("404" in operation["responses"] for operation in lists)


@pytest.mark.parametrize("kind", sorted({each.body for each in ROUTES.values() if each.body}, key=lambda k: k.__name__))
def test_the_schema_of_a_body_has_its_fields_and_those_that_ask_for_nothing(told, kind: type[Body]):
    schema = told["components"]["schemas"][kind.__name__]
    names = {field.alias or name for name, field in kind.model_fields.items()}
    assert schema["properties"].keys() == names | kind.harmless.keys()
    assert schema["additionalProperties"] is False
    jsonschema.Draft202012Validator.check_schema(schema)


RIGHT = {
    "CompletionRequest": [
        {"model": "m", "prompt": prompt, "stop": stop, "logit_bias": {"7": -3}}
        for prompt, stop in (("a", "."), (["a", "b"], [".", "\n"]), ([1, 2], None), ([[1], [2, 3]], []))
    ],
    "ChatRequest": [
        {"model": "m", "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "store": False},
    ],
    "JobRequest": [
        {"model": "m", "training_file": "file-1", "hyperparameters": {"n_epochs": "auto", "batch_size": 8}},
    ],
    "WebhookRequest": [{"url": "https://a.example", "name": "a", "event_types": ["batch.failed"]}],
}


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_what_clients_send_is_right_by_the_schema_as_it_is_by_the_gateway(told, name):
    kind = next(each.body for each in ROUTES.values() if each.body and each.body.__name__ == name)
    schema = {"$ref": f"#/components/schemas/{name}", "components": told["components"]}
    for body in RIGHT[name]:
        jsonschema.validate(body, schema)
        kind.model_validate({key: value for key, value in body.items() if key not in kind.harmless})
