"""A server is started again when its Ray head is gone, and not when somebody ended it. The heads are stand-ins."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import psutil
import pytest

from pedro import cluster
from pedro.config import Settings
from pedro.serving import supervision
from pedro.serving.config import ServeConfig
from pedro.serving.deploy import end, record, restarting

LEADER = """
import signal, subprocess, sys, time
own = subprocess.Popen(["sleep", "600"])
others = [subprocess.Popen(["sleep", "600"], env={"PEDRO_HOME": "/another"})] if sys.argv[1:] else []
signal.signal(signal.SIGTERM, lambda *_: (own.kill(), sys.exit()))
print(own.pid, *(other.pid for other in others), flush=True)
time.sleep(600)
"""


@pytest.fixture
def settings(tmp_path, monkeypatch):
    """A home that serves, says its record."""
    monkeypatch.setattr(supervision, "LOOK_S", 0.01)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    (settings.home / "ray").mkdir(parents=True)
    record(settings).write_text("{}")
    yield settings
    cluster.stop_head(settings)


def start_head(settings, *words):
    """A process that is recorded as the home's head, and the pids of what it started."""
    env = {**os.environ, "PEDRO_HOME": str(settings.home)}
    command = [sys.executable, "-c", LEADER, *words]
    head = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, start_new_session=True)
    started = [int(pid) for pid in head.stdout.readline().split()]
    head.stdout.close()
    entry = {"address": "127.0.0.1:1", "dashboard_url": "http://127.0.0.1:2", "pid": head.pid}
    entry["started"] = psutil.Process(head.pid).create_time()
    (settings.home / "ray" / "head.json").write_text(json.dumps(entry))
    return head, started


def kill(head):
    head.kill()
    head.wait()


def alive(pid):
    """Whether it runs; what has ended and lies there is dead."""
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


class Watched(supervision.Supervisor):
    """Instead of Ray a stand-in is started, as often as `tries` says: "fail", "start", or "down", which somebody says
    meanwhile."""

    def __init__(self, settings, tries):
        super().__init__(settings, ServeConfig(), "127.0.0.1", 1, lambda _line: None, self._beside_it)
        self.tries, self.started, self.looked, self.current = list(tries), 0, 0, None

    def _beside_it(self):
        self.looked += 1
        if self.current is None or self.current.poll() is not None:
            return
        self.started += 1
        if self.tries:
            kill(self.current)
        else:
            end(self._settings)

    def _deploy_apart(self):
        record(self._settings).unlink(missing_ok=True)  # as deploying does
        what = self.tries.pop(0)
        if what == "fail":
            return False
        if what == "down":
            end(self._settings)
        self.current, _ = start_head(self._settings)
        record(self._settings).write_text("{}")
        return True


def test_a_server_whose_head_is_killed_is_started_again_each_time_and_after_tries_that_fail(settings):
    head, _ = start_head(settings)
    watched = Watched(settings, ["start", "fail", "fail", "start"])
    kill(head)
    watched.run()
    assert (watched.started, watched.tries) == (2, [])
    assert not restarting(settings).exists()


def test_a_server_that_somebody_ends_stays_down_though_its_head_is_gone(settings):
    start_head(settings)
    watched = Watched(settings, ["start"])
    end(settings)
    watched.run()
    assert watched.tries == ["start"]


def test_a_server_that_is_ended_while_it_starts_again_is_ended_with_the_head_that_came_too_late(settings):
    head, _ = start_head(settings)
    watched = Watched(settings, ["down"])
    kill(head)
    watched.run()
    assert watched.started == 0
    assert watched.current.wait(60) is not None
    assert cluster.find_head(settings) is None
    assert not record(settings).exists()


def test_where_the_clock_was_set_back_head_and_server_are_started_again(settings, monkeypatch):
    head, (own,) = start_head(settings)
    clocks = iter([0.0, 0.0, 3600.0, 3599.0, -0.5])  # a second's step back, then an hour's
    monkeypatch.setattr(supervision, "ahead", lambda: next(clocks, -0.5))
    watched = Watched(settings, ["start"])
    for _ in range(3):
        watched._look_at_clock()
    assert head.poll() is None
    watched.run()
    assert (watched.started, watched.tries) == (1, [])
    assert head.poll() is not None
    assert not alive(own)


def test_a_clock_that_is_set_back_while_the_server_starts_ends_its_head(settings, monkeypatch):
    head, _ = start_head(settings)
    clocks = iter([0.0, 3600.0, 0.0])
    monkeypatch.setattr(supervision, "ahead", lambda: next(clocks, 0.0))
    started = SimpleNamespace(is_alive=lambda: head.poll() is None, join=lambda _limit: None)
    Watched(settings, [])._wait(started)
    assert head.poll() is not None


def test_what_a_killed_head_left_is_ended_before_the_next_starts_and_a_strangers_processes_are_not(settings):
    head, (own, strangers) = start_head(settings, "stranger")
    kill(head)
    assert alive(own)
    assert cluster.stop_head(settings) is True
    assert not alive(own)
    assert alive(strangers)
    psutil.Process(strangers).kill()
    assert cluster.stop_head(settings) is False
