"""Requests wait in the proxy while Serve has no application for them; other answers pass as they are."""

import asyncio

import pytest
from ray.serve._private.http_util import convert_object_to_asgi_messages
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from pedro.gateway import not_yet
from pedro.gateway.not_yet import NotYet

SERVES = "Path '/v1/completions' not found. Ping http://.../-/routes for available routes."


class Proxy:
    """Serve's proxy, which knows of the application after it was asked so many times."""

    def __init__(self, application, unaware=0):
        self.application, self.unaware, self.asked = application, unaware, 0

    async def __call__(self, scope, receive, send):
        self.asked += scope["type"] == "http"
        if scope["type"] == "http" and self.asked <= self.unaware:
            for message in convert_object_to_asgi_messages(SERVES, status_code=404):
                await send(message)
            return
        await self.application(scope, receive, send)


async def echo(request: Request):
    return JSONResponse({"said": (await request.body()).decode()})


async def lost(request: Request):
    if request.query_params.get("plain"):
        return PlainTextResponse("nothing of the kind", status_code=404)
    return JSONResponse({"error": {"code": "model_not_found", **request.query_params}}, status_code=404)


@pytest.fixture
def application(monkeypatch):
    monkeypatch.setattr(not_yet, "LOOK_S", 0.001)
    return Starlette(routes=[Route("/v1/completions", echo, methods=["POST"]), Route("/lost", lost)])


def test_a_request_that_comes_before_the_application_is_known_waits_and_is_answered_with_its_own_body(application):
    proxy = Proxy(application, unaware=3)
    with TestClient(NotYet(proxy)) as client:
        reply = client.post("/v1/completions", content=b"hello")
        assert (reply.status_code, reply.json(), proxy.asked) == (200, {"said": "hello"}, 4)
        assert client.post("/v1/completions", content=b"again").json() == {"said": "again"}


def test_an_applications_own_404_is_final_whatever_it_says(application):
    proxy = Proxy(application)
    with TestClient(NotYet(proxy)) as client:
        assert client.get("/lost").json() == {"error": {"code": "model_not_found"}}
        assert client.get("/lost?plain=1").text == "nothing of the kind"
        assert client.get("/nowhere").status_code == 404
        assert client.get("/lost", params={"message": SERVES}).json()["error"]["message"] == SERVES
    assert proxy.asked == 4


def test_where_nothing_is_served_for_long_clients_are_told_to_come_again(application, monkeypatch):
    monkeypatch.setattr(not_yet, "PATIENCE_S", 0.0)
    with TestClient(NotYet(Proxy(application, unaware=10**9))) as client:
        reply = client.post("/v1/completions", content=b"hello")
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert reply.json()["error"]["code"] == "unavailable"


def test_what_is_no_request_passes(application):
    seen = []

    async def inner(scope, _receive, _send):
        seen.append(scope["type"])

    asyncio.run(NotYet(inner)({"type": "lifespan"}, None, None))
    assert seen == ["lifespan"]
