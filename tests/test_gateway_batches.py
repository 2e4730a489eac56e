"""The official openai client has batches answered, and is told with its line and field what is wrong with one."""

from __future__ import annotations

import json

import openai
import pytest
from gateway_batches import CHAT, COMPLETIONS, SCOPES, answers, begin, counts, ended, row, until, upload
from gateway_server import Gateway, serve
from store_moves import fill

from pedro.errors import AdapterError
from pedro.gateway import batch_work
from pedro.gateway.app import GatewaySettings

QUICK = GatewaySettings(batch_lease_s=1.0)  # a look every quarter of a second
DAY_S = 24 * 3600.0


@pytest.fixture(autouse=True)
def _brisk(monkeypatch):
    monkeypatch.setattr(batch_work, "LONGEST_WAIT_S", 0.05)


@pytest.fixture
def gateway(tmp_path):
    with serve(tmp_path, settings=QUICK) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway):
    return gateway.client(gateway.key("acme", SCOPES))


@pytest.mark.parametrize("url", [CHAT, COMPLETIONS])
def test_each_row_of_a_batch_is_answered_as_a_request_would_be(gateway, client, url):
    rows = [row(f"word{number}", 2, url) for number in range(30)]
    made = begin(
        client, rows, url, metadata={"project": "a"}, output_expires_after={"anchor": "created_at", "seconds": 7200}
    )
    assert made.status == "validating"
    assert made.metadata == {"project": "a"}
    assert made.expires_at == made.created_at + DAY_S
    done = ended(client, made)
    assert (done.status, done.errors, done.error_file_id) == ("completed", None, None)
    assert counts(done) == (30, 30, 0)
    assert done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert (done.failed_at, done.cancelled_at, done.expired_at) == (None, None, None)
    file = client.files.retrieve(done.output_file_id)
    assert (file.purpose, file.filename) == ("batch_output", f"{made.id}_output.jsonl")
    assert file.expires_at - file.created_at == 7200
    assert [one.id for one in client.files.list(purpose="batch_output")] == [file.id]
    found = answers(client, done.output_file_id)
    assert list(found) == [one["custom_id"] for one in rows]
    assert len({line["id"] for line in found.values()}) == 30
    direct = client.post(url.removeprefix("/v1"), body=rows[3]["body"], cast_to=object)
    line = found["word3"]
    assert set(line) == {"id", "custom_id", "response", "error"}
    assert (line["error"], line["response"]["status_code"]) == (None, 200)
    assert line["response"]["request_id"] == f"{made.id}-4"
    body = line["response"]["body"]
    assert {name: body[name] for name in ("object", "model", "choices", "usage")} == {
        name: direct[name] for name in ("object", "model", "choices", "usage")
    }
    until(lambda: sum(one.requests for one in gateway.store.usage("acme")) == 31)


BAD = [
    ("no json", "invalid_json_line"),
    ("[1]", "invalid_json_line"),
    (row("first"), "duplicate_custom_id"),
    ({**row("x"), "custom_id": None}, "missing_custom_id"),
    ({key: value for key, value in row("x").items() if key != "custom_id"}, "missing_custom_id"),
    ({**row("x"), "custom_id": 7}, "invalid_custom_id"),
    ({**row("get"), "method": "GET"}, "invalid_method"),
    (row("url", url=CHAT), "invalid_url"),
    ({**row("body"), "body": "text"}, "invalid_body"),
    ({**row("model"), "body": {"prompt": "a"}}, "missing_model"),
    (row("stream", stream=True), "stream_not_supported"),
    ({**row("more"), "priority": 1}, "unknown_parameter"),
    (row("foreign", model="globex.faq"), "model_not_found"),
    (row("unknown", model="globex.nix"), "model_not_found"),
]


def test_bad_rows_are_told_with_their_lines_before_any_is_asked(gateway, client):
    done = ended(client, begin(client, [row("first"), "", *(bad for bad, _ in BAD)]))
    assert (done.status, done.output_file_id, done.error_file_id) == ("failed", None, None)
    assert done.failed_at is not None
    assert [(one.line, one.code) for one in done.errors.data] == [
        (number, code) for number, (_, code) in enumerate(BAD, 3)
    ]
    foreign, unknown = (one.message for one in done.errors.data[-2:])
    assert foreign == unknown.replace("globex.nix", "globex.faq")
    assert gateway.backend.calls == []


def test_a_model_that_cannot_be_served_is_a_mistake_of_its_line(gateway, client, monkeypatch):
    known = gateway.backend.get_model

    async def get_model(tenant, name):
        if name == "acme.alien":
            raise AdapterError("It was made for another backbone.")
        return await known(tenant, name)

    monkeypatch.setattr(gateway.backend, "get_model", get_model)
    done = ended(client, begin(client, [row("a"), row("b", model="acme.alien")]))
    assert [(one.line, one.code) for one in done.errors.data] == [(2, "invalid_adapter")]


@pytest.mark.parametrize(
    ("rows", "code"),
    [
        (["", " "], "empty_file"),
        ([row(str(number)) for number in range(4)], "too_many_requests"),
        ([row("a"), row("b" * 2000)], "line_too_large"),
    ],
)
def test_a_file_that_is_no_batch_is_told_as_a_whole(tmp_path, rows, code, monkeypatch):
    monkeypatch.setattr(batch_work, "MAX_ROWS", 3)
    with serve(tmp_path, settings=GatewaySettings(max_body_bytes=1000)) as gateway:
        client = gateway.client(gateway.key("acme", SCOPES))
        done = ended(client, begin(client, rows))
        assert (done.status, [one.code for one in done.errors.data]) == ("failed", [code])


