"""A controller beside a home's server: one is started where there is none, and one that dies is replaced."""

from pedro.config import Settings
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
