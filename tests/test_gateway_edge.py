"""The HTTP edge: keys, isolation, request ids, bad input, faults of ours, disconnects, probes, admin."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from gateway_backend import BACKBONE, SECRET_TEXT
from gateway_server import Gateway, serve

from pedro.errors import AdapterUnusableError, UnavailableError
from pedro.gateway.app import GatewaySettings, create_app
from pedro.gateway.errors import error_response
from pedro.gateway.schemas import ChatRequest, CompletionRequest
from pedro.store import Store


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    settings = GatewaySettings(max_body_bytes=20_000, body_timeout_s=1.0, max_choices=8)
    with serve(tmp_path_factory.mktemp("gateway"), settings=settings) as running:
        yield running


@pytest.fixture
def http(gateway: Gateway):
    with gateway.http(gateway.key()) as client:
        yield client


@pytest.fixture
def admin(gateway: Gateway):
    with gateway.http(gateway.key("acme", ("admin",))) as client:
        yield client


def complete(http: httpx.Client, **body) -> httpx.Response:
    return http.post("/v1/completions", json={"model": BACKBONE, "prompt": "a", "max_tokens": 1} | body)


def chat(http: httpx.Client, **body) -> httpx.Response:
    defaults = {"model": BACKBONE, "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    return http.post("/v1/chat/completions", json=defaults | body)


def error_of(reply: httpx.Response) -> dict:
    """The error object, which must have OpenAI's form and nothing else, under a request id."""
    assert reply.headers["x-request-id"]
    body = reply.json()
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    return body["error"]


# keys


