"""What a key may do over HTTP: for how long, with which scopes, and which adapters it may name; who moved what."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import openai
import pytest
from audit_entries import last_audit
from docs_pages import ROOT, table
from gateway_backend import BACKBONE
from gateway_server import Gateway, serve
from store_moves import fill, stub_version

from pedro.gateway import auth
from pedro.store import Actor


@pytest.fixture(autouse=True)
def _patient(monkeypatch):
    """A reading of the feed is waited for, however slow the machine is."""
    monkeypatch.setattr(auth, "PATIENCE_S", 60.0)


@pytest.fixture
def gateway(tmp_path):
    with serve(tmp_path) as running:
        for name in ("acme.support", "acme.voice", "globex.faq"):
            fill(running.store, 1, name)
        yield running


def key_with(gateway: Gateway, *scopes: str, tenant: str = "acme"):
    return gateway.http(gateway.key(tenant, scopes))


# time


def test_a_key_whose_time_is_over_is_an_unknown_one_to_every_route_and_nobody_asks_the_database(gateway, monkeypatch):
    ends = time.time() + 3600
    _, secret = gateway.store.create_key("acme", ["infer", "train", "read"], expires=ends)
    body = {"model": BACKBONE, "prompt": "a", "max_tokens": 1}
    with gateway.http(secret) as http, gateway.http("sk-pedro-nobody") as nobody:
        assert http.post("/v1/completions", json=body).status_code == 200
        monkeypatch.setattr(gateway.store, "authenticate", lambda _: pytest.fail("a key that is known is asked for"))
        monkeypatch.setattr(time, "time", lambda: ends)
        asked = [
            (http.get("/v1/models"), nobody),
            (http.post("/v1/completions", json=body), nobody),
            (http.post("/tokenize", json={"prompt": "a"}), nobody),
            (http.get("/v1/adapters"), nobody),
        ]
        monkeypatch.undo()
        for reply, stranger in asked:
            unknown = stranger.request(reply.request.method, reply.request.url.path)
            assert (reply.status_code, unknown.status_code) == (401, 401)
            assert reply.json() == unknown.json()
            assert reply.json()["error"]["code"] == "invalid_api_key"


def test_after_a_rotation_both_secrets_work_until_the_old_one_ends(gateway):
    record, old = gateway.store.create_key("acme")
    with gateway.http(old) as http:
        assert http.get("/v1/models").status_code == 200
        _, new = gateway.store.rotate_key(record.id, 3600)
        assert http.get("/v1/models").status_code == 200
        with gateway.http(new) as renewed:
            assert renewed.get("/v1/models").status_code == 200
    other, secret = gateway.store.create_key("acme")
    with gateway.http(secret) as http:
        assert http.get("/v1/models").status_code == 200
        gateway.store.rotate_key(other.id, 0)
        assert http.get("/v1/models").status_code == 401


# scopes

ROUTES = [
    (method, path, set(re.findall("infer|train|read|admin", row[1])))
    for row in table(ROOT / "docs" / "reference" / "http-api.md", "## Routes")
    for method, path in re.findall(r"`([A-Z]+) (/\S+)`", row[0])
]  # every one of the gateway, as another test says


@pytest.mark.parametrize("scope", ["infer", "read", "train", "admin"])
def test_each_scope_opens_the_routes_that_its_documentation_says_and_refusals_name_what_is_missing(gateway, scope):
    with key_with(gateway, scope) as http:
        for method, path, scopes in ROUTES:
            reply = http.request(method, re.sub(r"\{\w+\}", "acme.nix", path))
            refused = reply.status_code == 403
            assert refused == bool(scopes and not scopes & {scope} and scope != "admin"), (method, path, reply.text)
            if refused:
                error = reply.json()["error"]
                assert error["code"] == "insufficient_scope"
                assert set(re.findall("'(.*?)'", error["message"])) == scopes


def test_a_key_with_several_scopes_has_all_of_their_rights(gateway):
    with key_with(gateway, "infer", "read") as http:
        assert http.post("/tokenize", json={"prompt": "a"}).status_code == 200
        assert http.get("/v1/organization/audit_logs").status_code == 200
        assert http.post("/v1/adapters/acme.support/promote", json={"version": 2}).status_code == 403


# the adapters that a key is held to


@pytest.fixture
def held(gateway):
    """A key of acme that may name acme.voice alone; acme.support is there too."""
    gateway.backend.adapters["acme.voice"] = replace(gateway.backend.adapters["acme.support"], name="acme.voice")
    _, secret = gateway.store.create_key("acme", ["infer", "read", "train"], adapters=["voice"])
    with gateway.http(secret) as client:
        yield client


NAMED = (
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "a", "max_tokens": 1}),
    ("POST", "/v1/completions", {"model": "NAME", "prompt": "a", "max_tokens": 1, "stream": True}),
    ("POST", "/v1/chat/completions", {"model": "NAME", "messages": [{"role": "user", "content": "a"}]}),
    ("POST", "/tokenize", {"model": "NAME", "prompt": "a"}),
    ("POST", "/detokenize", {"model": "NAME", "tokens": [1]}),
    ("GET", "/v1/models/NAME", None),
    ("GET", "/v1/adapters/NAME", None),
    ("POST", "/v1/adapters/NAME/promote", {"version": 2}),
    ("POST", "/v1/adapters/NAME/rollback", None),
    ("POST", "/v1/adapters/NAME/canary", {"version": 2, "weight": 0.5}),
    ("POST", "/v1/adapters/NAME/shadow", {"version": 2, "weight": 0.5}),
    ("POST", "/v1/adapters/NAME/feedback", {"version": 2, "thumb": "up"}),
    ("DELETE", "/v1/adapters/NAME/versions/2", None),
)


@pytest.mark.parametrize(("method", "path", "body"), NAMED)
def test_to_a_key_that_is_held_to_some_adapters_every_other_name_is_an_unknown_one(gateway, held, method, path, body):
    def ask(http, name: str):
        given = {key: value.replace("NAME", name) if key == "model" else value for key, value in (body or {}).items()}
        return http.request(method, path.replace("NAME", name), json=given or None)

    with key_with(gateway, "infer", "read", "train") as whole:
        unknown = ask(whole, "acme.nix")
        assert ask(whole, "acme.support").status_code in (200, 409)
    assert unknown.status_code == 404
    for name in ("acme.support", "acme.support@champion", "acme.nix", "globex.faq", BACKBONE, "acme.voice-two"):
        if "/v1/adapters" in path and name == BACKBONE:
            continue  # no adapter
        reply = ask(held, name)
        assert (reply.status_code, reply.text.replace(name, "NAME")) == (404, unknown.text.replace("acme.nix", "NAME"))
        assert reply.headers.keys() == unknown.headers.keys()
    assert ask(held, "acme.voice").status_code in (200, 409)


def test_a_key_that_is_held_to_some_adapters_sees_no_other_in_any_list(held):
    assert [card["id"] for card in held.get("/v1/models").json()["data"]] == ["acme.voice"]
    assert [card["name"] for card in held.get("/v1/adapters").json()["data"]] == ["acme.voice"]
    assert held.get("/v1/organization/audit_logs").status_code == 403
    reply = held.post("/tokenize", json={"prompt": "a"})  # without a name it would be the backbone
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "model")
    assert "acme.voice" in reply.json()["error"]["message"]


# moves by tenants


def test_a_tenant_moves_versions_of_its_own_adapters_in_its_own_name(gateway):
    record, secret = gateway.store.create_key("acme", ["train"])
    actor = Actor.of_key("acme", record.id, "my-move")
    with gateway.http(secret) as http:
        http.headers["x-request-id"] = "my-move"
        path = "/v1/adapters/acme.support"
        card = http.post(f"{path}/promote", json={"version": 2, "expected": 1}).json()
        assert card["aliases"] == {"champion": 2, "previous": 1}
        assert "residence" not in http.get(path).json()
        assert http.post(f"{path}/promote", json={"version": 2, "expected": 1}).status_code == 409
        assert http.post(f"{path}/canary", json={"version": 1, "weight": 0.25}).json()["canary"] == {
            "version": 1,
            "weight": 0.25,
        }
        assert http.post(f"{path}/canary", json={"version": 1, "weight": 0}).json()["canary"] is None
        shadow = http.post(f"{path}/shadow", json={"version": 1, "weight": 1}).json()["shadow"]
        assert shadow == {"version": 1, "weight": 1.0}
        assert http.post(f"{path}/rollback").json()["aliases"]["champion"] == 1
        refused = http.delete(f"{path}/versions/1")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "conflict")
        assert "champion" in refused.json()["error"]["message"]
        gone = http.delete(f"{path}/versions/2")
        assert gone.json() == {"object": "adapter.version", "id": "acme.support:2", "deleted": True}
    assert gateway.backend.actors == [actor] * 6


def test_a_tenants_looks_and_moves_are_requests_of_its_quota_and_an_operators_are_not(gateway):
    gateway.store.set_quota(tenant="acme", requests_per_minute=3)
    gateway.store.set_quota(tenant="ops", requests_per_minute=1)
    with key_with(gateway, "train") as http, key_with(gateway, "admin", tenant="ops") as admin:
        moves = [(who, {"version": version}) for who in (http, admin) for version in (2, 1, 2)]
        path = "/v1/adapters/acme.support/promote"
        assert [who.get("/v1/adapters").status_code for who in (http, admin, admin)] == [200, 200, 200]
        assert [who.post(path, json=body).status_code for who, body in moves] == [200, 200, 429, 200, 200, 200]


@pytest.mark.parametrize(("method", "path", "body"), [one for one in NAMED if "/v1/adapters" in one[1]])
def test_a_tenant_finds_no_adapter_of_another_to_see_or_move(gateway, method, path, body):
    with key_with(gateway, "train", "read") as http:
        foreign = http.request(method, path.replace("NAME", "globex.faq"), json=body)
        unknown = http.request(method, path.replace("NAME", "globex.nix"), json=body)
    assert (foreign.status_code, unknown.status_code) == (404, 404)
    assert foreign.text.replace("globex.faq", "X") == unknown.text.replace("globex.nix", "X")
    assert gateway.backend.adapters["globex.faq"].aliases["champion"] == 2


@pytest.mark.parametrize(
    ("method", "path", "body", "param"),
    [
        ("POST", "canary", {"version": 2}, "weight"),
        ("POST", "canary", {"version": 2, "weight": 1}, "weight"),
        ("POST", "canary", {"version": 2, "weight": "0.1"}, "weight"),
        ("POST", "canary", {"weight": 0.1}, "version"),
        ("POST", "shadow", {"version": 2, "weight": 1.5}, "weight"),
        ("POST", "feedback", {"version": 2}, "score"),
        ("POST", "feedback", {"version": 2, "score": 1.5}, "score"),
        ("POST", "feedback", {"version": 2, "score": 1, "thumb": "up"}, "score"),
        ("POST", "feedback", {"version": 2, "thumb": "sideways"}, "thumb"),
        ("POST", "feedback", {"score": 1}, "version"),
        ("POST", "feedback", {"score": 1, "system_fingerprint": "globex.faq:1#sha256:1"}, "system_fingerprint"),
        ("POST", "feedback", {"score": 1, "system_fingerprint": "../x"}, "system_fingerprint"),
        ("POST", "promote", {"version": 2, "expected": 0}, "expected"),
        ("POST", "promote", {"version": 2, "champion": 1}, "champion"),
        ("DELETE", "versions/0", None, "version"),
        ("DELETE", "versions/x", None, "version"),
        ("DELETE", "versions/99999999999999999999", None, "version"),
    ],
)
def test_a_bad_move_is_a_400_that_names_the_field(gateway, method, path, body, param):
    with key_with(gateway, "train") as http:
        reply = http.request(method, f"/v1/adapters/acme.support/{path}", json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, param)


# the audit


def audit_of(gateway: Gateway) -> None:
    """Rows of acme and globex, by operators and by a key of acme's."""
    gateway.store.audit("adapter.promote", "acme", "acme.support", after={"aliases": {"champion": 1}}, actor="user:ann")
    gateway.store.audit("adapter.delete", "globex", "globex.faq", actor="user:ann")
    mine = Actor.of_key("acme", "key_mine", "req_mine")
    gateway.store.audit("adapter.rollback", "acme", "acme.support", actor=mine)
    gateway.store.audit("quota.set", "acme", "tenant:acme", actor=Actor.of_key("ops", "key_ops", "req_ops"))
    gateway.store.audit("backup.create", "*", "backup.tar", actor="user:ann")


