"""Keys and jobs are kept, frozen, and safe with many threads and processes at once: on sqlite and on PostgreSQL."""

from __future__ import annotations

import pickle
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest
from store_moves import fill

from pedro.errors import AuthenticationError, ConfigError, ConflictError, NotFoundError, PedroError, UnavailableError
from pedro.store import JobStatus, Quota, Store
from pedro.store.database import Database
from pedro.store.migrate import current


@pytest.fixture
def sqlite_url(tmp_path) -> str:
    return f"sqlite:///{tmp_path}/deep/er/pedro.db"


def test_a_key_authenticates_with_its_secret_and_nothing_else(store):
    record, secret = store.create_key("acme", ["train", "infer"], "ci")
    assert secret.startswith("sk-pedro-")
    assert store.authenticate(secret) == (record, Quota())
    assert (record.tenant, record.name, record.scopes) == ("acme", "ci", ("infer", "train"))
    for wrong in ("", "sk-pedro-", secret[:-1], secret + "x", secret.upper(), record.id):
        with pytest.raises(AuthenticationError):
            store.authenticate(wrong)


@pytest.mark.parametrize("look", ["get_job", "get_batch", "get_webhook", "get_file"])
def test_an_id_with_a_null_character_is_an_error_of_who_names_it(store, look):
    """PostgreSQL takes no such text, so it cannot answer that there is none."""
    with pytest.raises(PedroError) as caught:
        getattr(store, look)("a\0b", "acme")
    assert caught.value.status in (400, 404)
    assert not isinstance(caught.value, UnavailableError)


def test_the_secret_is_nowhere_in_the_database(sqlite_url, tmp_path):
    store = Store(sqlite_url)
    _, secret = store.create_key("acme")
    store.close()
    for file in (tmp_path / "deep" / "er").iterdir():
        assert secret.removeprefix("sk-pedro-").encode() not in file.read_bytes()


def test_a_revoked_key_is_refused_at_once_and_stays_listed(url, store):
    other_process = Store(url)
    record, secret = store.create_key("acme")
    other_process.authenticate(secret)
    first = store.revoke_key(record.id)
    with pytest.raises(AuthenticationError):
        other_process.authenticate(secret)
    assert first.revoked is not None
    assert store.revoke_key(record.id) == first
    assert store.list_keys("acme") == [first]
    other_process.close()


def test_keys_are_listed_by_tenant(store):
    acme, globex = store.create_key("acme")[0], store.create_key("globex")[0]
    assert store.list_keys("acme") == [acme]
    assert store.list_keys() == [acme, globex]


def test_revoking_an_unknown_key_is_told(store):
    with pytest.raises(NotFoundError, match="key_x"):
        store.revoke_key("key_x")


@pytest.mark.parametrize("scopes", [[], ["root"], ["infer", "root"]])
def test_scopes_must_be_known(store, scopes):
    with pytest.raises(ConfigError, match="scopes"):
        store.create_key("acme", scopes)


@pytest.mark.parametrize("tenant", ["", "*", "Acme", "a.b"])
def test_a_key_needs_a_proper_tenant(store, tenant):
    with pytest.raises(ConfigError, match="tenant"):
        store.create_key(tenant)


def test_a_quota_set_for_a_tenant_or_a_key_comes_with_the_next_authentication(url, store):
    record, secret = store.create_key("acme")
    other = store.create_key("globex")[1]
    Store(url).set_quota(tenant="acme", requests_per_minute=60, tokens_per_minute=9000)
    assert store.set_quota(key_id=record.id, requests_per_minute=5) == Quota(5, None)
    key, of_tenant = store.authenticate(secret)
    assert (key.quota, of_tenant) == (Quota(5, None), Quota(60, 9000))
    assert store.list_keys("acme") == [key]
    assert store.authenticate(other) == (store.list_keys("globex")[0], Quota())
    assert store.list_quotas() == {"acme": Quota(60, 9000), "globex": Quota()}


def test_a_key_may_be_made_with_a_quota_of_its_own(store):
    record, secret = store.create_key("acme", quota=Quota(5, 100))
    assert store.authenticate(secret) == (record, Quota())
    assert record.quota == Quota(5, 100)
    with pytest.raises(ConfigError, match="tokens_per_minute"):
        store.create_key("acme", quota=Quota(5, -1))


def test_budgets_of_a_day_and_a_month_are_kept_beside_the_limits_of_a_minute(store):
    _, secret = store.create_key("acme")
    assert store.set_quota(tenant="acme", requests_per_day=7, tokens_per_month=10**13) == Quota(
        requests_per_day=7, tokens_per_month=10**13
    )
    assert store.set_quota(tenant="acme", requests_per_day=0, tokens_per_minute=5).tokens_per_month == 10**13
    assert store.authenticate(secret)[1] == Quota(tokens_per_minute=5, tokens_per_month=10**13)
    with pytest.raises(ConfigError, match="tokens_per_day"):
        store.set_quota(tenant="acme", tokens_per_day=10**15)