def test_every_route_but_the_probes_needs_a_key(gateway):
    with gateway.http() as nobody:
        for method, path in [
            ("GET", "/v1/models"),
            ("GET", f"/v1/models/{BACKBONE}"),
            ("POST", "/v1/completions"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/adapters"),
            ("POST", "/v1/adapters/acme.support/promote"),
            ("POST", "/v1/adapters/acme.support/rollback"),
            ("GET", "/v1/adapters/acme.support"),
            *(("POST", f"/v1/adapters/acme.support/{action}") for action in ("load", "pin", "unpin", "unload")),
            ("POST", "/tokenize"),
            ("POST", "/detokenize"),
            ("GET", "/tokenizer_info"),
            ("GET", "/v1/files"),
            ("POST", "/v1/files"),
            ("GET", "/v1/files/file-0"),
            ("DELETE", "/v1/files/file-0"),
            ("GET", "/v1/files/file-0/content"),
        ]:
            reply = nobody.request(method, path)
            assert reply.status_code == 401, path
            assert error_of(reply)["code"] == "missing_api_key"
            assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("header", ["", "Bearer", "Basic abc", "sk-pedro-x", "Bearer sk-pedro-\xff"])
def test_a_header_that_is_no_good_key_is_a_401(gateway, header):
    with gateway.http() as nobody:
        reply = nobody.get("/v1/models", headers={"Authorization": header.encode("latin-1")})
    assert reply.status_code == 401
    assert error_of(reply)["type"] == "authentication_error"


def test_a_revoked_key_fails_at_the_next_request_like_an_unknown_one(gateway):
    record, secret = gateway.store.create_key("acme")
    with gateway.http(secret) as client, gateway.http("sk-pedro-unknown") as stranger:
        assert client.get("/v1/models").status_code == 200
        gateway.store.revoke_key(record.id)
        refused = client.get("/v1/models")
        assert refused.status_code == 401
        assert refused.content == stranger.get("/v1/models").content


def test_a_key_without_the_scope_is_a_403_that_names_it(gateway):
    with gateway.http(gateway.key(scopes=("train",))) as trainer:
        reply = complete(trainer)
    assert reply.status_code == 403
    assert "'infer'" in error_of(reply)["message"]


def test_an_infer_key_may_not_promote(gateway, http):
    assert http.post("/v1/adapters/acme.support/promote", json={"version": 2}).status_code == 403


# doors


def talk(gateway: Gateway, head: str, pieces: int, wait_s: float = 0.05) -> tuple[bytes, int]:
    """Sends a request's head, then pieces of a body for as long as the server listens: its answer, and how many it
    took."""
    host, port = gateway.url.removeprefix("http://").split(":")
    taken, answer = 0, b""
    with socket.create_connection((host, int(port)), timeout=5) as line:
        line.sendall(head.replace("\n", "\r\n").encode())
        try:
            for _ in range(pieces):
                time.sleep(wait_s)
                line.sendall(b"1\r\n \r\n")
                taken += 1
        except OSError:  # closed
            pass
        with contextlib.suppress(OSError):
            while piece := line.recv(65536):
                answer += piece
    return answer, taken


@pytest.mark.parametrize("key", [None, "sk-pedro-unknown"], ids=["no key", "an unknown one"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/metrics", "/nowhere"])
def test_the_body_of_a_stranger_is_not_read_and_the_connection_is_closed(gateway, key, path):
    bearer = f"Authorization: Bearer {key}\n" if key else ""
    answer, taken = talk(gateway, f"POST {path} HTTP/1.1\nHost: x\n{bearer}Transfer-Encoding: chunked\n\n", 100)
    assert answer.partition(b" ")[2][:3] in (b"401", b"404", b"405")
    assert b"connection: close" in answer
    assert taken < 100


def test_a_body_declared_too_large_is_refused_before_it_is_read_and_one_that_grows_when_it_is(gateway):
    head = f"POST /v1/completions HTTP/1.1\nHost: x\nAuthorization: Bearer {gateway.key()}\n"
    declared, _ = talk(gateway, f"{head}Content-Length: 30000000\n\n", 0)
    grown, _ = talk(gateway, f"{head}Transfer-Encoding: chunked\n\n5000\n" + " " * 0x5000 + "\n", 3)
    for answer in (declared, grown):
        assert answer.startswith(b"HTTP/1.1 413")
        assert b"connection: close" in answer


def test_a_connection_whose_body_was_read_stays_open(http):
    assert "connection" not in complete(http).headers
    assert "connection" not in complete(http, temperature=9).headers


def test_one_tenant_takes_half_of_the_open_requests_and_a_newcomer_finds_its_share(tmp_path):
    settings = GatewaySettings(max_open_requests=8)
    with serve(tmp_path, token_s=0.05, settings=settings) as gateway, contextlib.ExitStack() as opened:

        def open_one(client: httpx.Client) -> int:
            body = {"model": BACKBONE, "prompt": "a", "max_tokens": 200, "stream": True}
            return opened.enter_context(client.stream("POST", "/v1/completions", json=body)).status_code

        first, second, third = (opened.enter_context(gateway.http(gateway.key(f"tenant-{n}"))) for n in range(3))
        assert [open_one(first) for _ in range(6)] == [200] * 4 + [429] * 2
        assert [open_one(second) for _ in range(3)] == [200, 200, 429]
        assert open_one(third) == 200
        opened.pop_all().close()
        deadline = time.monotonic() + 60
        while gateway.backend.running and time.monotonic() < deadline:
            time.sleep(0.02)
        with gateway.http(gateway.key("tenant-0")) as again:
            assert again.get("/v1/models").status_code == 200


# isolation


def test_a_foreign_model_and_an_unknown_one_are_the_same_404_to_the_byte(http):
    def bodies(name: str) -> list[bytes]:
        replies = [
            complete(http, model=name),
            complete(http, model=name, stream=True),
            chat(http, model=name),
            chat(http, model=name, stream=True),
            http.get(f"/v1/models/{name}"),
        ]
        assert {reply.status_code for reply in replies} == {404}
        assert len({tuple(sorted(reply.headers.keys())) for reply in replies}) == 1
        return [reply.content.replace(name.encode(), b"NAME") for reply in replies]

    foreign, unknown = bodies("globex.faq"), bodies("globex.xyz")
    assert foreign == unknown
    assert len(set(foreign)) == 1


def test_an_admin_key_sees_every_tenants_models(admin):
    names = [model["id"] for model in admin.get("/v1/models").json()["data"]]
    assert names == [BACKBONE, "acme.support", "globex.faq"]
    assert complete(admin, model="globex.faq").status_code == 200


def test_the_tenant_comes_from_the_key_and_no_field_or_header_changes_it(gateway, http):
    http.headers["x-tenant"] = "globex"
    assert complete(http).status_code == 200
    assert gateway.backend.calls[-1].tenant == "acme"
    assert complete(http, tenant="globex").status_code == 400


# request ids


def test_a_sane_request_id_is_given_back(http):
    assert http.get("/health", headers={"x-request-id": "abc-1.2:3_4"}).headers["x-request-id"] == "abc-1.2:3_4"


@pytest.mark.parametrize("offered", ["", "a b", "x" * 129, "é", 'a"b'])
def test_a_request_id_that_is_not_sane_is_replaced(http, offered):
    given = http.get("/health", headers={"x-request-id": offered.encode()}).headers["x-request-id"]
    assert given.startswith("req_")


def test_a_server_in_front_can_be_left_to_send_the_request_id(tmp_path):
    with serve(tmp_path, settings=GatewaySettings(send_request_id=False)) as gateway, gateway.http() as http:
        reply = http.get("/v1/models", headers={"x-request-id": "mine"})
    assert reply.status_code == 401
    assert "x-request-id" not in reply.headers


def test_two_clients_with_one_request_id_are_two_requests_to_the_backend(gateway, http):
    for _ in range(2):
        complete(http, prompt=["a", "b"])
    http.headers["x-request-id"] = "mine"
    for _ in range(2):
        assert complete(http).headers["x-request-id"] == "mine"
    calls = gateway.backend.calls[-6:]
    assert len({call.request_id for call in calls}) == 6
    assert [call.trace_id for call in calls[-2:]] == ["mine", "mine"]


# what does not exist


def test_an_unknown_url_is_a_404_in_openais_form(http):
    reply = http.get("/v1/nothing")
    assert (reply.status_code, error_of(reply)["code"]) == (404, "unknown_url")


def test_a_wrong_method_is_a_405_that_says_which_are_allowed(http):
    reply = http.get("/v1/completions")
    assert (reply.status_code, reply.headers["allow"]) == (405, "POST")
    assert error_of(reply)["code"] == "method_not_allowed"


# bad input

BAD_COMPLETIONS = [
    ({"model": None}, "model"),
    ({"model": 5}, "model"),
    ({"model": ""}, "model"),
    ({"model": "m" * 600}, "model"),
    ({"prompt": None}, "prompt"),
    ({"prompt": 5}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": [[]]}, "prompt"),
    ({"prompt": ["a", 1]}, "prompt"),
    ({"prompt": [1, -1]}, "prompt"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [2**31]}, "prompt"),
    ({"prompt": {"a": 1}}, "prompt"),
    ({"max_tokens": -1}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 10**4000}, "max_tokens"),
    ({"temperature": -0.1}, "temperature"),
    ({"temperature": "hot"}, "temperature"),
    ({"top_p": -0.1}, "top_p"),
    ({"top_p": 1.1}, "top_p"),
    ({"n": 0}, "n"),
    ({"n": 9}, "n"),
    ({"n": 5, "prompt": ["a", "b"]}, "n"),
    ({"seed": 2**63}, "seed"),
    ({"seed": "x"}, "seed"),
    ({"stop": [1]}, "stop"),
    ({"stop": ["x"] * 17}, "stop"),
    ({"stop": ["x", "y" * 257]}, "stop"),
    ({"logprobs": 21}, "logprobs"),
    ({"logprobs": True}, "logprobs"),
    ({"stream": "yes"}, "stream"),
    ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
    ({"stream": True, "stream_options": 5}, "stream_options"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"guided_json": {"type": "object"}}, "guided_json"),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"choice": ["a"], "regex": "a"}}, "structured_outputs"),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice"),
    ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    ({"structured_outputs": {"choice": ["a"]}, "ignore_eos": True}, "ignore_eos"),
    ({"structured_outputs": {"choice": ["a"]}, "min_tokens": 2}, "min_tokens"),
    ({"structured_outputs": {"choice": ["a"]}, "use_beam_search": True}, "use_beam_search"),
    (
        {"structured_outputs": {"choice": ["a"]}, "response_format": {"type": "json_object"}},
        "structured_outputs",
    ),
    ({"structured_outputs": {"choice": ["a"], "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern"),
    ({"structured_outputs": {"structural_tag": "{}"}}, "structured_outputs.structural_tag"),
    ({"request_id": "x"}, "request_id"),
    ({"priority": 1}, "priority"),
    ({"seed": 1.5}, "seed"),
    ({"top_k": -2}, "top_k"),
    ({"top_k": 2**31}, "top_k"),
    ({"min_p": 2}, "min_p"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"repetition_penalty": 1e-40}, "repetition_penalty"),
    ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
    ({"conditioning_length": 0}, "conditioning_length"),
    ({"conditioning_length": [1, 2]}, "conditioning_length"),
    ({"conditioning_length": 3, "prompt": [1, 2]}, "conditioning_length"),
    ({"best_of": 4}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"best_of": 9, "use_beam_search": True}, "best_of"),
    ({"best_of": 5, "use_beam_search": True, "prompt": ["a", "b"]}, "best_of"),
    ({"best_of": 2, "n": 3, "use_beam_search": True}, "best_of"),
    ({"use_beam_search": True, "stream": True}, "stream"),
    ({"use_beam_search": True, "temperature": 0.7}, "temperature"),
    ({"use_beam_search": 3}, "use_beam_search"),
    ({"use_beam_search": True, "max_tokens": 0, "echo": True}, "max_tokens"),
    ({"length_penalty": 2.0}, "length_penalty"),
    ({"early_stopping": True}, "early_stopping"),
    ({"use_beam_search": True, "early_stopping": "never"}, "early_stopping"),
    ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
    ({"suffix": "x"}, "suffix"),
    ({"logit_bias": {"5": 101}}, "logit_bias[5]"),
    ({"logit_bias": {"five": 1}}, "logit_bias"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logit_bias": {str(token): 1 for token in range(301)}}, "logit_bias"),
    ({"temprature": 1}, "temprature"),
]


