"""The official openai client registers webhook endpoints and verifies what they are sent, through a real gateway."""

from __future__ import annotations

import json
import logging
import time

import openai
import pytest
from audit_entries import last_audit
from gateway_batches import begin, ended, row, until
from gateway_server import Gateway, serve
from store_moves import fill
from webhook_receiver import LOOPBACK, receiving

from pedro.gateway import webhook_runner
from pedro.gateway.app import GatewaySettings
from pedro.store import EVENT_TYPES, JobStatus

SCOPES = ("infer", "train")
DAY_S = 24 * 3600.0


@pytest.fixture(autouse=True)
def _brisk(monkeypatch):
    monkeypatch.setattr(webhook_runner, "POLL_S", 0.05)
    monkeypatch.setattr(webhook_runner, "FIRST_RETRY_S", 0.05)


@pytest.fixture
def gateway(tmp_path):
    settings = GatewaySettings(webhook_key_file=tmp_path / "webhook.key", webhook_networks=LOOPBACK, batch_lease_s=1.0)
    with serve(tmp_path, settings=settings) as running:
        yield running


@pytest.fixture
def client(gateway: Gateway):
    return gateway.client(gateway.key("acme", SCOPES))


@pytest.fixture
def receiver():
    with receiving() as running:
        yield running


def hook(client: openai.OpenAI, url: str, event_types=("fine_tuning.job.cancelled",), name: str = "hook"):
    return client.webhooks.create(name=name, url=url, event_types=list(event_types))


def cancelled(gateway: Gateway, tenant: str = "acme") -> str:
    """A job that has ended, so that an event of it is to be sent."""
    job = gateway.store.create_job(tenant, "support", {}, queued=True)
    return gateway.store.ask_of_job(job.id, JobStatus.CANCELLED).id


def deliveries(gateway: Gateway, tenant: str = "acme") -> int:
    return gateway.store.count_of(tenant)["webhook deliveries"]


def test_the_client_makes_lists_changes_and_deletes_endpoints_and_sees_a_secret_once(client, receiver):
    made = hook(client, receiver.url, ["batch.completed", "batch.completed", "adapter.alias.moved"])
    assert (made.object, made.name, made.url) == ("webhook_endpoint", "hook", receiver.url)
    assert made.event_types == ["batch.completed", "adapter.alias.moved"]
    assert made.signing_secret.startswith("whsec_")
    assert made.signing_secret_hint == f"whsec_…{made.signing_secret[-5:]}"
    assert made.updated_at == made.created_at
    second = hook(client, receiver.url, name="second")
    assert second.signing_secret != made.signing_secret
    assert [one.id for one in client.webhooks.list()] == [second.id, made.id]
    first_page = client.webhooks.list(limit=1)
    assert (first_page.data[0].id, first_page.has_more) == (second.id, True)
    assert [one.id for one in client.webhooks.list(limit=1)] == [second.id, made.id]
    changed = client.webhooks.update(made.id, name="renamed", event_types=["batch.failed"])
    assert (changed.name, changed.url, changed.event_types) == ("renamed", receiver.url, ["batch.failed"])
    assert client.webhooks.retrieve(made.id) == changed
    assert "signing_secret" not in changed.model_dump()
    assert client.webhooks.event_types.list().data == list(EVENT_TYPES)
    gone = client.webhooks.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "webhook_endpoint.deleted", True)
    assert [one.id for one in client.webhooks.list()] == [second.id]
    with pytest.raises(openai.NotFoundError):
        client.webhooks.retrieve(made.id)


def test_events_of_jobs_batches_and_aliases_come_signed_and_the_client_unwraps_them(gateway, client, receiver):
    secret = hook(client, receiver.url, EVENT_TYPES).signing_secret
    job_id = cancelled(gateway)
    until(lambda: len(receiver.got) == 1)
    done = ended(client, begin(client, [row("a")]))
    until(lambda: len(receiver.got) == 2)
    fill(gateway.store, 1, "acme.support")
    gateway.store.promote("acme.support", 1)
    until(lambda: len(receiver.got) == 3)
    job, batch, alias = (
        openai.OpenAI(api_key="none").webhooks.unwrap(one.body, one.headers, secret=secret) for one in receiver.got
    )
    assert (job.type, job.object, job.data.id) == ("fine_tuning.job.cancelled", "event", job_id)
    assert (batch.type, batch.data.id) == ("batch.completed", done.id)
    assert batch.created_at == pytest.approx(done.completed_at, abs=1)
    moved = json.loads(receiver.got[2].body)
    assert (alias.type, moved["data"]) == (
        "adapter.alias.moved",
        {"adapter": "acme.support", "alias": "champion", "version": 1},
    )
    assert [job.id, batch.id, alias.id] == receiver.ids
    assert {one.headers["content-type"] for one in receiver.got} == {"application/json"}
    assert {one.path for one in receiver.got} == {"/hook"}


