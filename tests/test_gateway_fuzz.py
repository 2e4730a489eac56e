"""Every route of the gateway, asked by a schema-driven tester over HTTP, with a real engine and a real store behind it.

What it answers is what its OpenAPI document says: no other status, media type or shape, and nothing of its inside.
`FUZZ=n` (`make fuzz`) asks each route n times and more, other things each time, also with PostgreSQL.
"""

from __future__ import annotations

import json
import re
import string
from urllib.parse import quote

import httpx
import pytest
import requests
from fuzzing import FUZZ, JSON, tried
from gateway_engine import served_engine
from hypothesis import given
from hypothesis import strategies as st
from serving_adapters import register

from pedro.gateway.openapi_routes import ROUTES

LONGEST_S = 30
INSIDE = re.compile(
    r"Traceback|site-packages|\.py\b|<class |object at 0x|\b(?:pedro|sqlalchemy|psycopg|starlette|pydantic|torch)\."
    r"|\b[A-Z]\w+(?:Error|Exception)\b|sqlite3?"
)
FEW = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3, "min_tokens": 2, "n": 2, "best_of": 2}
FUZZED = "acme.fuzzed"
OPERATORS = ("/metrics", "/openapi.json", "/load", "/pin", "/unload", "/unpin")


@pytest.fixture(scope="module", params=["sqlite", *(["postgresql"] if FUZZ else [])])
def at(request, shared_replica, tmp_path_factory):
    """A client of the gateway with a tenant's key, one with an operator's, and names of things that there are."""
    folder = tmp_path_factory.mktemp("fuzz")
    url = f"sqlite:///{folder}/pedro.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").ready_database()
    for _ in range(2):  # its own: what is asked moves aliases and deletes versions
        register(shared_replica.registry, shared_replica.folder / "1", FUZZED)
    with served_engine(shared_replica, folder, url) as (address, store), httpx.Client(timeout=LONGEST_S) as http:
        keys = {
            "tenant": store.create_key("acme", ("infer", "train", "read"))[1],
            "operator": store.create_key("ops", ("admin",))[1],
        }
        yield Gateway(address, http, keys, str(folder))


class Gateway:
    def __init__(self, address, http, keys, folder):
        self.address, self.http, self.folder = address, http, folder
        self.headers = {who: {"authorization": f"Bearer {key}"} for who, key in keys.items()}
        row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
        form = {"files": {"file": ("rows.jsonl", json.dumps(row) + "\n")}, "data": {"purpose": "fine-tune"}}
        file_id = self.ask("POST", "/v1/files", **form).json()["id"]
        job = {"model": "stories260K", "training_file": file_id}
        job_id = self.ask("POST", "/v1/fine_tuning/jobs", json=job).json()["id"]
        hook = {"url": "http://127.0.0.1:9/", "name": "hook", "event_types": ["batch.failed"]}
        hook_id = self.ask("POST", "/v1/webhook_endpoints", json=hook).json()["id"]
        self.known = {
            "name": FUZZED,
            "ref": FUZZED,
            "file_id": file_id,
            "job_id": job_id,
            "endpoint_id": hook_id,
            "model": FUZZED,
            "training_file": file_id,
            "input_file_id": file_id,
        }

    def ask(self, method, path, who="tenant", **more):
        headers = {**self.headers[who], **more.pop("headers", {})}
        return self.http.request(method, self.address + path, headers=headers, **more)

    @property
    def schema(self):
        import schemathesis

        told = self.ask("GET", "/openapi.json", "operator").json()
        return schemathesis.openapi.from_dict(told)

    def aim(self, case):
        """Have a generated request name what there is, and ask for little."""
        case.path_parameters = {k: self.known.get(k, v) for k, v in (case.path_parameters or {}).items()}
        if isinstance(case.body, dict):
            known = {k: self.known[k] for k in self.known.keys() & case.body.keys() if isinstance(case.body[k], str)}
            case.body = {**case.body, **known}

    def look(self, reply):
        """What every answer is held to."""
        assert reply.status_code < 500 or reply.status_code in (503, 504), reply.text
        assert not (found := INSIDE.search(reply.text)), f"{found}: {reply.text}"
        assert self.folder not in reply.text
        if reply.status_code >= 400:  # also of an address that is none of the document's
            assert "application/json" in reply.headers["content-type"]  # Schemathesis has a list of each header
            assert reply.json()["error"].keys() == {"message", "type", "param", "code"}