@pytest.mark.parametrize(("change", "param"), BAD_COMPLETIONS, ids=lambda value: str(value)[:40])
def test_a_bad_completion_is_a_400_that_names_the_field_and_value(gateway, http, change, param):
    before = len(gateway.backend.calls)
    reply = complete(http, **change)
    assert reply.status_code == 400, reply.text
    error = error_of(reply)
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert param in error["message"]
    assert len(gateway.backend.calls) == before


TOOL = {"type": "function", "function": {"name": "weather"}}
CALL = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
BAD_CHATS = [
    ({"messages": []}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": ["hi"]}, "messages[0]"),
    ({"messages": [{"role": "user"}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": []}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages[0].content"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content"),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]}, "messages[0].tool_call_id"),
    ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
    ({"messages": [{"content": "x"}]}, "messages[0].role"),
    ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "messages[0].name"),
    ({"messages": [{"role": "user", "content": "x", "tool_calls": [CALL]}]}, "messages[0].tool_calls"),
    ({"messages": [{"role": "user", "content": "x", "mood": 1}]}, "messages[0].mood"),
    (
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]},
        "messages[0].tool_calls[0].function",
    ),
    ({"messages": [{"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": "x"}]}, "messages[1]"),
    ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
    ({"add_generation_prompt": False}, "add_generation_prompt"),
    ({"continue_final_message": True}, "continue_final_message"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
    ({"max_completion_tokens": 2**31}, "max_completion_tokens"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"use_beam_search": True, "stream": True}, "stream"),
    ({"best_of": 2}, "best_of"),
    ({"logprobs": 2}, "logprobs"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL] * 129}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "perhaps"}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "clock"}}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "function"}}, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": "required", "ignore_eos": True}, "ignore_eos"),
    ({"tools": [TOOL], "response_format": {"type": "json_object"}}, "response_format"),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": True}}},
        "response_format.json_schema.schema",
    ),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"),
    ({"store": True}, "store"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"service_tier": "flex"}, "service_tier"),
    ({"prompt": "x"}, "prompt"),
    ({"conditioning_length": 1}, "conditioning_length"),
]