def test_a_changed_body_or_another_secret_does_not_verify(client, receiver):
    made, other = hook(client, receiver.url), hook(client, receiver.url)
    client.webhooks.test(made.id, event_type="batch.completed")
    (one,) = receiver.got
    client.webhooks.verify_signature(one.body, one.headers, secret=made.signing_secret)
    for body, secret in ((one.body + b" ", made.signing_secret), (one.body, other.signing_secret)):
        with pytest.raises(openai.InvalidWebhookSignatureError):
            client.webhooks.verify_signature(body, one.headers, secret=secret)


def test_after_a_rotation_the_new_secret_signs_and_the_old_one_only_if_it_is_kept(gateway, client, receiver):
    made = hook(client, receiver.url)
    kept = client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    assert kept.signing_secret not in ("", made.signing_secret)
    client.webhooks.test(made.id, event_type="batch.completed")
    last = client.webhooks.rotate_secret(made.id)
    client.webhooks.test(made.id, event_type="batch.completed")

    def verifies(number: int, secret: str) -> bool:
        one = receiver.got[number]
        try:
            client.webhooks.verify_signature(one.body, one.headers, secret=secret)
        except openai.InvalidWebhookSignatureError:
            return False
        return True

    secrets = [made.signing_secret, kept.signing_secret, last.signing_secret]
    assert [verifies(0, secret) for secret in secrets] == [True, True, False]
    assert [verifies(1, secret) for secret in secrets] == [False, False, True]
    client.webhooks.rotate_secret(made.id, keep_old_secret_active_for_24_hours=True)
    now = time.time()
    endpoint = gateway.store.get_webhook(made.id, "acme")
    signing = gateway.app.state.webhooks.sender.secrets.of
    assert [len(signing(endpoint, at)) for at in (now, now + DAY_S + 60)] == [2, 1]


def test_an_event_that_is_refused_is_sent_again_under_its_id_until_it_is_taken(gateway, client, receiver):
    receiver.statuses = [500, 404, 302]
    made = hook(client, receiver.url)
    cancelled(gateway)
    until(lambda: client.webhooks.retrieve(made.id).last_delivered_at)
    assert len(receiver.got) == 4
    assert len(set(receiver.ids)) == 1
    assert len({one.body for one in receiver.got}) == 1
    seen = client.webhooks.retrieve(made.id)
    assert "attempt 3 failed: it answered 302; redirects are not followed" in seen.last_error
    assert seen.last_error.startswith(receiver.ids[0])
    (delivery,) = deliveries_of(gateway)
    assert (delivery["attempts"], delivery["outcome"]) == (4, "delivered")
    text = gateway.http(gateway.key("ops", ("admin",))).get("/metrics").text
    assert 'pedro_gateway_webhook_attempts_total{outcome="delivered"} 1.0' in text
    assert 'pedro_gateway_webhook_attempts_total{outcome="failed"} 3.0' in text


def deliveries_of(gateway: Gateway) -> list[dict]:
    import sqlalchemy as sa

    from pedro.store import schema

    with gateway.store._database.reading() as connection:
        return [dict(one._mapping) for one in connection.execute(sa.select(schema.webhook_deliveries))]


def test_after_a_day_an_event_is_given_up_and_the_endpoint_says_so(gateway, client, receiver):
    made = hook(client, receiver.url)
    receiver.statuses = [503] * 9
    gateway.app.state.webhooks.clock = lambda: time.time() + DAY_S + 60.0
    cancelled(gateway)
    until(lambda: client.webhooks.retrieve(made.id).last_error)
    assert "given up after 1 attempts: it answered 503" in client.webhooks.retrieve(made.id).last_error
    (delivery,) = deliveries_of(gateway)
    assert (delivery["outcome"], delivery["attempts"]) == ("given_up", 1)


