"""A controller beside a home's server: one is started where there is none, and one that dies is replaced."""

import signal

import pytest

from pedro.config import Settings
from pedro.errors import UnavailableError
from pedro.store import Store
from pedro.training.queue import process
from pedro.training.queue.process import ControllerKeeper


def test_a_controller_that_died_beside_its_server_is_replaced_once_the_one_before_had_time_to_start(
    tmp_path, monkeypatch
):
    started = []
    monkeypatch.setattr(process, "_spawn", started.append)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    patient = ControllerKeeper(settings)
    patient.ensure()
    patient.ensure()
    assert started == [settings]
    monkeypatch.setattr(process, "RESPAWN_S", 0.0)
    hasty = ControllerKeeper(settings)
    with process._lock(settings):
        hasty.ensure()
    assert len(started) == 1, "there is one"
    hasty.ensure()
    hasty.ensure()
    assert len(started) == 3


def test_a_cluster_that_is_somebody_elses_gets_no_controller_from_a_server(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(process, "_spawn", started.append)
    for env in ({"RAY_ADDRESS": "127.0.0.1:1"}, {"PEDRO_LAUNCHER": "kuberay"}):
        ControllerKeeper(Settings.from_env({"PEDRO_HOME": str(tmp_path), **env})).ensure()
    assert started == []


def test_a_controller_that_starts_while_the_database_is_away_waits_for_it(tmp_path, monkeypatch):
    tries, lines = [], []

    def late(url):
        tries.append(url)
        if len(tries) < 4:
            raise UnavailableError("database: cannot be opened")
        return Store(url)

    monkeypatch.setattr(process, "Store", late)
    monkeypatch.setattr(process, "RETRY_S", 0.0)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path)})
    process.run(settings, lines.append, until_idle=True, launcher=object())
    assert len(tries) == 4
    assert lines == ["waiting: database: cannot be opened"], "once, and then it has run until no job was open"
    tries.clear()
    with pytest.raises(UnavailableError, match="cannot be opened"):  # an operator's says so, and is started again
        process.run(settings, lines.append, until_idle=False, launcher=object())
    assert len(tries) == 1