def limited(body):
    """A body that asks for few tokens: what is long is no other path, only a longer one."""
    if isinstance(body, dict):
        for name, most in FEW.items():
            if type(body.get(name)) is int and body[name] > most:
                body[name] = most


def who_asks(route: str) -> str:
    return "operator" if route.endswith(OPERATORS) or "/metrics" in route else "tenant"


@pytest.fixture(scope="module")
def operations(at):
    found = {}
    for result in at.schema.get_all_operations():
        operation = result.ok()
        found[f"{operation.method.upper()} {operation.path}"] = operation
    return found


@pytest.mark.parametrize("route", [route for route, told in ROUTES.items() if not told.public])
def test_a_route_answers_what_its_description_says(at, operations, route):
    from schemathesis import GenerationMode
    from schemathesis.specs.openapi import checks

    operation = operations[route]
    held = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    right = operation.as_strategy(GenerationMode.POSITIVE)
    told = ROUTES[route]
    takes_any = told.body is None and told.form is None and not told.parameters and "{" not in route
    cases = right if takes_any else right | operation.as_strategy(GenerationMode.NEGATIVE)

    @tried(3)
    @given(case=cases, aimed=st.booleans())
    def asked(case, aimed):
        if aimed:
            at.aim(case)
        limited(case.body)
        try:
            reply = case.call(base_url=at.address, headers=at.headers[who_asks(route)], timeout=LONGEST_S)
        except requests.ConnectionError:  # refused before its body was read, which may end the connection early
            assert "{" in route
            assert at.ask("GET", "/health").status_code == 200
            return
        case.validate_response(reply, checks=held)
        at.look(reply)

    asked()


BODIES = sorted(route for route, told in ROUTES.items() if told.body is not None)
RAW = st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()) | st.just(b"[" * 5000)


@tried(40, 40)
@given(route=st.sampled_from(BODIES), data=st.data())
def test_no_body_is_too_wild_for_an_error_that_says_what_is_wrong(at, route, data):
    fields = sorted(ROUTES[route].body.model_fields)
    one = st.dictionaries(st.sampled_from(fields), JSON, min_size=1, max_size=3)
    plain = {"model": FUZZED, "prompt": "a", "input": "a", "messages": [{"role": "user", "content": "a"}]}
    right = {name: value for name, value in plain.items() if name in fields}
    body = data.draw(RAW | one.map(lambda wrong: {**right, **wrong}), label="body")
    if isinstance(body, dict):
        limited(body)
        body = json.dumps(body).encode()
    method, path = route.split()
    path = re.sub(r"\{(\w+)\}", lambda part: at.known.get(part[1], "1"), path)
    at.look(at.ask(method, path, content=body, headers={"content-type": "application/json"}))


PARTS = st.text(string.printable + "\0é\u202e😀", min_size=1, max_size=12).map(lambda part: quote(part, safe=""))
WILD = ["%00", "%ff", "..", "%2e%2e", f"{FUZZED}%00", "1" * 5000, "-1", "9" * 30]
QUERIES = st.binary(max_size=20).map(quote) | st.sampled_from(
    ["limit=%00", "after=%00", "after=%ff", "limit=" + "9" * 4999]
)


@tried(40, 40)
@given(route=st.sampled_from(sorted(ROUTES)), part=PARTS | st.sampled_from(WILD), query=QUERIES)
def test_no_address_is_too_wild_for_an_answer(at, route, part, query):
    method, path = route.split()
    path = re.sub(r"\{\w+\}", lambda _: part, path)
    url = httpx.URL(at.address).copy_with(raw_path=f"{path}?{query}".encode())
    at.look(at.http.request(method, url, headers=at.headers[who_asks(route)]))