def test_waits_double_up_to_an_hour():
    waits = [webhook_runner.retry_after(attempts) / 0.05 for attempts in (1, 2, 3)]
    assert [round(wait) for wait in waits] == [1, 2, 4]
    assert 3240 <= webhook_runner.retry_after(40) <= 3960


def test_an_event_of_a_gateway_that_was_killed_comes_from_the_next_one(gateway, client, receiver, monkeypatch):
    runner = gateway.app.state.webhooks
    clock, runner.clock = runner.clock, lambda: 0.0  # it finds nothing due
    hook(client, receiver.url)
    cancelled(gateway)
    now = time.time()
    (held,) = gateway.store.lease_deliveries("killed", now, now + 3600.0, 4, 64)
    looks, lease = [], runner._store.lease_deliveries
    monkeypatch.setattr(runner._store, "lease_deliveries", lambda *which: looks.append(lease(*which)) or looks[-1])
    runner.clock = clock
    until(lambda: len(looks) >= 3)
    assert not any(looks)
    assert receiver.got == []
    runner.clock = lambda: now + 3601.0
    until(lambda: receiver.got)
    assert receiver.ids == [held.event_id]


def test_one_tenants_endpoint_that_does_not_answer_holds_up_no_other(gateway, client, receiver):
    with receiving() as other:
        receiver.open.clear()
        hook(client, receiver.url)
        globex = gateway.client(gateway.key("globex", SCOPES))
        hook(globex, other.url)
        for _ in range(10):
            cancelled(gateway)
        until(lambda: receiver.waiting == webhook_runner.PER_TENANT)
        for _ in range(3):
            cancelled(gateway, "globex")
        until(lambda: len(other.got) == 3)
        assert receiver.waiting == receiver.most_waiting == webhook_runner.PER_TENANT
        receiver.open.set()
        until(lambda: len(receiver.got) == 10)
        assert receiver.most_waiting == webhook_runner.PER_TENANT
        assert len(set(receiver.ids)) == 10


def test_a_test_sends_a_sample_and_tells_what_was_answered(client, receiver):
    made = hook(client, receiver.url)
    receiver.statuses = [418]
    result = client.webhooks.test(made.id, event_type="batch.failed")
    assert (result.object, result.webhook_endpoint_id, result.event_type) == (
        "webhook_endpoint.test",
        made.id,
        "batch.failed",
    )
    assert (result.status_code, result.success) == (418, True)
    assert client.post(f"/webhook_endpoints/{made.id}/test", cast_to=object)["event_type"] == "ping"
    assert [json.loads(one.body)["type"] for one in receiver.got] == ["batch.failed", "ping"]
    assert client.webhooks.retrieve(made.id).updated_at == made.updated_at


def test_a_test_of_an_endpoint_that_is_away_says_so(client):
    with receiving() as gone:
        made = hook(client, gone.url)
    with pytest.raises(openai.BadRequestError, match="no connection could be made") as refused:
        client.webhooks.test(made.id, event_type="batch.failed")
    assert refused.value.code == "webhook_not_sent"


def test_another_tenants_endpoints_are_unknown_and_hear_nothing(gateway, client, receiver):
    made = hook(client, receiver.url)
    stranger = gateway.client(gateway.key("globex", SCOPES))
    unknown = "we_000000000000000000000000"
    calls = (
        lambda one: stranger.webhooks.retrieve(one),
        lambda one: stranger.webhooks.update(one, name="mine"),
        lambda one: stranger.webhooks.delete(one),
        lambda one: stranger.webhooks.rotate_secret(one),
        lambda one: stranger.webhooks.test(one, event_type="batch.failed"),
        lambda one: stranger.webhooks.list(after=one),
    )
    for call in calls:
        bodies = []
        for one in (made.id, unknown):
            with pytest.raises(openai.NotFoundError) as refused:
                call(one)
            bodies.append(json.dumps(refused.value.body).replace(one, "ID"))
        assert bodies[0] == bodies[1]
    assert stranger.webhooks.list().data == []
    cancelled(gateway, "globex")
    job_id = cancelled(gateway)
    until(lambda: receiver.got)
    assert [json.loads(one.body)["data"]["id"] for one in receiver.got] == [job_id]