def test_a_key_ends_when_its_time_is_over(store, monkeypatch):
    now = time.time()
    record, secret = store.create_key("acme", expires=now + 3600)
    assert store.authenticate(secret)[0] == store.get_key(record.id) == record
    monkeypatch.setattr(time, "time", lambda: now + 3600)
    with pytest.raises(AuthenticationError):
        store.authenticate(secret)
    assert store.list_keys("acme")[0].state(now + 3600) == "expired"
    with pytest.raises(ConfigError, match="expires"):
        store.create_key("acme", expires=now + 3600)
    with pytest.raises(ConflictError, match="expired"):
        store.rotate_key(record.id, 0)


def test_a_key_may_name_only_adapters_of_its_tenant_that_are_there(store):
    for name in ("acme.faq", "acme.tone", "globex.faq2"):
        fill(store, 1, name)
    record, secret = store.create_key("acme", adapters=["tone", "acme.faq", "faq"])
    assert store.authenticate(secret)[0].adapters == record.adapters == ("tone", "faq")
    for wrong in (["faq2"], ["globex.faq2"], [], ["faq", "x\x1b"]):
        with pytest.raises(ConfigError, match=r"^adapters: .*"):
            store.create_key("acme", adapters=wrong)
    with pytest.raises(ConfigError, match="admin"):
        store.create_key("acme", ["admin"], adapters=["faq"])


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "a\u202eb", "x" * 201])
def test_a_keys_name_is_one_line_that_can_be_printed(store, name):
    with pytest.raises(ConfigError, match="name: expected at most 200 printable characters"):
        store.create_key("acme", name=name)


def test_a_rotated_key_hands_its_rights_on_and_ends_after_the_overlap(store, monkeypatch):
    now = time.time()
    fill(store, 1, "acme.faq")
    old, old_secret = store.create_key(
        "acme", ["infer", "read"], "web", Quota(5, 6, 7, 8, 9, 10), expires=now + 90 * 86_400, adapters=["faq"]
    )
    new, secret = store.rotate_key(old.id, 3600)
    assert (new.tenant, new.name, new.scopes, new.quota, new.adapters) == (
        old.tenant,
        old.name,
        old.scopes,
        old.quota,
        old.adapters,
    )
    assert new.replaces == old.id
    assert new.expires - new.created == pytest.approx(old.expires - old.created)
    assert store.authenticate(secret)[0] == store.get_key(new.id) == new
    assert store.authenticate(old_secret)[0].expires == pytest.approx(now + 3600, abs=60)
    with pytest.raises(ConflictError, match=new.id):
        store.rotate_key(old.id, 3600)
    newest, _ = store.rotate_key(new.id, 0)  # of a key that came of a rotation: as of any other
    with pytest.raises(AuthenticationError):
        store.authenticate(secret)
    store.revoke_key(newest.id)
    with pytest.raises(ConflictError, match="revoked"):
        store.rotate_key(newest.id, 0)
    monkeypatch.setattr(time, "time", lambda: now + 2 * 3600)
    with pytest.raises(AuthenticationError):
        store.authenticate(old_secret)
    with pytest.raises(NotFoundError):
        store.rotate_key("key_none", 0)
    with pytest.raises(ConfigError, match="overlap"):
        store.rotate_key(new.id, -1)


def test_of_rotations_that_race_one_makes_a_key(url, store):
    record, _ = store.create_key("acme")
    stores = [Store(url) for _ in range(4)]

    def rotate(at: Store) -> bool:
        try:
            return bool(at.rotate_key(record.id, 60))
        except ConflictError:
            return False

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(rotate, stores * 2)) == 1
    assert [key.replaces for key in store.list_keys("acme")] == [None, record.id]
    for at in stores:
        at.close()


def test_a_key_whose_successor_was_revoked_can_be_rotated_again(store):
    record, _ = store.create_key("acme")
    lost, _ = store.rotate_key(record.id, 3600)
    store.revoke_key(lost.id)
    again, _ = store.rotate_key(record.id, 3600)
    assert (again.replaces, again.expires) == (record.id, None)


