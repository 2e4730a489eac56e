"""Erasing a tenant: nothing of it is left in any file or table, and nothing of another one is touched."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from audit_entries import last_audit
from cli_commands import command_runner
from filelock import FileLock
from retention_home import GONE, dataset, execute, job, open_home, rows_of, tree, version, written
from webhook_stubs import stub_endpoint

from pedro.data.dataset import SOURCE
from pedro.errors import AuthenticationError, ConflictError, NotFoundError, UnavailableError
from pedro.gateway.auth import KeyCache
from pedro.retention.erasure import erase_tenant
from pedro.serving.resolver import AdapterCatalog
from pedro.store import Quota, Store, schema
from pedro.training.job_status import ClusterJobs
from pedro.training.storage import join
from pedro.training.sweep.records import SweepRecord, Trial

ERASED, OTHER = "zebrafirm", "quokkafirm"
NUMBERS = {ERASED: 1, OTHER: 2}


def _fill(settings, registry, folder: Path, tenant: str, shared: Path) -> dict[str, str]:
    """Everything that a tenant may have; texts that are found in it alone, by what they are."""
    store, storage = registry.store, Path(settings.storage)
    said = f"prompt of {tenant}"
    data = dataset(settings, folder, said)
    key, secret = store.create_key(tenant, ["infer", "train"], f"key of {tenant}", Quota(5, 7), actor=f"me at {tenant}")
    store.set_quota(tenant=tenant, requests_per_minute=9)
    for subject in (f"tenant:{tenant}", f"key:{key.id}"):
        execute(settings, "INSERT INTO pedro_buckets VALUES (?, 'requests_per_minute', 3, 4)", subject)
    ended = job(settings, store, tenant, data)
    running = job(settings, store, tenant, shared, "running")
    sweep = f"sweep-of-{NUMBERS[tenant]}"
    spec = {"base": {"tenant": tenant, "adapter": "support", "data": {"train": str(data)}}}
    at = Path(join(settings.storage, "sweeps", sweep))
    written(at / "sweep.json", json.dumps(vars(SweepRecord(sweep, spec))))
    written(at / "trials" / "000.json", json.dumps(vars(Trial(0, {"lr": 1.0}, "run", message=said))))
    written(storage / "sweeps" / "by-spec" / f"{tenant}.json", json.dumps({"id": sweep}))
    for name in (f"{sweep}-trial-000", f"{sweep}-trial-001-2"):
        written(storage / "runs" / name / "checkpoint", said)
    written(storage / "tune" / f"{sweep}-again-1" / "state", said)
    written(storage / "jobs" / f"{sweep}-again-1" / "log.txt", said)
    written(settings.home / "sweeps" / sweep / "summary.json", said)
    upload = written(storage / "files" / tenant / f"upload-{NUMBERS[tenant]}", said)
    row = (
        f"file-{tenant}",
        tenant,
        f"{said}.jsonl",
        "fine-tune",
        9,
        "sha256:1",
        f"files/{tenant}/{upload.name}",
        time.time(),
    )
    execute(
        settings,
        "INSERT INTO pedro_files (id, tenant, filename, purpose, bytes, digest, location, created) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        *row,
    )
    store.create_webhook(stub_endpoint(said, tenant, salt=f"salt of {tenant}"), actor=f"me at {tenant}")
    marks = [f"{NUMBERS[tenant]}{number}" for number in range(4)]
    manifest = {"spec": {"tenant": tenant, "data": {"train": str(data)}}, "metrics": {said: 1.0}}
    versions = [version(registry, folder, f"{tenant}.support", mark, {"job": ended}, **manifest) for mark in marks]
    gone = version(registry, folder, f"{tenant}.former", f"{tenant}-former", **manifest)
    name = f"{tenant}.support"
    registry.promote(name, 1)
    registry.promote(name, 2)
    registry.canary(name, 3, 0.2)
    registry.delete(name, 4)
    registry.delete(gone.name)
    imported = registry.start_run(experiment=tenant, name=f"import {name}", params={}, tags={"kind": said})
    registry.log_artifacts(imported, written(folder / "note" / "note.txt", said).parent, "adapter")
    for one in versions[:2]:
        registry.download(one)
    rows = written(settings.cache / f"rows-{NUMBERS[tenant]}" / "rows.arrow", said).parent
    written(rows / SOURCE, f"sha256:{data.name.partition('.')[0]}")
    written(settings.cache / "fetched" / f"0123-{data.name}", said)
    days = ("2026-01-01", "2026-01-02")
    for day, model in ((days[0], name), (days[0], f"{name}-2"), (days[1], name)):
        values = (day, tenant, model, key.id, 10, 100)
        execute(
            settings,
            "INSERT INTO pedro_usage (day, tenant, model, key_id, requests, prompt_tokens) VALUES (?, ?, ?, ?, ?, ?)",
            *values,
        )
    log = settings.requests_log
    log.parent.mkdir(exist_ok=True)
    with log.open("a") as file:
        file.write(f'2026-01-01 10:00:00,000 req-{tenant} {tenant} POST /v1/completions 200 model="{name}"\n')
        file.write(json.dumps({"request_id": f"req-{tenant}", "tenant": tenant, "route": "/v1/models"}) + "\n")
    with (log.parent / "controller.log").open("a") as file:
        file.write(f"2026-01-01 10:00:00 {ended} ({name}): started, attempt 1\n2026-01-01 10:00:01 {ended} went away\n")
    written(log.with_name(f"{log.name}.1"), f"2026-01-01 10:00:00,000 req-1 {tenant} GET /v1/models 200\n")
    return {"name": tenant, "key": key.id, "digest": _digest(store, key.id), "secret": secret, "job": ended} | {
        "running": running,
        "data": data.name,
    }


def _digest(store: Store, key_id: str) -> str:
    return next(row[5] for row in rows_of(store)["pedro_keys"] if row[0] == key_id)


@pytest.fixture
def home(tmp_path):
    settings, registry = open_home(tmp_path / "home")
    shared = dataset(settings, tmp_path, "common to both")
    for tenant in (OTHER, ERASED):
        (tmp_path / tenant).mkdir()
    marks = {tenant: _fill(settings, registry, tmp_path / tenant, tenant, shared) for tenant in (OTHER, ERASED)}
    yield settings, registry, marks
    registry.store.close()


def _erase(home, tenant=ERASED, cluster=GONE, stop=lambda job: None, **options):
    settings, registry, _ = home
    return erase_tenant(tenant, settings, registry, lambda: cluster, stop, **options)


def _found(settings, needle: str) -> list[str]:
    """Where in the home a text stands: in which files' bytes, names included."""
    return [path for path, content in tree(settings.home).items() if needle.encode() in content or needle in path]