def test_openais_client_reads_the_audit_page_by_page(gateway):
    audit_of(gateway)
    admin = gateway.key("ops", ("admin",))
    with openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="-", admin_api_key=admin, max_retries=0) as client:
        logs = client.admin.organization.audit_logs
        types = [one.type for one in logs.list(limit=2)]  # goes on by itself
        assert types[:6] == [
            "api_key.created",  # of this admin
            "backup.create",
            "rate_limit.updated",
            "adapter.rollback",
            "adapter.delete",
            "adapter.promote",
        ]
        (mine,) = logs.list(actor_ids=["key_mine"])
        assert (mine.actor.api_key.id, mine.actor.api_key.service_account.id, mine.project.id) == (
            "key_mine",
            "acme",
            "acme",
        )
        assert [one.type for one in logs.list(project_ids=["globex"])] == ["adapter.delete"]
        assert [one.type for one in logs.list(event_types=["api_key.created"], limit=1)]
        since = mine.effective_at
        assert {one.id for one in logs.list(effective_at={"gte": since})} >= {mine.id}
        assert mine.id not in {one.id for one in logs.list(effective_at={"gt": since})}
        assert mine.id in {one.id for one in logs.list(effective_at={"lte": since})}
        assert mine.id not in {one.id for one in logs.list(effective_at={"lt": since})}


