"""What a home keeps, what `pedro gc` removes of it, and what it never does."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from audit_entries import last_audit
from cli_commands import command_runner
from filelock import FileLock
from retention_home import DAY, GONE, age_runs, aged, dataset, execute, job, open_home, tree, version, written
from webhook_stubs import stub_endpoint

from pedro.errors import ConfigError, ConflictError
from pedro.registry.purge import kept_runs
from pedro.retention import rules_records
from pedro.retention.collector import Collected, collect
from pedro.retention.policy import Retention, parse_age
from pedro.retention.view import View
from pedro.serving.gone_versions import GoneVersions
from pedro.sizes import KINDS, SizeGauges, measure
from pedro.store import CHAMPION, BatchRecord, BatchStatus, JobStatus, checkpoint_gate
from pedro.training.job_status import ClusterJobs
from pedro.training.storage import fetch, put_dataset, read_text, write_text

DEFAULT = Retention.from_env({})


@pytest.fixture
def home(tmp_path):
    settings, registry = open_home(tmp_path / "home")
    yield settings, registry
    registry.store.close()


def _gc(home, policy=DEFAULT, cluster=GONE, **options) -> Collected:
    settings, registry = home
    done = collect(settings, registry, policy, cluster, **options)
    assert not done.problems
    return done


def _gone(done: Collected, kind: str) -> set[str]:
    return {finding.name for finding, went in done.findings if went and finding.kind == kind}


def _why(done: Collected, name: str) -> str:
    return next(finding.reason for finding, _ in done.findings if finding.name == name)


def test_checkpoints_of_ended_jobs_go_and_those_of_a_job_that_runs_never(home, tmp_path):
    settings, registry = home
    data = dataset(settings, tmp_path, "a")
    old = job(settings, registry.store, "acme", data, days=20)
    young = job(settings, registry.store, "acme", data, days=2)
    running = job(settings, registry.store, "acme", data, "running", days=20)
    sweep = aged(written(Path(settings.storage) / "runs" / "sweep-1-trial-003" / "x").parent, 20)
    told = {"sweep-1-trial-003": {"status": "RUNNING"}, running: {"status": "RUNNING"}}
    done = _gc(home, cluster=ClusterJobs(told, "http://ray"))
    assert _gone(done, "checkpoints") == {old}
    assert _why(done, running) == "it is running"
    assert {path.name for path in (Path(settings.storage) / "runs").iterdir()} == {young, running, sweep.name}
    unsure = _gc(home, cluster=ClusterJobs({}, problem="no answer"))
    assert not _gone(unsure, "checkpoints")
    assert _gone(_gc(home), "checkpoints") == {running, sweep.name}  # the cluster is gone, and with it what ran


def test_data_that_something_kept_names_stays_whatever_its_age(home, tmp_path):
    settings, registry = home
    by_job = dataset(settings, tmp_path, "a", days=500)
    by_file, nobodys, young = (
        dataset(settings, tmp_path, text, days) for text, days in zip("bcd", (500, 500, 1), strict=True)
    )
    job(settings, registry.store, "acme", by_job, days=100)
    by_version = dataset(settings, tmp_path, "e", days=500)
    version(registry, tmp_path, "acme.support", "11", spec={"data": {"train": str(by_version)}})
    _add_file(settings, "file-1", by_file, None)
    assert _gone(_gc(home), "datasets") == {nobodys.name}
    assert all(path.is_file() for path in (by_job, by_file, young, by_version))
    assert _gone(_gc(home, DEFAULT.older_than(0)), "datasets") == {young.name}


def test_data_that_is_put_again_counts_as_new(home, tmp_path):
    settings, _ = home
    kept = dataset(settings, tmp_path, "a", days=500)
    assert put_dataset(str(tmp_path / "rows.jsonl"), settings.storage) == str(kept)
    assert not _gone(_gc(home), "datasets")


def _add_file(settings, file_id, location, expires):
    row = (file_id, "acme", "rows.jsonl", "fine-tune", 10, "sha256:x", str(location), time.time(), expires)
    execute(
        settings,
        "INSERT INTO pedro_files (id, tenant, filename, purpose, bytes, digest, location, created, expires) "
        "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        *row,
    )


def test_uploads_go_when_their_time_is_over_and_shared_content_with_the_last_of_them(home):
    settings, registry = home
    assert registry.store.stored_files() == []
    content = written(Path(settings.storage) / "files" / "acme" / "content")
    _add_file(settings, "file-1", content, time.time() - 1)
    _add_file(settings, "file-2", content, time.time() + DAY)
    assert _gone(_gc(home), "uploads") == {"file-1"}
    assert content.is_file()
    execute(settings, "UPDATE pedro_files SET expires = 1")
    assert _gone(_gc(home), "uploads") == {"file-2"}
    assert not content.exists()
    assert registry.store.stored_files() == []


def test_batches_go_long_after_they_ended(home):
    settings, registry = home
    for name in ("long-ago", "lately", "open"):
        file_id, now = "file-0", time.time()
        batch = BatchRecord(
            name, "acme", "key_1", "/v1/completions", file_id, "24h", BatchStatus.VALIDATING, now - 500 * DAY, now + DAY
        )
        registry.store.create_batch(batch, 10)
    for name, days in (("long-ago", 450), ("lately", 1)):
        execute(
            settings, "UPDATE pedro_batches SET status = 'completed', ended = ? WHERE id = ?", now - days * DAY, name
        )
    assert _gone(_gc(home), "batches") == {"1 batches"}
    assert {batch.id for batch in registry.store.list_batches("acme")} == {"lately", "open"}
    assert not _gone(_gc(home), "batches")


def test_events_of_webhooks_go_some_time_after_they_were_sent(home):
    settings, registry = home
    registry.store.create_webhook(stub_endpoint())
    for _ in range(3):
        waiting = registry.store.create_job("acme", "support", {}, queued=True)
        registry.store.ask_of_job(waiting.id, JobStatus.CANCELLED)
    for number, days in ((1, 31), (2, 1)):
        execute(
            settings, "UPDATE pedro_webhook_deliveries SET ended = ? WHERE id = ?", time.time() - days * DAY, number
        )
    assert _gone(_gc(home), "webhook events") == {"1 events"}
    assert registry.store.count_of("acme")["webhook deliveries"] == 2
    assert not _gone(_gc(home), "webhook events")


def test_caches_go_when_nobody_used_them_and_copies_of_versions_that_are_gone(home, tmp_path):
    settings, registry = home
    loaded = registry.download(version(registry, tmp_path, "acme.support", "11"))
    deleted = registry.download(version(registry, tmp_path, "acme.support", "12"))
    registry.delete("acme.support", 2)
    rows, young = (written(settings.cache / f"rows-{mark}" / "rows.arrow").parent for mark in ("old", "new"))
    aged(rows, 31)
    done = _gc(home)
    assert not _gone(done, "adapter cache")  # of the last hour
    assert _gone(done, "data cache") == {"rows-old"}
    aged(loaded, 0.1)
    aged(deleted, 0.1)
    assert _gone(_gc(home), "adapter cache") == {deleted.name}
    assert young.is_dir()
    assert registry.download(registry.get("acme.support", 1)) == loaded
    aged(loaded, 31)
    assert _gone(_gc(home), "adapter cache") == {loaded.name}
    assert registry.download(registry.get("acme.support", 1)) == loaded  # fetched again


def test_what_is_being_written_stays_and_half_removed_things_go_at_once(home):
    settings, _ = home
    storage = Path(settings.storage)
    writing = written(storage / "datasets" / ".new-1")
    killed = written(storage / "datasets" / ".new-2", days=2)
    broken_off = written(storage / "runs" / ".gone-1" / "checkpoint" / "x").parent.parent
    assert _gone(_gc(home, DEFAULT.older_than(0)), "leftovers") == {killed.name, broken_off.name}
    assert writing.is_file()


def _old_versions(home, tmp_path, count) -> None:
    settings, registry = home
    for number in range(1, count + 1):
        version(registry, tmp_path, "acme.support", f"{number:02d}")
    execute(settings, "UPDATE pedro_versions SET created = created - ?", 400 * DAY)


def test_old_versions_go_only_if_that_is_asked_for_and_none_that_an_alias_names(home, tmp_path):
    settings, registry = home
    _old_versions(home, tmp_path, 6)
    for number in (3, 1, 2):
        registry.promote("acme.support", number)  # 3 was champion lately, 1 is previous, 2 champion
    registry.canary("acme.support", 4, 0.1)
    registry.shadow("acme.support", 4, 0.5)
    assert not _gone(_gc(home), "versions")
    done = _gc(home, replace(DEFAULT, versions=1))
    assert _gone(done, "versions") == {"acme.support:5"}
    assert {one.version for one in registry.versions("acme.support")} == {1, 2, 3, 4, 6}
    reasons = {number: _why(done, f"acme.support:{number}") for number in (1, 2, 3, 4, 6)}
    assert reasons == {
        1: "it is previous",
        2: "it is champion",
        3: "it was champion within 90 days",
        4: "it is canary and shadow",
        6: "among the newest 1",
    }
    assert registry.store.alias_history("acme.support")[0].action == "retire"
    execute(settings, "UPDATE pedro_versions SET promoted = promoted - ?", 100 * DAY)
    assert _gone(_gc(home, replace(DEFAULT, versions=1)), "versions") == {"acme.support:3"}
    assert registry.rollback("acme.support").version == 1


def test_a_version_that_a_job_goes_on_from_stays_until_the_job_has_ended(home, tmp_path):
    settings, registry = home
    _old_versions(home, tmp_path, 3)
    policy, store = replace(DEFAULT, versions=1), registry.store
    going_on = store.create_job("acme", "next", {"parent": "acme.support:1"}, queued=True).id
    assert _gone(done := _gc(home, policy, dry_run=True), "versions") == {"acme.support:2"}
    assert _why(done, "acme.support:1") == f"the job {going_on} goes on from it"
    seen = list(rules_records.versions(View(settings, registry, policy, GONE)))
    late = store.create_job("acme", "next", {"parent": "acme.support:2"}, queued=True).id
    assert [finding.remove() for finding in seen if finding.remove] == [False], "a job came to need it meanwhile"
    for job_id in (going_on, late):
        store.update_job(job_id, status="cancelled")
    assert _gone(_gc(home, policy), "versions") == {"acme.support:1", "acme.support:2"}


def test_checkpoints_of_a_job_go_with_its_row_and_count_among_no_newest_versions(home, tmp_path):
    settings, registry = home
    store = registry.store
    ended = job(settings, store, "acme", "pedro://demo", days=10)
    _old_versions(home, tmp_path, 2)
    for number in (3, 4, 5):
        version(registry, tmp_path, "acme.support", f"step {number}")
        execute(
            settings, "UPDATE pedro_versions SET gate = ? WHERE version = ?", checkpoint_gate(ended, number), number
        )
    registry.promote("acme.support", 5)
    execute(settings, "UPDATE pedro_versions SET created = created - ?", 2 * DAY)
    done = _gc(home, replace(DEFAULT, versions=1), dry_run=True)
    assert _gone(done, "versions") == {"acme.support:1"}
    assert _why(done, "acme.support:2") == "among the newest 1"
    assert _why(done, "acme.support:3") == f"a checkpoint of {ended}, whose row is kept"
    done = _gc(home, replace(DEFAULT, records_s=5 * DAY))
    assert ended in _gone(done, "jobs")
    assert _gone(done, "versions") == {"acme.support:3", "acme.support:4"}, "the champion stays"


def test_a_version_that_became_champion_meanwhile_stays(home, tmp_path):
    settings, registry = home
    _old_versions(home, tmp_path, 3)
    seen = list(rules_records.versions(View(settings, registry, replace(DEFAULT, versions=1), GONE)))
    going = {finding.name: finding for finding in seen if finding.remove}
    assert set(going) == {"acme.support:1", "acme.support:2"}
    registry.promote("acme.support", 1)
    assert [finding.remove() for finding in going.values()] == [True, False]
    assert registry.get("acme.support", CHAMPION).version == 1
    with pytest.raises(ConflictError):
        registry.retire("acme.support", 1, 0.0)


def test_files_of_deleted_versions_go_and_runs_without_a_version_much_later(home, tmp_path):
    settings, registry = home
    kept, deleted = (version(registry, tmp_path, "acme.support", mark) for mark in ("11", "12"))
    registry.delete("acme.support", 2)
    artifacts = settings.home / "artifacts" / "acme.support"
    registry.log_artifacts(deleted.run_id, written(tmp_path / "report" / "loss.txt").parent, "report")
    age_runs(settings, 10)
    assert not _gone(_gc(home), "adapters")
    age_runs(settings, 30)
    assert _gone(_gc(home), "adapters") == {f"acme.support {deleted.run_id}"}
    assert not (artifacts / deleted.run_id / "artifacts" / "adapter").exists()
    assert (artifacts / deleted.run_id / "artifacts" / "report" / "loss.txt").is_file()
    assert registry.metric_history(deleted.run_id, "loss") == [(1, 1.0)]
    age_runs(settings, 400)
    assert _gone(_gc(home), "runs") == {f"acme.support {deleted.run_id}"}
    assert not (artifacts / deleted.run_id).exists()
    assert [run.id for run in kept_runs(registry)] == [kept.run_id]
    assert registry.download(registry.get("acme.support", 1)).is_dir()


def test_rows_and_logs_of_jobs_go_after_the_time_that_records_are_kept(home, tmp_path):
    settings, registry = home
    data = dataset(settings, tmp_path, "a", days=500)
    old = job(settings, registry.store, "acme", data, days=401)
    young = job(settings, registry.store, "acme", "elsewhere.jsonl", days=399)
    done = _gc(home, DEFAULT.older_than(0))
    assert _gone(done, "jobs") == {old}
    assert [record.id for record in registry.store.list_jobs()] == [young]
    assert [path.name for path in (Path(settings.storage) / "jobs").iterdir()] == [young]
    assert _gone(done, "datasets") == {data.name}  # which only the old one named


def test_keys_and_usage_go_when_they_are_old(home):
    settings, registry = home
    store = registry.store
    dead, _ = store.create_key("acme")
    alive, _ = store.create_key("acme")
    store.set_quota(key_id=dead.id, requests_per_minute=5)
    store.revoke_key(dead.id)
    for day in ("2001-01-01", time.strftime("%Y-%m-%d")):
        execute(settings, "INSERT INTO pedro_usage (day, tenant, model, key_id) VALUES (?, 'acme', 'm', 'k')", day)
    assert _gone(_gc(home), "usage") == {"1 rows"}
    execute(settings, "UPDATE pedro_keys SET revoked = revoked - ?", 401 * DAY)
    assert _gone(_gc(home), "keys") == {"1 keys"}
    assert [key.id for key in store.list_keys()] == [alive.id]
    assert not _gone(_gc(home), "keys")


def test_a_dry_run_changes_nothing_and_says_what_a_run_then_does(home, tmp_path):
    settings, registry = home
    data = dataset(settings, tmp_path, "a", days=500)
    job(settings, registry.store, "acme", "x", days=401)
    written(settings.cache / "rows-old" / "rows.arrow")
    aged(settings.cache / "rows-old", 31)
    _gc(home, dry_run=True)  # opens what is to be opened
    before = tree(settings.home / "storage") | tree(settings.cache)
    promised = _gc(home, dry_run=True)
    assert tree(settings.home / "storage") | tree(settings.cache) == before
    done = _gc(home)
    assert {kind: vars(total) for kind, total in done.kinds.items() if total.removed} == {
        kind: vars(total) for kind, total in promised.kinds.items() if total.removed
    }
    assert promised.kinds["datasets"].bytes > 0
    assert not data.exists()
    (entry,) = last_audit(registry.store)
    assert (entry.action, entry.after["datasets"]["removed"]) == ("gc", 1)
    assert not [finding for finding, went in _gc(home).findings if went]


def test_of_two_collectors_one_is_told_that_another_is_at_work(home):
    settings, _ = home
    with FileLock(settings.home / "gc.lock"), pytest.raises(ConflictError, match="another"):
        _gc(home)
    _gc(home)


def test_a_log_that_has_grown_long_begins_anew(home):
    log = written(home[0].home / "logs" / "controller.log", "x" * 1000)
    assert not _gone(_gc(home), "logs")
    os.truncate(log, 11 << 20)
    assert _gone(_gc(home), "logs") == {"controller.log"}
    assert log.read_bytes() == b""


def test_what_cannot_be_removed_is_told_and_the_rest_goes(home, tmp_path, monkeypatch):
    settings, registry = home
    first, second = (dataset(settings, tmp_path, text, 500) for text in "ab")
    monkeypatch.setattr(Path, "unlink", _refusing(Path.unlink, first.name))
    done = collect(settings, registry, DEFAULT, GONE)
    assert _gone(done, "datasets") == {second.name}
    assert first.name in done.problems[0]


def _refusing(unlink, name):
    def refuse(path, *rest, **options):
        if path.name == name:
            raise PermissionError(13, "not allowed", str(path))
        return unlink(path, *rest, **options)

    return refuse


def test_the_command_prints_what_goes_by_kind_and_why_the_rest_stays(tmp_path, monkeypatch, capfd):
    settings, registry = open_home(tmp_path / "home")
    dataset(settings, tmp_path, "a", days=500)
    young = dataset(settings, tmp_path, "b")
    registry.store.close()
    run = command_runner(monkeypatch, capfd)
    monkeypatch.setenv("PEDRO_HOME", str(settings.home))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    code, out, _ = run("gc", "--dry-run", "--json")
    told = json.loads(out)
    assert (code, told["dry_run"], told["kinds"]["datasets"]["removed"]) == (0, True, 1)
    code, out, _ = run("gc", "--verbose")
    assert code == 0
    assert f"{young.name[:20]}" in out
    assert "put there or named within 90 days" in out
    assert "freed" in out
    code, _, err = run("gc", "--older-than", "soon")
    assert code == 1
    assert "expected for instance 30d" in err


@pytest.mark.parametrize(("name", "value"), [("PEDRO_KEEP_CACHE_DAYS", "soon"), ("PEDRO_KEEP_VERSIONS", "0")])
def test_a_wrong_setting_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        Retention.from_env({name: value})


def test_settings_are_days_and_ages_have_units():
    policy = Retention.from_env({"PEDRO_KEEP_CACHE_DAYS": "0.5", "PEDRO_KEEP_VERSIONS": "3"})
    assert (policy.cache_s, policy.versions, policy.records_s) == (DAY / 2, 3, 400 * DAY)
    assert [parse_age(text) for text in ("2d", "12h", "90m", "1.5d")] == [2 * DAY, DAY / 2, 5400, 1.5 * DAY]
    assert policy.older_than(60).records_s == 400 * DAY


def test_what_a_url_names_is_fetched_again_once_it_has_changed(tmp_path):
    import fsspec

    location = "memory://retention/rows.jsonl"
    write_text(location, "one")
    assert fetch(location, tmp_path).read_text() == "one"
    assert fetch(location, tmp_path) == fetch(location, tmp_path)
    write_text(location, "another")
    assert fetch(location, tmp_path).read_text() == "another"
    fsspec.filesystem("memory").rm("/retention", recursive=True)


def test_a_storage_behind_a_url_is_collected_too(tmp_path):
    import fsspec

    settings, registry = open_home(tmp_path / "home")
    settings = replace(settings, storage="memory://gc-storage")
    memory = fsspec.filesystem("memory")
    data = put_dataset(str(written(tmp_path / "rows.jsonl", '{"prompt": "a", "completion": "b"}\n')), settings.storage)
    young = put_dataset(str(written(tmp_path / "more.jsonl", '{"prompt": "c", "completion": "d"}\n')), settings.storage)
    path = data.removeprefix("memory:/")
    memory.store[path].modified = memory.store[path].created = memory.modified(path).replace(year=2020)
    assert _gone(_gc((settings, registry)), "datasets") == {data.rpartition("/")[2]}
    assert read_text(data) is None
    assert read_text(young)
    assert measure(settings)["datasets"] > 0
    memory.rm("/gc-storage", recursive=True)
    registry.store.close()


def test_sizes_are_by_kind_and_measured_seldom(home, tmp_path):
    settings, registry = home
    job(settings, registry.store, "acme", dataset(settings, tmp_path, "a"))
    written(settings.home / "elsewhere" / "x", "12345")
    sizes = measure(settings)
    assert set(sizes) == set(KINDS)
    assert sizes["other"] == 5
    assert min(sizes[kind] for kind in ("database", "registry", "datasets", "checkpoints", "jobs")) > 0
    assert sum(sizes.values()) == sum(len(content) for content in tree(settings.home).values())
    gauges = SizeGauges(settings)
    assert gauges.text() == ""
    gauges.refresh()
    first = gauges.text()
    assert 'pedro_stored_bytes{kind="other"} 5.0\n' in first
    written(settings.home / "elsewhere" / "y")
    gauges.refresh()
    assert gauges.text() == first


def test_a_replica_lets_go_of_versions_that_were_deleted(home, tmp_path):
    _, registry = home
    kept, deleted = (version(registry, tmp_path, "acme.support", mark) for mark in ("11", "12"))
    copies = [registry.download(one) for one in (kept, deleted)]
    memory = [str(one.model_ref) for one in (kept, deleted)]
    evicted: list[str] = []
    forgotten: list[bool] = []
    gone = GoneVersions(registry, lambda: memory, evicted.append, lambda: forgotten.append(True))
    gone.look()
    assert (evicted, [copy.is_dir() for copy in copies]) == ([], [True, True])
    registry.delete("acme.support", 2)
    gone.look()
    gone.sweep_cache()
    assert (evicted, [copy.is_dir() for copy in copies]) == ([memory[1]], [True, False])
    assert not forgotten
    registry.store.begin_erasure("acme")
    registry.store.erase_rows("acme", "erased-1")
    registry.store.end_erasure("acme", "erased-1", {})
    gone.look()
    assert forgotten == [True], "the name may be another tenant's now, who must find nothing of this one's prompts"


def test_links_are_removed_and_not_followed(home, tmp_path):
    settings, _ = home
    outside = written(tmp_path / "outside" / "precious")
    link = Path(settings.storage) / "datasets" / "link"
    link.parent.mkdir(parents=True)
    link.symlink_to(outside.parent, target_is_directory=True)
    os.utime(link, (1, 1), follow_symlinks=False)
    assert _gone(_gc(home), "datasets") == {"link"}
    assert outside.is_file()
    assert not link.is_symlink()