def _of_others(home) -> tuple[dict[str, bytes], dict[str, list[tuple]]]:
    """The other tenant's files, and its rows."""
    settings, registry, _ = home
    files = {
        path: content
        for path, content in tree(settings.home).items()
        if ".db" not in path and not path.startswith("logs") and (OTHER in path or OTHER.encode() in content)
    }
    rows = {
        table: [row for row in found if OTHER in repr(row)]
        for table, found in rows_of(registry.store).items()
        if table != "pedro_changes"
    }
    return files, rows


def test_nothing_of_an_erased_tenant_is_in_any_file_or_table_and_nothing_of_another_changed(home):
    settings, registry, marks = home
    for what, needle in marks[ERASED].items():
        assert what == "secret" or _found(settings, needle), what
    before = _of_others(home)
    assert min(len(part) for part in before) > 5
    shared = [path for path in tree(settings.home) if path.startswith("storage/datasets")]
    assert len(shared) == 3
    done = _erase(home)
    for needle in (*marks[ERASED].values(), "sweep-of-1", "upload-1"):
        assert _found(settings, needle) == []
    assert ERASED not in repr(rows_of(registry.store))
    assert _of_others(home) == before
    for log in ("requests.log", "controller.log"):
        assert OTHER in (settings.home / "logs" / log).read_text()
    assert len([path for path in tree(settings.home) if path.startswith("storage/datasets")]) == 2
    assert registry.get(f"{OTHER}.support").version == 2
    assert registry.store.authenticate(marks[OTHER]["secret"])
    entry = last_audit(registry.store)[0]
    assert (entry.action, entry.tenant, entry.after["keys"]) == ("tenant.erase", done.number, 1)
    assert done.rows["versions"] == 3
    assert (done.rows["webhook endpoints"], done.rows["webhook deliveries"]) == (1, 4)
    assert done.files["checkpoints"].removed == 5


def test_the_name_can_be_used_anew_and_nothing_of_the_old_comes_back(home, tmp_path):
    _settings, registry, _ = home
    name = f"{ERASED}.support"
    made = registry.store.made_of(name)
    _erase(home)
    key, secret = registry.store.create_key(ERASED)
    assert registry.store.authenticate(secret)[0].id == key.id
    assert registry.store.list_quotas()[ERASED] == Quota()
    assert registry.versions(name) == []
    fresh = version(registry, tmp_path / "anew", name, "77")
    assert (fresh.version, fresh.aliases) == (1, ())
    assert registry.store.made_of(name) > made
    registry.promote(name, 1)
    assert [move.action for move in registry.store.alias_history(name)] == ["promote"]
    assert registry.store.list_jobs(ERASED) == []
    registry.take_over()
    assert [one.version for one in registry.versions(name)] == [1]
    assert [entry.action for entry in last_audit(registry.store, ERASED)] == ["adapter.promote", "key.create"]


