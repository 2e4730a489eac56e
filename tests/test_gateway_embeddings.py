"""The official openai client asks the gateway for embeddings: what is asked of the backend, and what comes back."""

from __future__ import annotations

import time

import openai
import pytest
from gateway_backend import BACKBONE
from gateway_batches import SCOPES, answers, begin, ended
from gateway_server import Gateway, serve

from pedro.gateway.app import GatewaySettings


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    settings = GatewaySettings(write_usage_every_s=0.01, max_choices=8, batch_lease_s=1.0)
    with serve(tmp_path_factory.mktemp("embeddings"), settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def client(gateway: Gateway):
    return gateway.client(gateway.key("acme", SCOPES))


@pytest.mark.parametrize(
    ("given", "words"),
    [("a bb", [2]), (["a", "a bb ccc"], [1, 3]), ([1, 2, 3], [3]), ([[1], [2, 3]], [1, 2])],
    ids=["text", "texts", "ids", "lists of ids"],
)
@pytest.mark.parametrize("form", [{}, {"encoding_format": "float"}, {"encoding_format": "base64"}], ids=str)
def test_each_input_has_its_embedding_in_order(client, given, words, form):
    reply = client.embeddings.create(model="acme.support", input=given, **form)
    assert (reply.object, reply.model) == ("list", "acme.support")
    assert [(one.object, one.index) for one in reply.data] == [("embedding", at) for at in range(len(words))]
    if form.get("encoding_format") == "base64":
        assert all(isinstance(one.embedding, str) for one in reply.data)
    else:  # the client asks for base64 unless told, and decodes it
        assert [one.embedding for one in reply.data] == [[0.5, float(count)] for count in words]
    assert (reply.usage.prompt_tokens, reply.usage.total_tokens) == (sum(words), sum(words))
    assert reply.system_fingerprint == "fp_1"


def test_pooling_is_last_unless_told(gateway, client):
    for more, pooling in (({}, "last"), ({"pooling": "last"}, "last"), ({"pooling": "mean"}, "mean")):
        client.embeddings.create(model=BACKBONE, input="a", user="u", extra_body=more)
        call = gateway.backend.calls[-1]
        assert (call.params, call.user) == ({"max_tokens": 0, "pooling": pooling}, "u")


@pytest.mark.parametrize(
    ("change", "param", "told"),
    [
        ({"dimensions": 2}, "dimensions", "leave it out"),
        ({"input": []}, "input", "string"),
        ({"input": 5}, "input", "string"),
        ({"input": [[1], "a"]}, "input", "string"),
        ({"input": ["a"] * 9}, "input", "at most 8 items"),
        ({"encoding_format": "hex"}, "encoding_format", "base64"),
        ({"pooling": "cls"}, "pooling", "mean"),
        ({"normalize": False}, "normalize", "length 1"),
        ({"truncate_prompt_tokens": 5}, "truncate_prompt_tokens", "shorten"),
        ({"messages": [{"role": "user", "content": "a"}]}, "messages", "input"),
        ({"stream": True}, "stream", "Unrecognized"),
    ],
    ids=str,
)
def test_what_cannot_be_had_is_a_400_that_names_the_field(gateway, change, param, told):
    before = len(gateway.backend.calls)
    with gateway.http(gateway.key()) as http:
        reply = http.post("/v1/embeddings", json={"model": BACKBONE, "input": "a", **change})
    assert reply.status_code == 400, reply.text
    error = reply.json()["error"]
    assert (error["param"], told in error["message"]) == (param, True), error
    assert len(gateway.backend.calls) == before


def test_errors_of_the_engine_speak_of_the_input_and_foreign_models_are_unknown(client):
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=BACKBONE, input="long")
    assert (refused.value.param, refused.value.code) == ("input", "context_length_exceeded")
    assert "the input has" in refused.value.message
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="globex.faq", input="a")
    with pytest.raises(openai.RateLimitError):
        client.embeddings.create(model=BACKBONE, input="queue")


def test_embeddings_count_as_prompts_and_fall_under_quotas(gateway):
    key, secret = gateway.store.create_key("initech", ("infer",))
    gateway.store.set_quota(tenant="initech", tokens_per_minute=12)
    client = gateway.client(secret)
    client.embeddings.create(model=BACKBONE, input=["a b c", "d"])
    client.embeddings.create(model=BACKBONE, input=[1, 2, 3, 4, 5])
    with pytest.raises(openai.RateLimitError, match="initech"):
        client.embeddings.create(model=BACKBONE, input=[1, 2, 3, 4, 5])
    deadline = time.monotonic() + 60
    while not (rows := [row for row in gateway.store.usage() if row.key_id == key.id and row.requests == 2]):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert [(row.prompt_tokens, row.completion_tokens) for row in rows] == [(9, 0)]


def test_batches_hold_embeddings_and_responses(client):
    for url, body, check in (
        ("/v1/embeddings", {"input": "a bb"}, lambda found: found["data"][0]["embedding"] == [0.5, 2.0]),
        ("/v1/responses", {"input": "a bb", "max_output_tokens": 2}, lambda found: found["status"] == "incomplete"),
    ):
        row = {"custom_id": "one", "method": "POST", "url": url, "body": {"model": BACKBONE, **body}}
        done = ended(client, begin(client, [row], url))
        assert done.status == "completed"
        [line] = answers(client, done.output_file_id).values()
        assert check(line["response"]["body"])