def test_a_tenant_sees_its_own_rows_and_not_who_the_operators_are(gateway):
    audit_of(gateway)
    with key_with(gateway, "read") as http:

        def ask(**query):
            reply = http.get("/v1/organization/audit_logs", params=query)
            assert reply.status_code == 200, reply.text
            return reply.json()

        data = ask(limit=100)["data"]
        assert {one["project"]["id"] for one in data} == {"acme"}
        assert not [name for name in ("ann", "key_ops", "req_", "globex", "backup") if name in str(data)]
        own = [one for one in data if one["actor"]["type"] == "api_key"]
        assert [one["actor"]["api_key"]["id"] for one in own] == ["key_mine"]
        assert [one["type"] for one in ask(**{"actor_ids[]": "key_mine"})["data"]] == ["adapter.rollback"]
        assert ask(**{"actor_ids[]": "key_ops"})["data"] == ask(**{"actor_ids[]": "user:ann"})["data"] == []
        assert ask(**{"project_ids[]": "globex"}) == {
            "object": "list",
            "data": [],
            "first_id": None,
            "last_id": None,
            "has_more": False,
        }
        assert len(ask(**{"project_ids[]": ["globex", "acme"], "limit": 100})["data"]) == len(data)
        first = ask(limit=1)
        assert first["has_more"]
        assert ask(limit=1, after=first["last_id"])["data"][0]["id"] == data[1]["id"]
        (theirs,) = [one for one in last_audit(gateway.store, "globex") if one.action == "adapter.delete"]
        foreign, unknown = (
            http.get("/v1/organization/audit_logs", params={"after": after})
            for after in (theirs.public_id, f"audit_log-{0:024x}")
        )
        assert foreign.status_code == unknown.status_code == 404
        assert foreign.text.replace(theirs.public_id, "ID") == unknown.text.replace(f"audit_log-{0:024x}", "ID")