def test_the_tenant_is_refused_from_the_first_moment_and_its_jobs_are_ended_first(home):
    settings, registry, marks = home
    store, told = (
        registry.store,
        {marks[tenant]["running"]: {"status": "RUNNING", "metadata": {"tenant": tenant}} for tenant in marks},
    )
    stopped = []

    def stop(job_id):
        with pytest.raises(AuthenticationError):
            store.authenticate(marks[ERASED]["secret"])
        for refused in (
            lambda: store.create_key(ERASED),
            lambda: store.create_job(ERASED, "support", {}),
            lambda: store.set_quota(tenant=ERASED, requests_per_minute=1),
            lambda: version(registry, settings.home.parent / "late", f"{ERASED}.late", "late"),
        ):
            with pytest.raises(ConflictError, match="is being erased"):
                refused()
        with pytest.raises(ConflictError):
            store.update_job(job_id, status="running")
        assert (Path(settings.storage) / "runs" / job_id).is_dir()
        told[job_id]["status"] = "STOPPED"
        stopped.append(job_id)

    _erase(home, cluster=ClusterJobs(told, "http://ray"), stop=stop)
    assert stopped == [marks[ERASED]["running"]]
    assert _found(settings, ERASED) == []


def test_where_it_cannot_be_known_that_jobs_have_ended_the_tenant_is_refused_and_its_files_stay(home):
    settings, registry, marks = home
    for _ in range(2):
        with pytest.raises(UnavailableError, match="run the same command again"):
            _erase(home, cluster=ClusterJobs({}, problem="no answer"))
    assert (Path(settings.storage) / "runs" / marks[ERASED]["running"]).is_dir()
    with pytest.raises(ConflictError):
        registry.store.create_key(ERASED)
    _erase(home)
    assert _found(settings, ERASED) == []


class Killed(BaseException):
    """As if the process had ended there."""


STEPS = (
    "ending", "removing models", "removing runs", "removing experiments", "removing checkpoints", "removing datasets",
    "removing caches", "removing uploads", "removing jobs", "removing sweeps", "deleting rows", "overwriting",
)  # fmt: skip


def test_an_erasure_that_was_broken_off_anywhere_is_ended_by_the_next_one(home):
    settings, registry, marks = home
    before = _of_others(home)
    told = {marks[ERASED]["running"]: {"status": "RUNNING", "metadata": {"tenant": ERASED}}}
    reached = []
    for step in STEPS:

        def log(line, step=step):
            if line.startswith(step):
                reached.append(step)
                raise Killed

        try:
            _erase(home, cluster=ClusterJobs(told, "http://ray"), log=log)
        except Killed:
            assert registry.store.is_being_erased(ERASED)
        told = {}
    assert reached == list(STEPS)
    _erase(home, cluster=ClusterJobs(told, "http://ray"))
    assert _found(settings, ERASED) == []
    assert _of_others(home) == before
    assert not registry.store.is_being_erased(ERASED)
    with pytest.raises(NotFoundError, match="nothing"):
        _erase(home)


def test_sums_of_usage_may_stay_under_a_number(home):
    settings, registry, _ = home
    done = _erase(home, keep_sums=True)
    rows = [row for row in rows_of(registry.store)["pedro_usage"] if row[1] != OTHER]
    assert [(row[0], row[1], row[4], row[5]) for row in sorted(rows)] == [
        ("2026-01-01", done.number, 20, 200),
        ("2026-01-02", done.number, 10, 100),
    ]
    assert _found(settings, ERASED) == []


def test_counting_erases_nothing_and_a_collector_at_work_is_waited_for(home, monkeypatch):
    settings, _, _ = home
    before = tree(settings.home / "storage")
    promised = _erase(home, dry_run=True)
    assert tree(settings.home / "storage") == before
    assert _found(settings, ERASED)
    monkeypatch.setattr("pedro.retention.erasure.WAIT_S", 0.0)
    with FileLock(settings.home / "gc.lock"), pytest.raises(ConflictError, match="another"):
        _erase(home)
    done = _erase(home)
    assert promised.rows == done.rows
    kinds = ("models", "runs", "checkpoints", "datasets", "uploads")
    assert {kind: done.files[kind] for kind in kinds} == {kind: promised.files[kind] for kind in kinds}


