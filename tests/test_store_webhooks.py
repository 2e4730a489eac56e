"""Webhooks in the store, on sqlite and on PostgreSQL: an event is there if its change is; one holds it at a time."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
from audit_entries import last_audit
from store_moves import fill
from webhook_stubs import MADE as NOW
from webhook_stubs import stub_endpoint

from pedro.errors import ConflictError, NotFoundError, PedroError
from pedro.store import (
    EVENT_TYPES,
    MAX_ENDPOINTS,
    MAX_WAITING,
    BatchRecord,
    BatchStatus,
    JobStatus,
    SecretSource,
    Store,
    WebhookDelivery,
    WebhookEndpoint,
)


def endpoint(store: Store, name: str, tenant: str = "acme", event_types=EVENT_TYPES) -> WebhookEndpoint:
    made = stub_endpoint(name, tenant, event_types)
    store.create_webhook(made)
    return made


def due(
    store: Store, owner: str = "a", now: float = NOW, most: int = 99, per_tenant: int = 99
) -> list[WebhookDelivery]:
    return store.lease_deliveries(owner, now, now + 60.0, per_tenant, most)


def told(store: Store) -> list[tuple[str, dict]]:
    """The events that wait, by type and data."""
    return [(one.type, json.loads(one.body)["data"]) for one in due(store)]


def job(store: Store, tenant: str = "acme") -> str:
    return store.create_job(tenant, "support", {}, queued=True).id


def batch(store: Store, batch_id: str = "batch_1") -> BatchRecord:
    made = BatchRecord(
        batch_id, "acme", "key_1", "/v1/completions", "file-0", "24h", BatchStatus.VALIDATING, NOW, NOW + 100.0
    )
    store.create_batch(made, 1000)
    return made


@pytest.mark.parametrize("status", [JobStatus.SUCCEEDED, JobStatus.FAILED, JobStatus.CANCELLED])
def test_the_end_of_a_job_is_told_once_however_often_it_is_entered(store, status):
    endpoint(store, "hook")
    job_id = job(store)
    store.update_job(job_id, status=JobStatus.RUNNING)
    assert told(store) == []
    store.update_job(job_id, status=status)
    store.update_job(job_id, status=status, message="again")
    with pytest.raises(ConflictError):
        store.update_job(job_id, status=JobStatus.RUNNING)
    (event,) = due(store)
    body = json.loads(event.body)
    assert (event.type, body["type"]) == (f"fine_tuning.job.{status}",) * 2
    assert (body["object"], body["id"], body["data"]) == ("event", event.event_id, {"id": job_id})
    assert set(body) == {"id", "object", "created_at", "type", "data"}


def test_a_job_that_is_cancelled_while_it_waits_or_whose_controller_ends_it_is_told(store):
    endpoint(store, "hook")
    waiting, lost = job(store), job(store)
    store.ask_of_job(waiting, JobStatus.CANCELLED)
    store.ask_of_job(waiting, JobStatus.CANCELLED)
    (held,) = store.lease_jobs("controller", 1.0, NOW).jobs
    assert held.id == lost
    assert store.end_job(held, JobStatus.FAILED, "gone")
    assert not store.end_job(held, JobStatus.FAILED, "gone")
    assert told(store) == [
        ("fine_tuning.job.cancelled", {"id": waiting}),
        ("fine_tuning.job.failed", {"id": lost}),
    ]


def test_a_pause_is_no_end(store):
    endpoint(store, "hook")
    store.ask_of_job(job(store), JobStatus.PAUSED)
    job(store)
    (held,) = store.lease_jobs("controller", 1.0, NOW).jobs
    assert store.end_job(held, JobStatus.PAUSED)
    assert told(store) == []


@pytest.mark.parametrize("status", [s for s in BatchStatus if s.final])
def test_the_end_of_a_batch_is_told(store, status):
    endpoint(store, "hook")
    batch(store)
    (held,) = store.lease_batches("a", 1.0, 11.0, 1.0, 9)
    store.begin_batch(held, 1, 2.0)
    assert told(store) == []
    assert store.end_batch(held, status, 3.0)
    assert not store.end_batch(held, status, 3.0)
    assert told(store) == [(f"batch.{status}", {"id": "batch_1"})]


def test_each_alias_that_moves_is_told_with_the_version_that_it_means(store):
    fill(store, 3)
    endpoint(store, "hook")
    store.promote("acme.raced", 1)
    store.promote("acme.raced", 2)
    store.promote("acme.raced", 2)  # no alias moves
    store.delete_adapter("acme.raced")

    def moved(alias: str, version: int | None) -> tuple[str, dict]:
        return "adapter.alias.moved", {"adapter": "acme.raced", "alias": alias, "version": version}

    assert told(store) == [
        moved("champion", 1),
        moved("champion", 2),
        moved("previous", 1),
        moved("champion", None),
        moved("previous", None),
    ]


def test_a_canary_s_start_change_withdrawal_and_end_are_told(store):
    fill(store, 4)
    store.promote("acme.raced", 1)
    endpoint(store, "hook")

    def canary(what: str, version: int, **data: object) -> tuple[str, dict]:
        return f"adapter.canary.{what}", {"adapter": "acme.raced", "version": version, **data}

    store.set_canary("acme.raced", 2, 0.1)
    store.set_canary("acme.raced", 2, 0.1)  # nothing changes
    store.set_canary("acme.raced", 2, 0.5)
    store.set_canary("acme.raced", 3, 0.5)
    here = store.get_adapter("acme.raced").generation
    assert not store.withdraw_canary("acme.raced", 3, "worse", generation=here - 1)
    assert store.withdraw_canary("acme.raced", 3, "worse", generation=here)
    store.set_canary("acme.raced", 4, 0.2)
    store.set_canary("acme.raced", 4, 0.0)
    assert told(store) == [
        canary("started", 2, weight=0.1),
        canary("changed", 2, weight=0.5),
        canary("ended", 2),
        canary("started", 3, weight=0.5),
        canary("withdrawn", 3, reason="worse"),
        canary("started", 4, weight=0.2),
        canary("ended", 4),
    ]


@pytest.mark.parametrize("move", ["promote", "rollback", "delete_version", "delete_adapter"])
def test_a_canary_that_ends_with_a_move_is_told_beside_its_aliases(store, move):
    fill(store, 3)
    for version in (1, 2):
        store.promote("acme.raced", version)
    store.set_canary("acme.raced", 3, 0.1)
    endpoint(store, "canaries", event_types=[kind for kind in EVENT_TYPES if "canary" in kind])
    getattr(store, move)("acme.raced", *([3] if move in ("promote", "delete_version") else []))
    assert told(store) == [("adapter.canary.ended", {"adapter": "acme.raced", "version": 3})]


def test_a_move_that_is_refused_tells_nothing(store):
    fill(store, 2)
    endpoint(store, "hook")
    store.promote("acme.raced", 1)
    due(store)
    with pytest.raises(ConflictError):
        store.promote("acme.raced", 2, expected=7)
    with pytest.raises(ConflictError):
        store.delete_version("acme.raced", 1)
    assert due(store, "b") == []


def test_an_event_goes_to_each_endpoint_of_its_tenant_that_asks_for_its_type_under_one_id(store):
    endpoint(store, "all")
    endpoint(store, "jobs", event_types=["fine_tuning.job.succeeded"])
    endpoint(store, "batches", event_types=["batch.completed"])
    endpoint(store, "foreign", tenant="globex")
    job_id = job(store)
    store.update_job(job_id, status=JobStatus.RUNNING)
    store.update_job(job_id, status=JobStatus.SUCCEEDED)
    found = due(store)
    assert sorted(one.endpoint.name for one in found) == ["all", "jobs"]
    assert len({one.event_id for one in found}) == 1
    assert {one.endpoint.url for one in found} == {"https://example.com/secret-path"}


ENDS = """
import os, signal, sys
from pedro.store import Store, schema, webhook_outbox, jobs
url, job_id, when = sys.argv[1:]
store = Store(url)
entered = jobs.enter_job_end
def kill(*arguments):
    entered(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
if when == "before the commit":
    jobs.enter_job_end = kill
store.update_job(job_id, status="succeeded")
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("when", ["before the commit", "after the commit"])
def test_whoever_is_killed_beside_the_commit_leaves_both_the_change_and_its_event_or_neither(store, url, when):
    endpoint(store, "hook")
    job_id = job(store)
    store.update_job(job_id, status=JobStatus.RUNNING)
    ended = subprocess.run(
        [sys.executable, "-c", ENDS, url, job_id, when], env={**os.environ}, timeout=120, check=False
    )
    assert ended.returncode == -signal.SIGKILL
    if when == "before the commit":
        assert (store.get_job(job_id).status, told(store)) == ("running", [])
    else:
        assert (store.get_job(job_id).status, told(store)) == (
            "succeeded",
            [("fine_tuning.job.succeeded", {"id": job_id})],
        )


def test_one_holds_an_event_until_its_lease_is_over_and_then_enters_nothing_any_more(store):
    endpoint(store, "hook")
    store.ask_of_job(job(store), JobStatus.CANCELLED)
    (first,) = due(store, "a", NOW)
    assert due(store, "b", NOW + 59.0) == []
    (second,) = due(store, "b", NOW + 61.0)
    assert (second.event_id, second.fence) == (first.event_id, first.fence + 1)
    assert not store.webhook_delivered(first, NOW + 62.0)
    assert not store.webhook_failed(first, NOW + 62.0, "late", None)
    assert store.get_webhook("we_hook", "acme").last_error is None
    assert store.webhook_failed(second, NOW + 63.0, "refused", NOW + 70.0)
    assert due(store, "a", NOW + 69.0) == []
    (third,) = due(store, "a", NOW + 71.0)
    assert third.attempts == 1
    assert store.webhook_delivered(third, NOW + 72.0)
    assert not store.webhook_delivered(third, NOW + 72.0)
    hook = store.get_webhook("we_hook", "acme")
    assert (hook.last_failed, hook.last_error, hook.last_delivered) == (NOW + 63.0, "refused", NOW + 72.0)
    assert due(store, "b", NOW + 9999.0) == []


def test_leases_that_are_given_up_are_free_at_once(store):
    endpoint(store, "hook")
    store.ask_of_job(job(store), JobStatus.CANCELLED)
    assert len(due(store, "a")) == 1
    store.release_deliveries("a")
    assert len(due(store, "b")) == 1


def test_tenants_take_turns_and_so_do_the_endpoints_of_one(store):
    for name, tenant in (("one", "acme"), ("two", "acme"), ("other", "globex")):
        endpoint(store, name, tenant)
    for _ in range(5):
        store.ask_of_job(job(store, "acme"), JobStatus.CANCELLED)
    store.ask_of_job(job(store, "globex"), JobStatus.CANCELLED)
    assert sorted(one.endpoint.name for one in due(store, most=2)) == ["one", "other"]
    assert sorted(one.endpoint.name for one in due(store, "b", per_tenant=2)) == ["one", "two"]
    assert [one.endpoint.name for one in due(store, "a", per_tenant=2)] == ["two"]  # it holds one of acme's already
    assert due(store, "a", per_tenant=2) == []


def test_beyond_its_bound_an_event_is_not_entered_and_the_endpoint_says_so(store, monkeypatch):
    monkeypatch.setattr("pedro.store.webhook_outbox.MAX_WAITING", 2)
    endpoint(store, "hook")
    for _ in range(3):
        store.ask_of_job(job(store), JobStatus.CANCELLED)
    assert len(due(store)) == 2
    assert "2 events wait" in store.get_webhook("we_hook", "acme").last_error
    assert MAX_WAITING >= 100


def test_a_tenant_has_so_many_endpoints_and_no_more(store):
    for number in range(MAX_ENDPOINTS):
        endpoint(store, str(number))
    with pytest.raises(PedroError, match=f"{MAX_ENDPOINTS} webhook endpoints") as refused:
        endpoint(store, "more")
    assert refused.value.code == "webhook_limit_exceeded"
    endpoint(store, "foreign", "globex")
    store.delete_webhook("we_0", "acme")
    endpoint(store, "more")


def test_endpoints_of_others_are_unknown(store):
    endpoint(store, "hook")
    source = SecretSource("s", "k")
    for use in (
        lambda: store.get_webhook("we_hook", "globex"),
        lambda: store.get_webhook("we_nix\0", "acme"),
        lambda: store.list_webhooks("globex", after="we_hook"),
        lambda: store.update_webhook("we_hook", "globex", NOW, name="x"),
        lambda: store.rotate_webhook_secret("we_hook", "globex", source, "…", now=NOW),
        lambda: store.delete_webhook("we_hook", "globex"),
    ):
        with pytest.raises(NotFoundError, match="No such webhook endpoint"):
            use()
    assert store.list_webhooks("globex") == []
    assert [one.name for one in store.list_webhooks()] == ["hook"]


def test_a_change_is_entered_where_something_differs_and_the_audit_has_neither_path_nor_secret(store):
    made = endpoint(store, "hook")
    assert store.update_webhook(made.id, "acme", NOW + 1, name="hook") == made
    changed = store.update_webhook(made.id, "acme", NOW + 2, name="new", url="https://example.org/other-path")
    assert changed == replace(made, name="new", url="https://example.org/other-path", updated=NOW + 2)
    rotated = store.rotate_webhook_secret(made.id, "acme", SecretSource("t", "k"), "h", now=NOW + 3, keep_until=NOW + 9)
    assert rotated.secrets == (SecretSource("t", "k"), SecretSource("salt", "key", NOW + 9))
    again = store.rotate_webhook_secret(made.id, "acme", SecretSource("u", "k"), "h", now=NOW + 4)
    assert again.secrets == (SecretSource("u", "k"),)
    store.delete_webhook(made.id, "acme")
    entries = last_audit(store, "acme")
    assert [entry.action for entry in reversed(entries)] == [
        "webhook.create",
        "webhook.update",
        "webhook.rotate_secret",
        "webhook.rotate_secret",
        "webhook.delete",
    ]
    assert (entries[3].before["host"], entries[3].after["host"]) == ("example.com", "example.org")
    assert not any(word in repr(entries) for word in ("path", "salt"))


def test_with_an_endpoint_goes_what_was_to_be_sent_to_it(store):
    endpoint(store, "hook")
    endpoint(store, "stays")
    store.ask_of_job(job(store), JobStatus.CANCELLED)
    store.delete_webhook("we_hook", "acme")
    assert [one.endpoint.name for one in due(store)] == ["stays"]
    assert store.count_of("acme")["webhook deliveries"] == 1


def test_what_has_ended_is_forgotten_by_age_and_what_waits_is_not(store):
    endpoint(store, "hook")
    for _ in range(2):
        store.ask_of_job(job(store), JobStatus.CANCELLED)
    first, _ = due(store)
    store.webhook_delivered(first, NOW)
    assert store.count_ended_deliveries(NOW) == 0
    assert store.count_ended_deliveries(NOW + 1) == store.forget_ended_deliveries(NOW + 1) == 1
    assert store.count_of("acme")["webhook deliveries"] == 1


def test_from_the_first_moment_of_an_erasure_nothing_is_sent_and_nothing_entered(store):
    endpoint(store, "hook")
    endpoint(store, "foreign", "globex")
    store.ask_of_job(job(store), JobStatus.CANCELLED)
    running = job(store)
    (held,) = due(store, "a")
    store.begin_erasure("acme")
    assert due(store, "b", NOW + 99.0) == []
    assert not store.webhook_delivered(held, NOW)
    assert store.get_job(running).status == "cancelled"
    with pytest.raises(ConflictError, match="is being erased"):
        endpoint(store, "new")
    counts = store.count_of("acme")
    assert (counts["webhook endpoints"], counts["webhook deliveries"]) == (0, 0)
    assert [one.name for one in store.list_webhooks()] == ["foreign"]
