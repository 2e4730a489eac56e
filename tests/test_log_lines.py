"""Logs as JSON: each line an object that says of which request, tenant or job it is."""

from __future__ import annotations

import io
import json
import logging

import pytest
from gateway_backend import BACKBONE, SECRET_TEXT
from gateway_server import serve
from test_training_queue import Cluster, ends, queued

from pedro import log_lines
from pedro.config import Settings
from pedro.errors import ConfigError
from pedro.gateway import access_log
from pedro.store import Store
from pedro.training.queue import controller, process


@pytest.fixture
def json_logs(tmp_path):
    """Has this process log as a server does with PEDRO_LOG_FORMAT=json; gives what was written so far."""
    loggers = logging.getLogger("pedro"), access_log.access
    before = [(log, log.handlers[:], log.propagate, log.level) for log in loggers]
    log_lines.use("json")
    written = io.StringIO()
    (handler,) = logging.getLogger("pedro").handlers
    handler.setStream(written)
    access_log.write_to(tmp_path / "requests.log", "json")
    yield lambda: [json.loads(line) for line in written.getvalue().splitlines()]
    for log, handlers, propagate, level in before:
        log.handlers[:], log.propagate = handlers, propagate
        log.setLevel(level)


def test_a_request_is_an_object_without_its_content(json_logs, tmp_path):
    with serve(tmp_path) as gateway, gateway.http(gateway.key()) as http, gateway.http() as nobody:
        body = {"model": BACKBONE, "prompt": "hush now", "max_tokens": 3}
        request_id = http.post("/v1/completions", json=body).headers["x-request-id"]
        http.post("/v1/completions", json={**body, "model": 'no"\nsuch'})
        nobody.get("/v1/models")
    text = (tmp_path / "requests.log").read_text()
    good, unknown, stranger = map(json.loads, text.splitlines())
    assert (good["request_id"], good["tenant"], good["model"]) == (request_id, "acme", BACKBONE)
    assert (good["method"], good["route"], good["status"]) == ("POST", "/v1/completions", 200)
    assert (good["prompt_tokens"], good["completion_tokens"]) == (2, 3)
    assert 0 < good["first_s"] <= good["total_s"]
    assert good["time"].endswith("Z")
    assert (unknown["status"], unknown["model"]) == (404, 'no"\nsuch')
    assert (stranger["status"], "tenant" in stranger) == (401, False)
    assert "hush" not in text


def test_a_fault_of_ours_is_logged_with_the_request_and_its_tenant(json_logs, tmp_path):
    with serve(tmp_path) as gateway, gateway.http(gateway.key()) as http:
        reply = http.post("/v1/completions", json={"model": BACKBONE, "prompt": "crash"})
        http.get("/v1/models")
    assert reply.status_code == 500
    (line,) = [line for line in json_logs() if line["logger"] == "pedro.gateway" and line["level"] == "ERROR"]
    assert (line["request_id"], line["tenant"]) == (reply.headers["x-request-id"], "acme")
    assert SECRET_TEXT in line["exception"]


def test_what_the_controller_says_of_a_job_names_it_with_its_tenant_and_model(capsys, tmp_path):
    log_lines.log_job_line("job-1 (acme.support): started, attempt 2")
    log_lines.log_job_line("waiting: the platform's database does not answer")
    started, waiting = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert {name: started[name] for name in ("job", "tenant", "model", "message")} == {
        "job": "job-1",
        "tenant": "acme",
        "model": "acme.support",
        "message": "started, attempt 2",
    }
    assert waiting["message"] == "waiting: the platform's database does not answer"
    assert "job" not in waiting


def test_the_controller_of_a_home_logs_so_where_the_setting_says_so(capsys, monkeypatch, tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path), "PEDRO_LOG_FORMAT": "json"})
    store = Store(settings.database_url)
    job_id = queued(store)

    class EndsAtOnce(Cluster):
        def start(self, job, submission_id):
            super().start(job, submission_id)
            ends(store, self, job.id)

    monkeypatch.setattr(process.signal, "signal", lambda *_: None)  # those of the test's own process stay
    monkeypatch.setattr(controller, "ROUND_S", 0.0)
    process.run(settings, lambda line: pytest.fail(f"{line} is no JSON"), until_idle=True, launcher=EndsAtOnce())
    store.close()
    (line,) = map(json.loads, capsys.readouterr().err.splitlines())
    assert (line["job"], line["model"], line["message"]) == (job_id, "acme.voice", "started, attempt 1")


def test_a_format_that_there_is_not_is_refused_and_the_setting_reaches_other_processes(tmp_path):
    with pytest.raises(ConfigError, match="PEDRO_LOG_FORMAT: 'xml'; use one of text, json"):
        Settings.from_env({"PEDRO_HOME": str(tmp_path), "PEDRO_LOG_FORMAT": "xml"})
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path), "PEDRO_LOG_FORMAT": "json"})
    assert Settings.from_env(settings.env()).log_format == "json"
    assert Settings.from_env({"PEDRO_HOME": str(tmp_path)}).log_format == "text"
