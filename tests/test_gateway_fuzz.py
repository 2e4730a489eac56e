"""Every route of the gateway, asked by a schema-driven tester over HTTP, with a real engine and a real store behind it.

What it answers is what its OpenAPI document says: no other status, media type or shape, and nothing of its inside.
`FUZZ=n` (`make fuzz`) asks each route n times and more, other things each time, also with PostgreSQL: no answer then
takes longer than 5 s, and the gateway's memory does not grow.
"""

from __future__ import annotations

import json
import re
import string
from contextlib import suppress
from urllib.parse import quote

import httpx
import pytest
import requests
from fuzzed_gateway import AT_MOST_S, FUZZED, GROWTH, GROWTH_MB, LONGEST_S, ROWS, FuzzedGateway, apart, gateway
from fuzzing import FUZZ, JSON, keep, tried
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.errors import FlakyStrategyDefinition

from pedro.gateway.openapi_routes import ROUTES
from pedro.provenance import code_state

FEW = {"max_tokens": 3, "max_completion_tokens": 3, "max_output_tokens": 3, "min_tokens": 2, "n": 2, "best_of": 2}
OPERATORS = ("/metrics", "/openapi.json", "/load", "/pin", "/unload", "/unpin")


@pytest.fixture(scope="module", params=["sqlite", *(["postgresql"] if FUZZ else [])])
def at(request, tmp_path_factory):
    """A gateway with a store of its own; in a long search in a process of its own."""
    folder = tmp_path_factory.mktemp("fuzz")
    url = f"sqlite:///{folder}/pedro.db"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres").ready_database()
    with httpx.Client(timeout=LONGEST_S) as http:
        if not FUZZ:
            with gateway(request.getfixturevalue("shared_replica"), folder, url) as (address, keys):
                yield FuzzedGateway(address, http, keys, str(folder), None)
            return
        with apart(folder, url) as (address, keys, pid):
            code = code_state()
            asked = FuzzedGateway(address, http, keys, str(folder), pid)
            yield asked
            keep(asked.row(request.param), code)
            with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(f"\n{request.param}: {asked.told()}")


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
        at.look(reply, route)

    asked()


def test_what_an_answer_names_is_taken_by_the_routes_that_it_is_linked_to(at):
    from schemathesis.specs.openapi import checks

    held = [checks.status_code_conformance, checks.content_type_conformance, checks.response_schema_conformance]
    held += [checks.use_after_free, checks.ensure_resource_availability]
    followed, wrong = set(), []

    class Chains(at.schema.as_state_machine()):
        def before_call(self, case):
            known = {"model": FUZZED, "url": "http://127.0.0.1:9/"}
            at.aim_body(case, known)
            limited(case.body)
            if case.operation.label == "POST /v1/files" and isinstance(case.body, dict):
                case.body = {**case.body, "file": ROWS.get(case.body.get("purpose"), "\0")}

        def get_call_kwargs(self, case):
            headers = at.headers[who_asks(case.operation.path)]
            return {"base_url": at.address, "headers": headers, "timeout": LONGEST_S}

        def validate_response(self, response, case, additional_checks=None, **kwargs):
            try:
                case.validate_response(response, checks=held, transport_kwargs=kwargs, recorder=self.recorder)
                at.look(response, case.operation.label)
            except BaseException as error:
                wrong.append(error)
                raise
            parent = self.recorder.cases[case.id].parent_id
            if parent is not None and response.status_code == 200:
                followed.add(f"{self.recorder.cases[parent].value.operation.label} -> {case.operation.label}")

    for number in range(FUZZ or 5):
        with suppress(FlakyStrategyDefinition):  # what there is differs from run to run, and with it what is drawn
            Chains.run(settings=settings(tried(12), max_examples=12, stateful_step_count=8))
        if wrong:
            raise wrong[0]
        if number >= FUZZ and len(followed) >= 3:  # enough for the fast tests
            break
    assert len(followed) >= 3, followed


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
    at.look(at.ask(method, path, content=body, headers={"content-type": "application/json"}), route)


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
    at.look(at.http.request(method, url, headers=at.headers[who_asks(route)]), route)


if FUZZ:  # the last of a long search

    def test_no_answer_took_long_and_no_memory_was_kept(at):
        assert at.slowest[0] <= AT_MOST_S, at.slowest
        begin, end = at.memory()
        assert end <= max(GROWTH * begin, begin + GROWTH_MB), at.memory_mb