@pytest.mark.parametrize(("change", "param"), BAD_CHATS, ids=lambda value: str(value)[:40])
def test_a_bad_chat_is_a_400_that_names_the_field(http, change, param):
    reply = chat(http, **change)
    assert reply.status_code == 400, reply.text
    assert error_of(reply)["param"] == param


def test_every_mistake_of_a_body_is_told_at_once(http):
    message = error_of(complete(http, temperature=9, n="two", hue=1))["message"]
    assert "temperature: expected <= 2.0, got 9" in message
    assert 'n: expected a whole number, got "two"' in message
    assert "Unrecognized request argument supplied: hue" in message


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"temprature": 1}, "(did you mean temperature?)"),
        ({"stream": True, "stream_options": {"include_usag": True}}, "(did you mean include_usage?)"),
        ({"ignore_eos": None, "echo": [True, None]}, "got [true, null]"),
        ({"priority": 3}, "got 3; a busy engine is shared by tenant, not by request"),
    ],
)
def test_a_mistake_is_told_in_jsons_words_with_what_was_meant_or_why(http, change, told):
    assert told in error_of(complete(http, **change))["message"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "user", "content": "a", "name": "bob"}, "put the name into the content"),
        ({"role": "tool", "content": "a", "tool_call_id": "call_1"}, "no call with this id waits"),
        ({"role": "tool", "content": "a"}, "is required for a tool's result"),
        ({"role": "function", "content": "a"}, "deprecated; send tools"),
    ],
    ids=["name", "tool", "tool without an id", "function"],
)
def test_what_a_prompt_format_cannot_carry_is_refused_with_the_reason(http, message, told):
    assert told in error_of(chat(http, messages=[{"role": "user", "content": "a"}, message]))["message"]


