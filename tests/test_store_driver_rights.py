"""The role as which drivers of fine-tunes connect to PostgreSQL: what a driver does it may, and no more."""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import replace

import pytest
import sqlalchemy as sa
from retention_home import open_home, version
from serving_adapters import stub_adapter
from typer.testing import CliRunner
from webhook_stubs import stub_endpoint

from pedro.cli import app
from pedro.config import Settings
from pedro.refs import ModelRef
from pedro.registry import Registry
from pedro.store import Database, JobStatus, Store, Usage, schema
from pedro.store.database import parse_url
from pedro.store.driver_rights import RIGHTS
from pedro.training.checkpoint_versions import publish
from pedro.training.curves import log_point
from pedro.training.job_record import OwnRecord
from pedro.training.job_results import store_results
from pedro.training.loop import SECONDS_LEFT

SHUT = {schema.keys, schema.quotas, schema.buckets, schema.batches, schema.batch_answers}
PARTLY = {schema.webhook_endpoints}


def test_every_table_is_open_to_drivers_or_shut_on_purpose():
    assert {*RIGHTS, *SHUT, *PARTLY} == {*schema.metadata.tables.values()}


@pytest.fixture
def platform(postgres, tmp_path, monkeypatch):
    """The settings of a home on PostgreSQL, and those of a driver in it, which connects as a role of its own."""
    url = postgres.ready_database()
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PEDRO_DATABASE_URL", url)
    settings, _ = open_home(tmp_path / "home")
    settings = replace(settings, database_url=url)
    owner = Database(url)
    with owner.writing() as connection:
        connection.execute(sa.text("CREATE ROLE a_driver LOGIN"))
    try:
        done = CliRunner().invoke(app, ["db", "upgrade", "--driver-role", "a_driver"])
        assert done.exit_code == 0, done.output
        yield settings, replace(settings, database_url=url.replace("pedro@", "a_driver@"))
    finally:
        with owner.writing() as connection:
            connection.execute(sa.text("DROP OWNED BY a_driver"))
            connection.execute(sa.text("DROP ROLE a_driver"))
        owner.close()
        postgres.drop(url)


def test_a_driver_does_its_work_as_its_own_role(platform, tmp_path):
    settings, drivers = platform
    with closing(Store(settings.database_url)) as store:
        job = store.ask_for_job("acme", "colours", {}, key_id="key_1").id
        store.update_job(job, status=JobStatus.QUEUED)
        store.create_webhook(stub_endpoint("ours", "acme", ("fine_tuning.job.succeeded", "adapter.alias.moved")))
    own = OwnRecord(drivers.database_url, job, print)
    own.running()
    registry = Registry.open(drivers)
    run = registry.start_run(experiment="acme.colours", name=job, params={}, tags={"job": job})
    log_point(registry, run, job, 1, {"train/loss": 2.0, SECONDS_LEFT: 5.0})
    for step in range(1, 6):  # the first goes when the fifth is there
        folder = stub_adapter(tmp_path / str(step), str(step), "sha256:bb")
        made = {"step": step, "best_step": 5, "metrics": {"step": step}}
        publish(registry, ModelRef("acme", "colours"), job, run, folder, made)
    for mark, against in (("one", None), ("two", 6), ("three", 7)):
        found = version(registry, tmp_path, "acme.colours", mark)
        assert registry.judge(found, True, "good", against)[0] == "champion"
        if mark == "two":  # what a promotion ends
            with closing(Store(settings.database_url)) as store:
                store.set_canary("acme.colours", 6, 0.1)
                store.set_shadow("acme.colours", 5, 0.1)
    registry.store.add_training(job, Usage("2026-01-01", "acme", "acme.colours", training_tokens=7))
    metrics = {"best_step": 1}
    own.succeeded({"model": "acme.colours:8", "metrics": metrics, "result_files": store_results(drivers, job, print)})
    registry.store.close()
    with closing(Store(settings.database_url)) as store:
        ended = store.get_job(job)
        assert (ended.status, len(ended.result["result_files"])) == (JobStatus.SUCCEEDED, 1)
        assert store.get_version("acme.colours").version == 8
        waiting = {json.loads(one.body)["type"] for one in store.lease_deliveries("a", 1e12, 1e12 + 1, 99, 99)}
        assert waiting == {"fine_tuning.job.succeeded", "adapter.alias.moved"}


REFUSED = (
    "SELECT digest FROM pedro_keys",
    "INSERT INTO pedro_quotas (subject) VALUES ('tenant:acme')",
    "SELECT body FROM pedro_batch_answers",
    "SELECT input_file_id FROM pedro_batches",
    "SELECT secrets FROM pedro_webhook_endpoints",
    "UPDATE pedro_audit SET actor = 'nobody'",
    "DELETE FROM pedro_jobs",
    "CREATE TABLE mine (n int)",
)


def test_a_driver_may_do_nothing_else(platform):
    _, drivers = platform
    with closing(sa.create_engine(parse_url(drivers.database_url)).connect()) as connection:
        for statement in REFUSED:
            with pytest.raises(sa.exc.ProgrammingError, match="permission denied"):
                connection.execute(sa.text(statement))
            connection.rollback()


def test_a_role_that_is_not_there_is_named_and_sqlite_has_none(platform, monkeypatch):
    def refused():
        return str(CliRunner().invoke(app, ["db", "upgrade", "--driver-role", "nobody_s"]).exception)

    assert "PostgreSQL has no role 'nobody_s'" in refused()
    monkeypatch.delenv("PEDRO_DATABASE_URL")
    assert "an sqlite file, which has no roles" in refused()


def test_the_password_may_come_from_a_file_of_its_own(tmp_path):
    (tmp_path / "password").write_text("a/b c\n")
    env = {"PEDRO_DATABASE_URL": "postgresql://pedro@db/pedro", "PEDRO_DATABASE_PASSWORD_FILE": f"{tmp_path}/password"}
    assert Settings.from_env(env).database_url == "postgresql://pedro:a%2Fb%20c@db/pedro"
    for own in ("postgresql://pedro:own@db/pedro", "postgresql://db/pedro", "sqlite:////srv/a@b.db"):
        assert Settings.from_env({**env, "PEDRO_DATABASE_URL": own}).database_url == own
