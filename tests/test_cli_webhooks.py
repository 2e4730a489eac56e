"""`pedro webhooks`: operators add, list, try and remove endpoints of any tenant."""

from __future__ import annotations

import json

import openai
import pytest
from cli_commands import command_runner
from webhook_receiver import receiving


@pytest.fixture
def run(monkeypatch, capfd, tmp_path):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PEDRO_WEBHOOK_NETWORKS", "127.0.0.0/8, ::1")
    for name in ("PEDRO_DATABASE_URL", "PEDRO_DATABASE_URL_FILE", "PEDRO_WEBHOOK_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    return command_runner(monkeypatch, capfd)


def test_an_operator_adds_an_endpoint_tries_it_and_removes_it(run):
    with receiving() as receiver:
        status, secret, err = run("webhooks", "add", "acme", receiver.url, "--event", "batch.failed", "--name", "ci")
        assert (status, "not shown again" in err) == (0, True)
        (listed,) = json.loads(run("webhooks", "list", "acme", "--json")[1])
        assert (listed["tenant"], listed["name"], listed["event_types"]) == ("acme", "ci", ["batch.failed"])
        assert "secrets" not in listed
        receiver.statuses = [503]
        assert run("webhooks", "test", listed["id"]) == (0, f"{listed['id']} answered 503\n", "")
        (one,) = receiver.got
        openai.OpenAI(api_key="none").webhooks.verify_signature(one.body, one.headers, secret=secret.strip())
        assert json.loads(one.body)["type"] == "ping"
    status, out, _ = run("webhooks", "list")
    assert (status, secret.strip() in out, listed["id"] in out) == (0, False, True)
    assert run("webhooks", "test", listed["id"])[0] == 1
    assert run("webhooks", "remove", listed["id"], "--yes")[1] == f"removed {listed['id']}\n"
    assert "no webhook endpoints yet" in run("webhooks", "list")[1]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("add", "acme", "https://10.0.0.1/"), "not on the public network"),
        (("add", "acme", "ftp://127.0.0.1/"), "url: expected"),
        (("add", "Acme", "https://127.0.0.1/"), "tenant: 'Acme' is not a valid name"),
        (("add", "acme", "https://127.0.0.1/", "--event", "ping"), "event_types: unknown events 'ping'"),
        (("add", "acme", "https://127.0.0.1/", "--name", ""), "name: expected 1 to 200"),
        (("test", "we_nix"), "No such webhook endpoint: we_nix"),
        (("remove", "we_nix", "--yes"), "No such webhook endpoint: we_nix"),
    ],
)
def test_what_is_wrong_is_named(run, words, told):
    status, _, err = run("webhooks", *words)
    assert (status, told in err) == (1, True), err


def test_a_network_that_is_none_is_named(run):
    status, _, err = run("webhooks", "list", PEDRO_WEBHOOK_NETWORKS="10.0.0.0/99")
    assert (status, "PEDRO_WEBHOOK_NETWORKS: '10.0.0.0/99' is not a network" in err) == (1, True)
