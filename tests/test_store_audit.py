"""The audit: who did what is entered with the change, found by what people ask, and holds no secret."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
from audit_entries import last_audit
from cli_commands import command_runner
from store_moves import fill

from pedro.errors import ConflictError
from pedro.store import PLATFORM, Actor, AuditQuery, Quota, Store, hash_secret


@pytest.fixture
def pedro(tmp_path, monkeypatch, capfd):
    for name in ("MLFLOW_TRACKING_URI", "PEDRO_DATABASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path))
    return command_runner(monkeypatch, capfd)


def test_every_change_of_a_key_or_a_quota_is_one_entry_that_says_who_and_how_it_was_and_is(store):
    ops = Actor.of_key("ops", "key_1", "req_1")
    key, secret = store.create_key("acme", ["infer"], "web", Quota(5), expires=time.time() + 60, actor=ops)
    new, new_secret = store.rotate_key(key.id, 30, actor=ops)
    store.revoke_key(new.id, actor=ops), store.revoke_key(new.id)
    store.set_quota(tenant="acme", tokens_per_day=7, actor=ops), store.set_quota(tenant="acme", tokens_per_day=7)
    entries = list(reversed(last_audit(store)))
    assert [(entry.action, entry.subject) for entry in entries] == [
        ("key.create", key.id),
        ("key.create", new.id),
        ("key.rotate", key.id),
        ("key.revoke", new.id),
        ("quota.set", "tenant:acme"),
    ]
    assert {(entry.tenant, entry.actor, entry.request_id) for entry in entries} == {("acme", "key:ops/key_1", "req_1")}
    assert entries[0].after == {"name": "web", "scopes": ["infer"], "quota": {"requests_per_minute": 5}} | {
        "expires": key.expires
    }
    assert entries[2].before == {"expires": key.expires}
    assert entries[2].after == {"expires": store.get_key(key.id).expires, "replaced_by": new.id}
    assert (entries[4].before, entries[4].after) == ({}, {"tokens_per_day": 7})
    text = json.dumps([entry.__dict__ for entry in entries])
    for hidden in (secret, new_secret, hash_secret(secret), hash_secret(new_secret)):
        assert hidden not in text


def test_a_change_that_fails_leaves_no_entry_and_no_change(store):
    fill(store, 1, "acme.faq")
    store.promote("acme.faq", 1, actor="one")
    with pytest.raises(ConflictError):
        store.delete_version("acme.faq", 1)
    key, _ = store.create_key("acme")
    store.rotate_key(key.id, 60)
    before = last_audit(store)
    with pytest.raises(ConflictError):
        store.rotate_key(key.id, 60)
    assert last_audit(store) == before


def test_what_is_done_outside_of_the_database_is_entered_too_by_who_runs_the_process(store):
    store.audit("backup.create", PLATFORM, "/srv/backup.tar", after={"bytes": 5})
    (entry,) = last_audit(store)
    assert (entry.tenant, entry.action, entry.after) == (PLATFORM, "backup.create", {"bytes": 5})
    assert entry.actor.startswith("user:")
    assert entry.request_id is None
    assert last_audit(store, "acme") == []


def test_pedro_audit_shows_asks_and_follows(pedro, monkeypatch, tmp_path):
    store = Store(f"sqlite:///{tmp_path}/pedro.db")
    key, _ = store.create_key("acme", name="web", actor=Actor.of_key("ops", "key_ops", "req_7"))
    fill(store, 2, "acme.faq")
    store.promote("acme.faq", 1, actor="user:ann"), store.promote("acme.faq", 2, actor="user:bob")
    status, out, _ = pedro("audit")
    assert status == 0
    assert out.index("key.create") < out.index("user:ann") < out.index("user:bob")
    for shown in ("key:ops/key_ops", "req_7", "name: web", "aliases.champion: 1 → 2", "aliases.previous: - → 1"):
        assert shown in out.replace("\n", " ")
    for words, actions in (
        (("--action", "key"), ["key.create"]),
        (("--actor", "key_ops"), ["key.create"]),
        (("--actor", "user:bob"), ["adapter.promote"]),
        (("--tenant", "globex"), []),
        (("--since", "1h", "--limit", "1"), ["adapter.promote"]),
        (("--since", "2999-01-01"), []),
    ):
        status, out, _ = pedro("audit", *words, "--json")
        assert (status, [entry["action"] for entry in json.loads(out)]) == (0, actions)
    status, _, err = pedro("audit", "--since", "soon")
    assert (status, err.count("\n"), "'soon'" in err) == (1, 1, True)
    sleeps = []

    def sleep(_):
        if len(sleeps) == 1:
            raise KeyboardInterrupt
        sleeps.append(store.revoke_key(key.id))

    own = SimpleNamespace(sleep=sleep, strftime=time.strftime, gmtime=time.gmtime)  # other threads sleep as they did
    monkeypatch.setattr("pedro.cli.audit.time", own)
    status, out, _ = pedro("audit", "--follow", "--tenant", "acme", "--limit", 1)
    assert (status, len(out.splitlines())) == (130, 2)
    assert "key.revoke" in out.splitlines()[1]


def test_a_long_request_id_or_subject_is_cut_rather_than_refused(store):
    store.audit("home.gc", PLATFORM, "s" * 500, actor=Actor("user:a", "r" * 128))
    (entry,) = last_audit(store)
    assert (len(entry.subject), len(entry.request_id)) == (200, 100)


def test_the_audit_is_asked_by_tenant_kind_actor_subject_and_time_and_paged_by_id(store):
    for number, (tenant, action, actor, subject) in enumerate(
        [
            ("acme", "key.create", Actor.of_key("acme", "key_1", "r"), "key_2"),
            ("acme", "key.revoke", "user:ann", "key_2"),
            ("globex", "keys.other", "user:ann", "key_3"),
            ("globex", "adapter.promote", Actor.of_key("globex", "xkey_1", "r"), "globex.faq"),
        ]
    ):
        store.audit(action, tenant, subject, actor=actor, after={"number": number})

    def asked(limit=100, **query) -> list[int]:
        return [entry.after["number"] for entry in store.find_audit(AuditQuery(**query), limit)]

    assert asked() == [3, 2, 1, 0]
    assert asked(tenants=("acme",)) == [1, 0]
    assert asked(actions=("key",)) == [1, 0]
    assert asked(actions=("key.create", "adapter")) == [3, 0]
    assert asked(actions=("k_y", "%")) == []
    assert asked(actors=("key_1",)) == [0]
    assert asked(actors=("user:ann",)) == [2, 1]
    assert asked(subjects=("key_2",), actors=("user:ann",)) == [1]
    entries = store.find_audit(AuditQuery())
    assert asked(since=entries[1].at, until=entries[0].at) == [2]
    assert asked(2) == [3, 2]
    assert asked(2, before=entries[1].public_id) == [1, 0]
    assert asked(2, above=entries[3].id) == [1, 2]