VLLM = [
    "use_beam_search",
    "top_k",
    "min_p",
    "repetition_penalty",
    "length_penalty",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "min_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "truncate_prompt_tokens",
    "truncation_side",
    "prompt_logprobs",
    "allowed_token_ids",
    "bad_words",
    "add_special_tokens",
    "response_format",
    "structured_outputs",
    "guided_json",
    "guided_regex",
    "guided_choice",
    "guided_grammar",
    "guided_decoding_backend",
    "guided_whitespace_pattern",
    "structural_tag",
    "priority",
    "request_id",
    "session_id",
    "logits_processors",
    "return_tokens_as_token_ids",
    "return_token_ids",
    "return_token_offsets",
    "cache_salt",
    "kv_transfer_params",
    "vllm_xargs",
    "repetition_detection",
]
VLLM_CHAT = [
    "echo",
    "add_generation_prompt",
    "continue_final_message",
    "documents",
    "chat_template",
    "chat_template_kwargs",
    "media_io_kwargs",
    "mm_processor_kwargs",
    "include_reasoning",
    "reasoning_effort",
    "thinking_token_budget",
]


@pytest.mark.parametrize(("kind", "names"), [(CompletionRequest, VLLM), (ChatRequest, VLLM + VLLM_CHAT)])
def test_every_field_that_vllms_server_documents_is_known(kind, names):
    assert not set(names) - kind.model_fields.keys() - kind.harmless.keys()


def test_more_mistakes_than_anybody_reads_are_counted_and_not_described(http):
    error = error_of(complete(http, **{f"x{number}": 1 for number in range(1200)}))
    assert (error["code"], error["param"]) == ("invalid_value", None)
    assert "1,200 mistakes" in error["message"]
    listed = error_of(http.post("/detokenize", json={"tokens": [-1] * 3000}))
    assert listed["param"] == "tokens[0]", "the first wrong token is enough"


def test_documented_fields_at_rest_are_accepted(http):
    assert complete(http, best_of=1, suffix=None, logit_bias={}, user="u", stop=None, seed=None).status_code == 200
    reply = chat(
        http,
        tools=None,
        tool_choice="none",
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        metadata={"a": "b"},
        parallel_tool_calls=True,
        service_tier="auto",
        temperature=1,
        top_k=-1,
    )
    assert reply.status_code == 200, reply.text


def test_beam_fields_at_rest_need_no_beam_search(http):
    assert complete(http, use_beam_search=False, length_penalty=1.0, early_stopping=False, best_of=2, n=2).is_success


def test_every_field_the_openai_client_can_send_is_known():
    from openai.types import completion_create_params
    from openai.types.chat import completion_create_params as chat_create_params

    for kind, params in (
        (CompletionRequest, completion_create_params.CompletionCreateParamsBase),
        (ChatRequest, chat_create_params.CompletionCreateParamsBase),
    ):
        unknown = params.__annotations__.keys() - kind.model_fields.keys() - kind.harmless.keys()
        assert not unknown, f"{kind.__name__} does not know {sorted(unknown)}"


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b'"x"', b"null", b'{"a": NaN}', b'{"a": "\\ud800"}', b"\xff", b"[" * 5000, b'{"a":1}x'],
    ids=lambda body: repr(body[:12]),
)
def test_what_is_no_json_object_is_a_400(http, body):
    for path in ("/v1/completions", "/v1/chat/completions"):
        reply = http.post(path, content=body)
        assert reply.status_code == 400, reply.text
        assert error_of(reply)["code"] == "invalid_json"