@pytest.mark.parametrize(
    ("query", "param", "code"),
    [
        ({"limit": 0}, "limit", "invalid_value"),
        ({"limit": "9" * 30}, "limit", "invalid_value"),
        ({"limit": ["1", "2"]}, "limit", "invalid_value"),
        ({"after": "audit_log-x"}, "after", "invalid_value"),
        ({"effective_at[gte]": "-1"}, "effective_at[gte]", "invalid_value"),
        ({"effective_at[since]": "1"}, "effective_at[since]", "unknown_parameter"),
        ({"before": "audit_log-1"}, "before", "unsupported_parameter"),
        ({"actor_emails[]": "a@b"}, "actor_emails", "unsupported_parameter"),
        ({"actor_ids[]": ["x"] * 101}, "actor_ids", "invalid_value"),
        ({"resource_ids[]": "a\0b"}, "resource_ids", "invalid_value"),
    ],
)
def test_a_bad_question_of_the_audit_is_a_400_that_names_the_parameter(gateway, query, param, code):
    with key_with(gateway, "read") as http:
        reply = http.get("/v1/organization/audit_logs", params=query)
    assert (reply.status_code, reply.json()["error"]["param"], reply.json()["error"]["code"]) == (400, param, code)


def test_a_canary_whose_answers_clients_score_lower_is_withdrawn(gateway):
    name = "acme.support"
    gateway.store.add_version(stub_version(2, name), gateway.store.made_of(name))
    gateway.store.promote(name, 1)
    with key_with(gateway, "infer") as http, key_with(gateway, "read") as reader:
        path = f"/v1/adapters/{name}/feedback"
        assert http.post(path, json={"version": 2, "score": 0}).json()["counted"] is False  # it is no canary
        gateway.store.set_canary(name, 2, 0.5)
        assert reader.post(path, json={"version": 2, "score": 0}).status_code == 403
        assert http.post(path, json={"version": 9, "score": 0}).status_code == 404
        for number in range(50):
            assert gateway.store.get_adapter(name).standing.canary is not None
            good = {"system_fingerprint": f"{name}:1#sha256:1", "thumb": "up"}
            assert http.post(path, json=good).json()["counted"]
            reply = http.post(path, json={"version": 2, "score": 0.25 + number % 2 / 2})
        assert reply.json() == {"object": "adapter.feedback", "model": f"{name}:2", "score": 0.75, "counted": True}
    assert gateway.store.get_adapter(name).standing.canary is None
    move = gateway.store.alias_history(name)[0]
    assert move.action == "withdraw"
    assert move.reason.startswith("the canary has a mean of 0.500 in 50 scores, the champion 1.000 in 50: Welch's test")