BAD = [
    ({"name": ""}, "name"),
    ({"name": "a\nb"}, "name"),
    ({"name": "x" * 201}, "name"),
    ({"url": ""}, "url"),
    ({"url": "https://example.com/" + "x" * 2048}, "url"),
    ({"url": None}, "url"),
    ({"event_types": []}, "event_types"),
    ({"event_types": ["response.completed"]}, "event_types"),
    ({"event_types": ["ping"]}, "event_types"),
    ({"event_types": "batch.failed"}, "event_types"),
    ({"secret": "mine"}, "secret"),
]


@pytest.mark.parametrize(("wrong", "field"), BAD)
def test_a_field_that_is_wrong_is_named(client, receiver, wrong, field):
    asked = {"name": "hook", "url": receiver.url, "event_types": ["batch.failed"], **wrong}
    with pytest.raises(openai.BadRequestError) as refused:
        client.post("/webhook_endpoints", body=asked, cast_to=object)
    assert refused.value.param == field
    made = hook(client, receiver.url)
    if None not in wrong.values():
        with pytest.raises(openai.BadRequestError):
            client.post(f"/webhook_endpoints/{made.id}", body=wrong, cast_to=object)


def test_keys_without_the_scope_or_held_to_adapters_have_no_webhooks(gateway, client, receiver):
    made = hook(client, receiver.url)
    reader = gateway.client(gateway.key("acme", ("read",)))
    assert [one.id for one in reader.webhooks.list()] == [made.id]
    for call in (lambda: hook(reader, receiver.url), lambda: reader.webhooks.delete(made.id)):
        with pytest.raises(openai.PermissionDeniedError):
            call()
    with pytest.raises(openai.PermissionDeniedError):
        gateway.client(gateway.key("acme", ("infer",))).webhooks.list()
    fill(gateway.store, 1, "acme.support")
    held = gateway.client(gateway.store.create_key("acme", SCOPES, adapters=["support"])[1])
    with pytest.raises(openai.PermissionDeniedError, match="restricted to some adapters"):
        held.webhooks.list()


def test_a_server_without_a_key_file_says_so(tmp_path):
    with serve(tmp_path) as plain:
        client = plain.client(plain.key("acme", SCOPES))
        with pytest.raises(openai.InternalServerError, match="no key for webhook secrets") as refused:
            client.webhooks.list()
    assert refused.value.code == "webhook_key_file"


def test_a_key_file_that_holds_no_key_is_told_to_the_operator_alone(gateway, client, receiver, tmp_path, caplog):
    made = hook(client, receiver.url)
    (tmp_path / "webhook.key").write_text("short")
    with (
        caplog.at_level(logging.ERROR, "pedro.gateway"),
        pytest.raises(openai.InternalServerError, match="no key for webhook secrets") as refused,
    ):
        hook(client, receiver.url)
    assert str(tmp_path) not in str(refused.value.body)
    assert str(tmp_path) in caplog.text
    cancelled(gateway)
    until(lambda: client.webhooks.retrieve(made.id).last_error)
    assert "no key for webhook secrets" in client.webhooks.retrieve(made.id).last_error
    assert receiver.got == []


def test_no_secret_and_no_path_of_a_url_is_in_the_database_audit_or_log(gateway, client, receiver, tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        made = hook(client, f"{receiver.url}/token-of-mine")
        rotated = client.webhooks.rotate_secret(made.id)
        cancelled(gateway)
        until(lambda: receiver.got)
    logged = [
        one.getMessage() for one in caplog.records if one.name != "openai._base_client" and "openai" not in one.name
    ]
    held = b"".join(path.read_bytes() for path in tmp_path.glob("pedro.db*"))
    for secret in (made.signing_secret, rotated.signing_secret):
        assert secret.encode() not in held
        assert secret.removeprefix("whsec_").encode() not in held
        assert secret not in "\n".join(logged)
    assert "token-of-mine" not in "\n".join(logged)
    assert "token-of-mine" not in repr(last_audit(gateway.store, "acme"))
    assert (tmp_path / "webhook.key").stat().st_mode & 0o777 == 0o600