def test_that_a_key_was_used_is_written_once_a_minute_whoever_saw_it(url, store):
    one, two = store.create_key("acme")[0], store.create_key("acme")[0]
    store.mark_used({one.id: 1000.0, "key_gone": 1000.0})
    Store(url).mark_used({one.id: 1059.0, two.id: 1059.0})
    Store(url).mark_used({one.id: 900.0})
    assert [key.last_used for key in store.list_keys("acme")] == [1000.0, 1059.0]
    store.mark_used({key.id: 1060.0 for key in (one, two)})
    assert [key.last_used for key in store.list_keys("acme")] == [1060.0, 1059.0]
    before = store.position()
    store.mark_used({two.id: 2000.0})
    assert store.position() == before  # nothing that gateways must hear of


def test_asking_for_a_quota_sets_none(store):
    assert store.set_quota(tenant="nobody") == Quota()
    assert store.list_quotas() == {}


def test_one_limit_of_a_quota_can_change_or_go_without_the_other(store):
    store.set_quota(tenant="acme", requests_per_minute=60, tokens_per_minute=9000)
    assert store.set_quota(tenant="acme", tokens_per_minute=100) == Quota(60, 100)
    assert store.set_quota(tenant="acme", requests_per_minute=0) == Quota(None, 100)


@pytest.mark.parametrize("limits", [{"requests_per_minute": -1}, {"tokens_per_minute": 10**9 + 1}])
def test_a_limit_that_makes_no_sense_is_refused_by_name(store, limits):
    with pytest.raises(ConfigError, match=next(iter(limits))):
        store.set_quota(tenant="acme", **limits)
    with pytest.raises(NotFoundError, match="key_none"):
        store.set_quota(key_id="key_none", requests_per_minute=1)
    with pytest.raises(ConfigError, match="tenant"):
        store.set_quota(tenant="A B", requests_per_minute=1)


def test_a_job_lives_from_queued_to_its_end(store):
    job = store.create_job("acme", "support", {"training": {"lr": 0.1}})
    assert (job.status, job.finished, job.result) == (JobStatus.QUEUED, None, None)
    store.update_job(job.id, submission_id="raysubmit_1")
    store.update_job(job.id, status="running", message="step 1")
    done = store.update_job(job.id, status=JobStatus.SUCCEEDED, result={"model": "acme.support:1"})
    assert done.finished >= job.created
    assert (done.submission_id, done.message, done.spec) == ("raysubmit_1", "step 1", {"training": {"lr": 0.1}})
    assert store.get_job(job.id) == done


def test_an_ended_job_stays_ended_and_keeps_its_time(store):
    job = store.create_job("acme", "support", {})
    ended = store.update_job(job.id, status="cancelled")
    with pytest.raises(ConflictError, match="cancelled"):
        store.update_job(job.id, status="running")
    time.sleep(0.01)
    assert store.update_job(job.id, status="cancelled", message="by the user").finished == ended.finished


def test_an_unknown_status_is_told_and_not_kept(store):
    job = store.create_job("acme", "support", {})
    with pytest.raises(ConfigError, match="status"):
        store.update_job(job.id, status="done")


def test_a_foreign_job_reads_like_an_unknown_one(store):
    job = store.create_job("acme", "support", {})
    messages = []
    for job_id in (job.id, "ftjob-nope"):
        with pytest.raises(NotFoundError) as caught:
            store.get_job(job_id, tenant="globex")
        messages.append(caught.value.message.replace(job_id, "ID"))
    assert messages[0] == messages[1]
    assert store.get_job(job.id, tenant="acme") == job


def test_updating_an_unknown_job_is_told(store):
    with pytest.raises(NotFoundError):
        store.update_job("ftjob-nope", status="running")


def test_jobs_are_listed_newest_first_by_tenant_and_status(store):
    first = store.create_job("acme", "a", {})
    second = store.create_job("acme", "b", {})
    store.create_job("globex", "c", {})
    assert [job.id for job in store.list_jobs("acme")] == [second.id, first.id]
    assert [job.id for job in store.list_jobs(limit=1)] == [store.list_jobs()[0].id]
    running = store.update_job(first.id, status="running")
    assert store.list_jobs(status="running") == [running]


def test_jobs_are_paged_counted_and_found_by_when_they_ended(store):
    jobs = [store.create_job("acme", "support", {}, f"job-{number}") for number in range(5)]
    other = store.create_job("globex", "tone", {})
    newest_first = [other.id, *(job.id for job in reversed(jobs))]
    pages = [store.list_jobs(limit=4), store.list_jobs(limit=4, offset=4), store.list_jobs(limit=4, offset=8)]
    assert [[job.id for job in page] for page in pages] == [newest_first[:4], newest_first[4:], []]
    store.update_job(jobs[0].id, status="running")
    ended = store.update_job(jobs[1].id, status="cancelled")
    assert store.count_jobs() == {
        ("acme", "queued"): 3,
        ("acme", "running"): 1,
        ("acme", "cancelled"): 1,
        ("globex", "queued"): 1,
    }
    assert store.list_jobs(ended_since=ended.created) == [ended]
    assert store.list_jobs(ended_since=ended.finished + 1) == []
    assert store.count_jobs("acme", adapter="support") == {
        ("acme", "queued"): 3,
        ("acme", "running"): 1,
        ("acme", "cancelled"): 1,
    }
    assert store.count_jobs("acme", adapter="tone") == {}
    assert [job.id for job in store.list_jobs(adapter="tone")] == [other.id]
    assert store.list_trained() == [("acme", "support"), ("globex", "tone")]