def test_a_body_over_the_limit_is_a_413(http):
    reply = complete(http, prompt="a" * 20_001)
    assert (reply.status_code, error_of(reply)["code"]) == (413, "request_too_large")


def test_a_body_over_the_limit_is_a_413_without_a_content_length_too(http):
    reply = http.post("/v1/completions", content=iter([b"a" * 1000] * 21))
    assert (reply.status_code, error_of(reply)["code"]) == (413, "request_too_large")


def test_a_body_that_trickles_is_a_408(http):
    def trickle():
        yield b"{"
        time.sleep(1.5)
        yield b"}"

    reply = http.post("/v1/completions", content=trickle())
    assert (reply.status_code, error_of(reply)["code"]) == (408, "request_timeout")


# faults of ours


def test_an_unexpected_error_is_a_500_without_internal_text(http, caplog):
    for stream in (False, True):
        reply = complete(http, prompt="crash", stream=stream)
        assert reply.status_code == 500
        assert error_of(reply)["code"] == "internal_error"
        assert reply.headers["x-request-id"] in reply.text
        assert SECRET_TEXT not in reply.text
    assert SECRET_TEXT in caplog.text


def test_openais_clients_are_told_not_to_ask_again_for_a_version_that_cannot_be_served():
    unusable = error_response(AdapterUnusableError("model: acme.faq:2 cannot be served", param="model"))
    assert (unusable.status_code, unusable.headers["x-should-retry"]) == (500, "false")
    assert "x-should-retry" not in error_response(UnavailableError("try again")).headers


def test_while_the_database_is_away_clients_are_told_to_come_later_than_they_would():
    assert error_response(UnavailableError("it does not answer", code="database")).headers["retry-after"] == "5"
    assert "retry-after" not in error_response(UnavailableError("lost", code="replica_lost")).headers


@pytest.mark.parametrize("prompt", ["break", "vanish"])
def test_half_an_answer_never_looks_whole(http, prompt):
    whole = complete(http, prompt=prompt, max_tokens=5)
    assert whole.status_code == 500
    assert SECRET_TEXT not in whole.text
    streamed = complete(http, prompt=prompt, max_tokens=5, stream=True)
    assert streamed.status_code == 200
    *chunks, error, done, rest = streamed.text.split("\n\n")
    assert (done, rest, len(chunks)) == ("data: [DONE]", "", 2)
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert SECRET_TEXT not in streamed.text


def test_one_failed_prompt_frees_the_others_of_its_request(gateway, http):
    assert complete(http, prompt=["a", "break", "b"], max_tokens=1000).status_code == 500
    assert gateway.backend.running == 0


def test_no_database_is_a_503_that_keeps_its_details_to_itself(tmp_path):
    with serve(tmp_path) as gateway, gateway.http(gateway.key()) as client:
        gateway.store.close()
        for file in tmp_path.iterdir():
            file.unlink()
        (tmp_path / "pedro.db").mkdir()
        reply = client.get("/v1/models")
    assert (reply.status_code, error_of(reply)["code"]) == (503, "database")
    assert "sqlite" not in reply.text


# disconnects


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
@pytest.mark.parametrize("prompts", [["a"], ["a", "b", "c"]], ids=["one prompt", "three prompts"])
def test_a_client_that_goes_away_frees_the_backend(tmp_path, stream, prompts):
    with serve(tmp_path, token_s=0.01) as gateway, gateway.http(gateway.key()) as client:
        body = {"model": BACKBONE, "prompt": prompts, "max_tokens": 10_000, "stream": stream}
        if stream:
            with client.stream("POST", "/v1/completions", json=body) as reply:
                lines = reply.iter_lines()  # kept: the client leaves where it is dropped
                next(lines)
                assert gateway.backend.running == len(prompts)
        else:
            with pytest.raises(httpx.ReadTimeout):
                client.post("/v1/completions", json=body, timeout=0.5)
        assert gateway.backend.freed.wait(60)
        deadline = time.monotonic() + 60
        while gateway.backend.running and time.monotonic() < deadline:
            time.sleep(0.01)
        assert gateway.backend.running == 0