def test_a_server_hears_of_an_erasure_by_the_feed(home):
    settings, _registry, marks = home

    async def follow():
        store = Store(settings.database_url)
        catalog, keys = AdapterCatalog(store), KeyCache(store, follow_every_s=0.0)
        await catalog.follow()
        name, others = f"{ERASED}.support", f"{OTHER}.support"
        assert await catalog.get(name)
        assert await catalog.get(others)
        await keys.find(marks[ERASED]["secret"])
        await asyncio.to_thread(_erase, home)
        await catalog.follow()
        assert await catalog.get(name) is None
        assert await catalog.get(others)
        with pytest.raises(AuthenticationError):
            await keys.find(marks[ERASED]["secret"])
        await keys.find(marks[OTHER]["secret"])
        keys.close()
        store.close()

    asyncio.run(follow())


def test_no_row_of_an_erased_tenant_is_left_on_either_database(url):
    store = Store(url)
    for tenant in (OTHER, ERASED):
        store.create_key(tenant, name=f"key of {tenant}", quota=Quota(1, 2))
        store.set_quota(tenant=tenant, tokens_per_minute=3)
        store.create_job(tenant, "support", {"tenant": tenant})
        with store._database.writing() as connection:
            for model in ("a", "b"):
                row = {"day": "2026-01-01", "tenant": tenant, "model": model, "key_id": tenant, "requests": 1}
                connection.execute(sa.insert(schema.usage).values(row))
            canary = {"tenant": tenant, "adapter": "a", "made": 1, "canary": 2, "champion": 1}
            connection.execute(sa.insert(schema.canaries).values(canary))
            shadow = {"tenant": tenant, "adapter": "a", "made": 1, "shadow": 2, "champion": 1}
            connection.execute(sa.insert(schema.shadows).values(shadow))
    before = {table: [row for row in rows if OTHER in repr(row)] for table, rows in rows_of(store).items()}
    store.begin_erasure(ERASED)
    assert store.list_jobs(ERASED)[0].status == "cancelled"
    assert store.is_being_erased(ERASED)
    with pytest.raises(ConflictError):
        store.create_key(ERASED)
    store.erase_rows(ERASED, "erased-1", keep_sums=True)
    store.overwrite_free_pages()
    store.end_erasure(ERASED, "erased-1", {"keys": 1})
    after = rows_of(store)
    assert ERASED not in repr(after)
    assert [row[4] for row in after["pedro_usage"] if row[1] == "erased-1"] == [2]
    del before["pedro_changes"]
    assert {table: [row for row in after[table] if OTHER in repr(row)] for table in before} == before
    assert store.create_key(ERASED)
    store.close()


def test_the_command_asks_first_and_says_what_is_gone(home, monkeypatch, capfd):
    settings, _registry, _ = home
    run = command_runner(monkeypatch, capfd)
    monkeypatch.setenv("PEDRO_HOME", str(settings.home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, _, err = run("tenants", "erase", ERASED, "--json")
    assert (code, "give --yes" in err) == (1, True)
    code, out, _ = run("tenants", "erase", ERASED, "--dry-run", "--json")
    assert (code, json.loads(out)["rows"]["keys"]) == (0, 1)
    code, out, err = run("tenants", "erase", ERASED, "--yes")
    assert code == 0
    assert f"{ERASED} is erased; the audit has it as erased-" in out
    assert "removing checkpoints" in err
    assert _found(settings, ERASED) == []
    code, _, err = run("tenants", "erase", ERASED, "--yes")
    assert (code, "there is nothing of" in err) == (1, True)


def test_a_tenant_whose_name_stands_in_others_lines_takes_none_of_theirs_along(home):
    settings, registry, _ = home
    registry.store.create_key("200")
    log = settings.requests_log
    before = log.read_bytes()
    with log.open("a") as file:
        file.write("2026-01-01 10:00:00,000 req-9 200 GET /v1/models 401\n")
        file.write('2026-01-01 10:00:00,000 req-9 root POST /v1/completions 404 model="200.support"\n')
        file.write('2026-01-01 10:00:00,000 req-9 root POST /v1/completions 200 model="2000.support"\n')
        for tenant, model in (("200", None), ("root", "200.support"), ("root", "2000.support")):
            about = {"tenant": tenant, "model": model}
            file.write(json.dumps({"request_id": "req-9", "status": 200, **about, "total_s": 0.1}) + "\n")
        file.write(json.dumps({"request_id": "200", "tenant": "root", "model": '": "200"'}) + "\n")
    erase_tenant("200", settings, registry, lambda: GONE, lambda job: None)
    after = log.read_bytes()
    assert after.startswith(before)
    gone = [line.strip(b"x") == b"" for line in after[len(before) :].splitlines()]
    assert gone == [True, True, False, True, True, False, False]