def test_records_cannot_be_changed(store):
    record, _ = store.create_key("acme")
    with pytest.raises(FrozenInstanceError):
        record.tenant = "globex"


def test_a_store_travels_between_processes(store):
    _, secret = store.create_key("acme")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.authenticate(secret)[0].tenant == "acme"
    copy.close()


def test_of_many_that_race_to_end_a_job_one_wins(store):
    job = store.create_job("acme", "support", {})

    def end(status: str) -> bool:
        try:
            store.update_job(job.id, status=status)
        except ConflictError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        wins = list(pool.map(end, ["failed", "cancelled"] * 8))
    assert any(wins)
    final = store.get_job(job.id).status.value
    assert all(won == (status == final) for won, status in zip(wins, ["failed", "cancelled"] * 8, strict=True))


WRITERS = """
import os, sys
from pedro.store import Store
for _ in range(2):
    os.fork()  # four processes, which imported it once
store = Store(sys.argv[1])
for number in range(25):
    job = store.create_job("acme", f"a{number}", {})
    store.update_job(job.id, status="running")
    store.create_key("acme")
    store.list_jobs("acme", limit=5)
"""


def test_processes_create_and_write_one_database_at_once(url):
    told = subprocess.run([sys.executable, "-c", WRITERS, url], stderr=subprocess.PIPE, timeout=90).stderr
    assert told == b"", "until the last of them has ended"
    store = Store(url)
    assert len(store.list_jobs(status="running")) == len(store.list_keys()) == 100
    store.close()


def test_readers_do_not_wait_for_a_writer(sqlite_url):
    store = Store(sqlite_url)
    _, secret = store.create_key("acme")
    writer = sqlite3.connect(sqlite_url.removeprefix("sqlite:///"))
    writer.execute("BEGIN IMMEDIATE")
    store.authenticate(secret)
    assert writer.in_transaction
    writer.close()
    store.close()


@pytest.mark.parametrize("bad", ["", "nonsense", "mysql://h/d", "sqlite://", "sqlite:///:memory:", "postgresql://[::1"])
def test_a_url_that_cannot_be_used_is_told(bad):
    with pytest.raises(ConfigError, match="database_url"):
        Store(bad)


def test_a_database_that_cannot_be_opened_is_told_without_the_password(tmp_path):
    (tmp_path / "pedro.db").mkdir()
    with pytest.raises(UnavailableError, match=r"pedro\.db"):
        Store(f"sqlite:///{tmp_path}/pedro.db")
    with pytest.raises(PedroError) as caught:
        Store("postgresql://user:hunter2@127.0.0.1:1/pedro")
    assert "hunter2" not in caught.value.message


def test_a_database_that_is_damaged_while_it_is_open_is_away_for_its_callers_and_told_in_the_log(sqlite_url, caplog):
    store = Store(sqlite_url)
    for _ in range(200):
        store.create_key("acme")
    path = Path(sqlite_url.removeprefix("sqlite:///"))
    with closing(sqlite3.connect(path)) as link:
        link.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    store._database.close()  # its pages are not kept in memory
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xff" * (path.stat().st_size - 4096))
    with pytest.raises(UnavailableError, match="does not answer"):
        store.list_keys()
    assert "is damaged" in caplog.text
    store.close()


@pytest.mark.parametrize("secret", ["password", "sslpassword"])
def test_a_password_in_the_query_of_a_url_is_not_shown(secret):
    shown = Database(f"postgresql://pedro@127.0.0.1:1/pedro?{secret}=geheim&sslmode=disable").shown
    assert "geheim" not in shown
    assert "sslmode=disable" in shown


def test_a_folder_that_cannot_be_made_is_told_by_its_path(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file/deep/pedro.db cannot be written \(Not a directory\)"):
        Store(f"sqlite:///{tmp_path}/file/deep/pedro.db")


def test_asking_where_the_schema_stands_makes_nothing(tmp_path):
    assert current(Database(f"sqlite:///{tmp_path}/new/pedro.db")) is None
    assert not (tmp_path / "new").exists()
