"""What operators and tools ask of the gateway: the tokenizer, where adapters are resident, metrics, header bounds."""

from __future__ import annotations

import logging
import re
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from audit_entries import last_audit
from gateway_backend import BACKBONE
from gateway_server import Gateway, serve
from prometheus_client.parser import text_string_to_metric_families

from pedro.cli.serve import follow
from pedro.gateway import traffic_sampler
from pedro.gateway.access_log import SharedFileHandler, write_to
from pedro.gateway.edge import GatewayMetrics


@pytest.fixture
def gateway(tmp_path):
    with serve(tmp_path) as running:
        yield running


@pytest.fixture
def http(gateway: Gateway):
    with gateway.http(gateway.key()) as client:
        yield client


@pytest.fixture
def admin(gateway: Gateway):
    with gateway.http(gateway.key("ops", ("admin",))) as client:
        yield client


# the tokenizer


def test_a_text_is_tokenized_in_the_form_of_vllms_server(http):
    reply = http.post("/tokenize", json={"model": BACKBONE, "prompt": "a bb", "return_token_strs": True})
    assert reply.json() == {"count": 3, "max_model_len": 64, "tokens": [3, 1, 2], "token_strs": ["<s>", "a", "bb"]}
    plain = http.post("/tokenize", json={"prompt": "a bb", "add_special_tokens": False}).json()
    assert (plain["tokens"], plain["token_strs"]) == ([1, 2], None)


def test_messages_are_tokenized_as_the_adapters_format_renders_them(http):
    body = {
        "model": "acme.support",
        "messages": [{"role": "developer", "content": "hi"}],
        "add_generation_prompt": True,
    }
    assert http.post("/tokenize", json=body).json()["tokens"] == [len("system:"), 2]


def test_ids_become_text(http):
    assert http.post("/detokenize", json={"tokens": [1, 3]}).json() == {"prompt": "w www"}
    assert http.post("/detokenize", json={"model": BACKBONE, "tokens": []}).json() == {"prompt": ""}


def test_the_requests_of_lm_evals_remote_tokenizer_are_answered(http):
    """As its `RemoteTokenizer` sends them: no model, special tokens looked up through /tokenizer_info."""
    info = http.get("/tokenizer_info").json()
    assert info["tokenizer_class"]
    tokens = http.post("/tokenize", json={"prompt": info["eos_token"], "add_special_tokens": False}).json()["tokens"]
    assert len(tokens) == 1
    assert isinstance(http.post("/detokenize", json={"tokens": tokens}).json()["prompt"], str)


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"messages": []}, "messages"),
        (
            "/tokenize",
            {"messages": [{"role": "user", "content": "a"}], "add_special_tokens": True},
            "add_special_tokens",
        ),
        ("/tokenize", {"messages": [{"role": "user", "content": "a"}], "chat_template": "{{ x }}"}, "chat_template"),
        ("/tokenize", {"messages": [{"role": "user", "content": "a", "name": "bob"}]}, "messages[0].name"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "truncate": 5}, "truncate"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
    ],
)
def test_a_bad_tokenizer_request_is_a_400_that_names_the_field(http, path, body, param):
    reply = http.post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