def test_rows_that_fail_are_in_the_file_of_errors_with_what_a_client_would_have_seen(gateway, client):
    rows = [row("good"), row("hot", temperature=9), row("crash"), row("wide", n=1000), row("again")]
    done = ended(client, begin(client, rows))
    assert (done.status, counts(done)) == ("completed", (5, 2, 3))
    assert list(answers(client, done.output_file_id)) == ["good", "again"]
    failed = answers(client, done.error_file_id)
    assert {name: line["response"]["status_code"] for name, line in failed.items()} == {
        "hot": 400,
        "crash": 500,
        "wide": 400,
    }
    assert failed["hot"]["response"]["body"]["error"]["param"] == "temperature"
    assert "secret" not in json.dumps(failed["crash"])
    assert [call.prompt for call in gateway.backend.calls].count("crash") == batch_work.TRIES


def test_a_batch_of_another_tenant_is_answered_like_an_unknown_one(gateway, client):
    made = begin(client, [row("a")])
    ended(client, made)
    unknown = "batch_" + "0" * 24
    with gateway.http(gateway.key("globex", SCOPES)) as stranger:
        for method, path in [("GET", ""), ("POST", "/cancel")]:
            foreign = stranger.request(method, f"/v1/batches/{made.id}{path}")
            missing = stranger.request(method, f"/v1/batches/{unknown}{path}")
            assert foreign.status_code == missing.status_code == 404
            assert foreign.text == missing.text.replace(unknown, made.id)
        assert stranger.get("/v1/batches").json()["data"] == []
        assert stranger.get(f"/v1/batches?after={made.id}").status_code == 404
        body = {"input_file_id": made.input_file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
        assert stranger.post("/v1/batches", json=body).json()["error"]["code"] == "file_not_found"


def test_batches_are_listed_in_pages(client):
    ids = [begin(client, [row("a")]).id for _ in range(5)]
    page = client.batches.list(limit=2)
    assert [one.id for one in page.data] == ids[:2:-1]
    assert page.has_more is True
    assert [one.id for one in client.batches.list(limit=2)] == ids[::-1]  # of all pages
    assert [one.id for one in client.batches.list(after=ids[1])] == ids[:1]
    for batch in client.batches.list():
        assert ended(client, batch).status == "completed"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"input_file_id": "file-nix"}, "input_file_id"),
        ({"metadata": {"a": "b" * 513}}, "metadata"),
        ({"metadata": {str(number): "" for number in range(17)}}, "metadata"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds"),
        ({"model": "x"}, "model"),
    ],
)
def test_a_batch_that_cannot_be_is_refused_by_its_field(gateway, client, change, param):
    body = {"input_file_id": upload(client, [row("a")]), "endpoint": COMPLETIONS, "completion_window": "24h"}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/batches", body={**body, **change}, cast_to=object)
    assert refused.value.param == param
    assert list(client.batches.list()) == []


def test_a_file_of_another_purpose_is_no_batch_and_a_wrong_page_is_refused(gateway, client):
    file_id = upload(client, [row("a")], purpose="fine-tune")
    with pytest.raises(openai.BadRequestError, match='uploaded for "fine-tune"'):
        client.batches.create(input_file_id=file_id, endpoint=COMPLETIONS, completion_window="24h")
    with gateway.http(client.api_key) as http:
        for query, param in (
            ("limit=0", "limit"),
            ("limit=101", "limit"),
            ("before=x", "before"),
            ("after=%00", "batch_id"),
        ):
            reply = http.get(f"/v1/batches?{query}")
            assert (reply.status_code in (400, 404), reply.json()["error"]["param"]) == (True, param)


def test_a_key_that_is_held_to_some_adapters_or_may_not_infer_has_no_batches(gateway, client):
    made = begin(client, [row("a", model="acme.support")])
    body = {"input_file_id": made.input_file_id, "endpoint": COMPLETIONS, "completion_window": "24h"}
    fill(gateway.store, 1, "acme.support")
    _, held = gateway.store.create_key("acme", ["infer", "read", "train"], adapters=["support"])
    with gateway.http(held) as http:
        for method, path in (("POST", ""), ("GET", ""), ("GET", f"/{made.id}"), ("POST", f"/{made.id}/cancel")):
            reply = http.request(method, f"/v1/batches{path}", json=body if method == "POST" else None)
            assert (reply.status_code, reply.json()["error"]["code"]) == (403, "insufficient_scope")
    with gateway.http(gateway.key("acme", ("read",))) as reader:
        assert reader.get(f"/v1/batches/{made.id}").status_code == 200
        for path in ("", f"/{made.id}/cancel"):
            assert reader.post(f"/v1/batches{path}", json=body).status_code == 403


def test_a_tenant_whose_files_are_full_makes_no_batch(tmp_path):
    with serve(tmp_path, settings=GatewaySettings(max_tenant_files=1)) as gateway:
        client = gateway.client(gateway.key("acme", SCOPES))
        with pytest.raises(openai.BadRequestError, match="1 files, which is the most"):
            begin(client, [row("a")])


def test_a_tenant_has_so_many_open_batches_at_most(tmp_path):
    with serve(tmp_path, settings=GatewaySettings(max_open_batches=2)) as gateway:
        client = gateway.client(gateway.key("acme", SCOPES))
        gateway.backend.allowed = 0
        made = [begin(client, [row("a")]) for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="2 of your batches"):
            begin(client, [row("a")])
        gateway.backend.allowed = 100
        ended(client, made[0])
        begin(client, [row("a")])