def test_a_cancelled_request_frees_the_backend_before_it_ends(tmp_path):
    """As a host does that cancels the request's own task on a disconnect, instead of sending a message."""
    store = Store(f"sqlite:///{tmp_path}/pedro.db")
    from gateway_backend import WordBackend

    backend = WordBackend(token_s=0.01)
    app = create_app(lambda: backend, store)
    key = store.create_key("acme")[1]
    body = json.dumps({"model": BACKBONE, "prompt": "a", "max_tokens": 10_000, "stream": True}).encode()
    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/completions",
        "query_string": b"",
        "headers": [(b"authorization", f"Bearer {key}".encode())],
    }

    async def run() -> None:
        messages = asyncio.Queue()
        messages.put_nowait({"type": "http.request", "body": body, "more_body": False})
        streaming = asyncio.Event()

        async def send(message) -> None:
            if message["type"] == "http.response.body":
                streaming.set()

        task = asyncio.create_task(app(scope, messages.get, send))
        await asyncio.wait_for(streaming.wait(), 10)
        assert backend.running == 1
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert backend.running == 0

    asyncio.run(run())
    store.close()


def test_streams_flow_while_others_authenticate(tmp_path):
    with serve(tmp_path, token_s=0.002) as gateway, gateway.http(gateway.key()) as client:

        def one(_: int) -> int:
            return complete(client, max_tokens=20, stream=True).text.count("data: ")

        with ThreadPoolExecutor(16) as pool:
            assert set(pool.map(one, range(64))) == {21}


# probes


def test_health_and_ready_need_no_key_and_ready_follows_the_backend(gateway):
    with gateway.http() as nobody:
        assert nobody.get("/health").status_code == 200
        assert (nobody.get("/ready").status_code, nobody.get("/ready").json()) == (200, {"status": "ready"})
        gateway.backend.is_degraded = True
        assert (nobody.get("/ready").status_code, nobody.get("/ready").json()) == (200, {"status": "degraded"})
        gateway.backend.is_ready, gateway.backend.is_degraded = False, False
        try:
            assert nobody.get("/ready").status_code == 503
            assert nobody.get("/health").status_code == 200
        finally:
            gateway.backend.is_ready = True


# adapters


def test_promote_and_roll_back_move_the_champion(admin):
    promoted = admin.post("/v1/adapters/acme.support/promote", json={"version": 2})
    assert promoted.json()["aliases"] == {"champion": 2, "previous": 1}
    assert admin.post("/v1/adapters/acme.support/rollback").json()["aliases"] == {"champion": 1, "previous": 2}
    listed = admin.get("/v1/adapters").json()
    assert listed["object"] == "list"
    assert [card["name"] for card in listed["data"]] == ["acme.support", "globex.faq"]
    assert [version["version"] for version in listed["data"][0]["versions"]] == [2, 1]


@pytest.mark.parametrize("body", [{}, {"version": 0}, {"version": 2**31}, {"version": "2"}, {"version": 1, "x": 2}])
def test_a_promotion_that_makes_no_sense_is_a_400(admin, body):
    assert admin.post("/v1/adapters/acme.support/promote", json=body).status_code == 400


def test_promoting_what_does_not_exist_is_a_404(admin):
    assert admin.post("/v1/adapters/acme.support/promote", json={"version": 99}).status_code == 404
    assert admin.post("/v1/adapters/acme.nope/promote", json={"version": 1}).status_code == 404


def test_the_time_that_a_client_gives_its_request_reaches_the_backend(gateway, http):
    for post, body in (("/v1/completions", {"prompt": ["a", "b"]}), ("/v1/chat/completions", {"messages": USER})):
        http.post(post, json={"model": BACKBONE, "max_tokens": 1, **body}, headers={"x-request-timeout": "2.5"})
        assert gateway.backend.calls[-1].timeout_s == 2.5
    complete(http)
    assert gateway.backend.calls[-1].timeout_s is None


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
def test_a_time_that_is_none_is_refused_by_name(http, given):
    body = {"model": BACKBONE, "prompt": "a", "max_tokens": 1}
    reply = http.post("/v1/completions", json=body, headers={"x-request-timeout": given})
    assert (reply.status_code, error_of(reply)["param"]) == (400, "x-request-timeout")


USER = [{"role": "user", "content": "a"}]