def test_a_foreign_adapter_tokenizes_for_nobody_else(http):
    for path, body in (("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [1]})):
        foreign = http.post(path, json={"model": "globex.faq", **body})
        unknown = http.post(path, json={"model": "globex.nix", **body})
        assert (foreign.status_code, unknown.status_code) == (404, 404)
        assert foreign.text.replace("globex.faq", "X") == unknown.text.replace("globex.nix", "X")


def test_tokenizing_counts_as_a_request_and_as_no_tokens(gateway, http):
    gateway.store.set_quota(tenant="acme", requests_per_minute=2, tokens_per_minute=5)
    reply = http.post("/tokenize", json={"prompt": "a " * 100})
    assert (reply.headers["x-ratelimit-remaining-requests"], reply.headers["x-ratelimit-remaining-tokens"]) == (
        "1",
        "5",
    )
    assert http.post("/detokenize", json={"tokens": [1]}).status_code == 200
    assert http.get("/tokenizer_info").status_code == 429


# adapters


def residence(reply: httpx.Response) -> list[tuple]:
    assert reply.status_code == 200, reply.text
    return [(held["version"], held["replica"], held["state"], held["pinned"]) for held in reply.json()["residence"]]


def test_an_adapter_is_loaded_pinned_unpinned_and_unloaded_and_says_where_it_is(gateway, admin):
    path = "/v1/adapters/acme.support"
    assert residence(admin.get(path)) == []
    assert residence(admin.post(f"{path}/load")) == [(1, "replica-1", "ready", False)]
    assert residence(admin.post(f"{path}/pin")) == [(1, "replica-1", "ready", True)]
    assert residence(admin.get(path)) == [(1, "replica-1", "ready", True)]
    assert residence(admin.post(f"{path}/unpin")) == [(1, "replica-1", "ready", False)]
    assert residence(admin.post(f"{path}/unload")) == []
    assert residence(admin.get(path)) == []
    entries = last_audit(gateway.store, "acme")
    assert [entry.action for entry in entries] == [f"adapter.{act}" for act in ("unload", "unpin", "pin", "load")]
    assert {(entry.subject, entry.actor[:12]) for entry in entries} == {("acme.support", "key:ops/key_")}


def test_the_list_shows_each_adapters_own_residence(admin):
    admin.post("/v1/adapters/globex.faq/load")
    found = {card["name"]: card["residence"] for card in admin.get("/v1/adapters").json()["data"]}
    assert found == {
        "acme.support": [],
        "globex.faq": [
            {
                "version": 2,
                "digest": "sha256:2",
                "replica": "replica-1",
                "state": "ready",
                "bytes": 1000,
                "pinned": False,
                "uses": 0,
            }
        ],
    }


def test_versions_can_be_seen_and_moved_while_no_engine_answers(gateway, admin):
    gateway.backend.engine_answers = False
    assert admin.get("/v1/adapters/acme.support").json()["residence"] is None
    assert [card["residence"] for card in admin.get("/v1/adapters").json()["data"]] == [None, None]
    assert admin.post("/v1/adapters/acme.support/promote", json={"version": 2}).status_code == 200


def test_an_unknown_adapter_is_a_404_and_an_unknown_action_too(admin):
    assert admin.get("/v1/adapters/acme.nope").status_code == 404
    assert admin.post("/v1/adapters/acme.nope/load").json()["error"]["code"] == "model_not_found"
    assert admin.post("/v1/adapters/acme.support/explode").json()["error"]["code"] == "unknown_url"


def test_an_infer_key_may_neither_see_nor_move_adapters(http):
    assert http.get("/v1/adapters/acme.support").status_code == 403
    assert http.post("/v1/adapters/acme.support/unload").status_code == 403


# metrics


def operator(gateway):
    return gateway.http(gateway.key("ops", ("admin",)))


def figures(text: str) -> dict[tuple, float]:
    families = list(text_string_to_metric_families(text))
    assert len({family.name for family in families}) == len(families)
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


def test_metrics_hold_the_gateways_figures_and_the_engines_in_prometheus_form(gateway, http):
    body = {"model": BACKBONE, "prompt": "a", "max_tokens": 2}
    http.post("/v1/completions", json=body)
    http.post("/v1/completions", json={**body, "stream": True})
    http.post("/v1/completions", json={**body, "prompt": "crash"})
    http.post("/v1/completions", json={**body, "prompt": "queue"})
    http.get("/v1/models/acme.support")
    for stray in ("/wp-login.php", "/.env"):
        http.get(stray)
    gateway.store.set_quota(tenant="acme", requests_per_minute=1)
    for _ in range(2):
        http.post("/v1/completions", json=body)
    with operator(gateway) as ops:
        reply = ops.get("/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=")
    found = figures(reply.text)
    counted = "pedro_gateway_requests_total"
    assert found[counted, "/v1/completions", "2xx", "POST"] == 3
    assert found[counted, "/v1/completions", "4xx", "POST"] == 2
    assert found[counted, "/v1/completions", "5xx", "POST"] == 1
    assert found[counted, "/v1/models/{name:path}", "2xx", "GET"] == 1
    assert found[counted, "4xx", "GET", "unknown"] == 2
    assert found["pedro_gateway_too_many_requests_total", "quota"] == 1
    assert found["pedro_gateway_too_many_requests_total", "queue"] == 1
    assert found["pedro_gateway_request_seconds_count", "/v1/completions"] == 6
    assert found["pedro_gateway_open_streams",] == 0
    assert found["pedro_engine_running",] == 0


def test_of_several_gateways_each_names_itself_in_its_figures():
    metrics = GatewayMetrics("gateway#abc")
    metrics.opened()
    samples = [sample for family in text_string_to_metric_families(metrics.text()) for sample in family.samples]
    assert samples
    assert {sample.labels["gateway"] for sample in samples} == {"gateway#abc"}
    assert {sample.labels["reason"] for sample in samples if "too_many" in sample.name} == {"quota", "queue"}


def test_open_streams_are_counted_while_they_are_open(tmp_path):
    with serve(tmp_path) as gateway, gateway.http(gateway.key()) as http, operator(gateway) as local:

        def counted():
            return figures(local.get("/metrics").text)["pedro_gateway_open_streams",]

        gateway.backend.allowed = 1
        body = {"model": BACKBONE, "prompt": "a", "max_tokens": 3, "stream": True}
        with http.stream("POST", "/v1/completions", json=body) as reply:
            lines = reply.iter_lines()  # kept: httpx closes the stream of an iterator that is dropped
            next(lines)
            assert counted() == 1
        deadline = time.monotonic() + 60
        while counted():
            assert time.monotonic() < deadline, "the stream of a client that left is counted for ever"
            time.sleep(0.01)


def test_the_gateways_figures_are_there_while_no_engine_answers(gateway):
    gateway.backend.engine_answers = False
    with operator(gateway) as ops:
        reply = ops.get("/metrics")
    assert reply.status_code == 200
    assert ("pedro_gateway_open_streams",) in figures(reply.text)


@pytest.mark.parametrize(("scope", "status"), [(None, 401), ("infer", 403), ("admin", 200)])
def test_metrics_need_an_admin_key_from_this_machine_too(gateway, scope, status):
    with gateway.http(scope and gateway.key("acme", (scope,))) as local:  # as a proxy on this machine would come
        reply = local.get("/metrics", headers={"host": "127.0.0.1:8000"})
    assert reply.status_code == status
    assert ("pedro_" in reply.text) == (status == 200)


# the access log


def test_every_request_is_one_line_without_its_content(tmp_path):
    file = tmp_path / "logs" / "requests.log"
    write_to(file)
    with serve(tmp_path) as gateway, gateway.http(gateway.key()) as http, gateway.http() as nobody:
        body = {"model": BACKBONE, "prompt": "hush now", "max_tokens": 3}
        ids = [
            http.post("/v1/completions", json=asked).headers["x-request-id"]
            for asked in (body, {**body, "stream": True}, {**body, "model": "no\nsuch\x1b", "n": 2})
        ]
        nobody.get("/v1/models"), nobody.get("/health"), http.post("/v1/completions", json={"a": "hush"})
    whole, streamed, unknown, stranger, wrong = file.read_text().splitlines()
    for line, request_id in zip((whole, streamed), ids, strict=False):
        assert f" {request_id} acme POST /v1/completions 200 " in line
        assert f'model="{BACKBONE}" prompt_tokens=2 completion_tokens=3 ' in line
        assert re.search(r" first=\d\.\d{3}s total=\d\.\d{3}s$", line)
    assert f"{ids[2]} acme POST /v1/completions 404 model=" in unknown
    assert " - GET /v1/models 401 total=" in stranger
    assert " acme POST /v1/completions 400 total=" in wrong
    assert "hush" not in file.read_text()


def test_gateways_of_a_host_share_a_log_and_no_line_is_lost_when_it_begins_anew(tmp_path):
    file = tmp_path / "requests.log"
    handlers = [SharedFileHandler(file, maxBytes=2000, backupCount=3) for _ in range(3)]
    wanted = [f"line {number:50}" for number in range(100)]
    for number, line in enumerate(wanted):
        handlers[number % 3].emit(logging.makeLogRecord({"msg": line}))
    for handler in handlers:
        handler.close()
    files = sorted((path for path in tmp_path.iterdir() if path.suffix != ".lock"), reverse=True)
    assert len(files) > 1
    assert [line for path in files for line in path.read_text().splitlines()] == wanted


def test_a_log_that_cannot_be_opened_costs_its_lines_and_no_request(tmp_path, capsys):
    file = tmp_path / "logs" / "requests.log"
    file.parent.mkdir()
    handler = SharedFileHandler(file, maxBytes=2000, backupCount=3)
    handler.emit(logging.makeLogRecord({"msg": "before"}))
    file.parent.rename(tmp_path / "aside")
    for _ in range(2):
        handler.emit(logging.makeLogRecord({"msg": "meanwhile"}))
    (tmp_path / "aside").rename(file.parent)
    handler.emit(logging.makeLogRecord({"msg": "after"}))
    handler.close()
    assert file.read_text() == "before\nafter\n"
    assert "meanwhile" in capsys.readouterr().err


def test_the_log_is_followed_from_now_on_also_when_it_begins_anew(tmp_path):
    file = tmp_path / "requests.log"
    file.write_text("old\n")
    lines = follow(file, poll_s=0.01)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(next, lines)
        while not first.done():  # whenever it begins to follow, the old line is not among those that come
            with file.open("a") as log:
                log.write("new\n")
            time.sleep(0.01)
        assert first.result() == "new"
        with file.open("a") as log:
            log.write("part")
        file.write_text("a\n")
        while (line := pool.submit(next, lines).result(60)) == "new":
            pass
        assert line.endswith("a")
        file.unlink()
        file.symlink_to("/dev/zero")  # no end, and no line
        stuck = pool.submit(next, lines)
        time.sleep(0.05)
        assert not stuck.done()
        file.unlink()
        file.write_text("\n")  # shorter than before: a new file
        assert stuck.result(60) == ""


# headers


@pytest.mark.parametrize(
    "headers", [{f"x-{number}": "a" for number in range(101)}, {"x-long": "a" * 16_400}], ids=["too many", "too long"]
)
def test_headers_beyond_the_bounds_are_a_431(http, headers):
    reply = http.get("/v1/models", headers=headers)
    assert (reply.status_code, reply.json()["error"]["code"]) == (431, "headers_too_large")
    assert reply.headers["x-request-id"]


def test_history_needs_an_admin_key_and_tells_what_was_read_before(gateway, monkeypatch):
    monkeypatch.setattr(traffic_sampler, "FRESH_S", 0.0)  # each question is a reading
    with gateway.http(gateway.key("acme", ("infer", "train", "read"))) as tenant:
        assert tenant.get("/metrics/history").status_code == 403
    with operator(gateway) as ops:
        first = ops.get("/metrics/history").json()
        told = ops.get("/metrics/history", params={"seconds": 60}).json()
        assert (told["object"], told["id"]) == ("metrics.history", first["id"])
        assert told["began"] <= first["read_at"] < told["read_at"]
        assert (told["data"][-1]["start"], told["data"][-1]["end"]) == (
            pytest.approx(first["read_at"], abs=0.01),
            pytest.approx(told["read_at"], abs=0.01),
        )
        again = ops.get("/metrics/history", params={"after": told["read_at"]}).json()
        assert [each["start"] for each in again["data"]] == [told["data"][-1]["end"]], "nothing is told twice"


@pytest.mark.parametrize(
    ("query", "param", "why"),
    [
        ("seconds=0", "seconds", "a number, 1 to 172,800"),
        ("seconds=nan", "seconds", "got 'nan'"),
        ("seconds=1e9", "seconds", "got '1e9'"),
        ("after=-1", "after", "a number, 0 to"),
        ("after=yesterday", "after", "got 'yesterday'"),
        ("since=3", "since", "known are seconds, after"),
    ],
)
def test_a_query_of_history_that_is_wrong_is_refused_by_name(gateway, query, param, why):
    with operator(gateway) as ops:
        reply = ops.get(f"/metrics/history?{query}")
    assert reply.status_code == 400
    assert reply.json()["error"]["param"] == param
    assert why in reply.json()["error"]["message"]
