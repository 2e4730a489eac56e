"""The dashboard's way to the gateway: how it stands, what it refuses, and that the key goes nowhere else."""

from __future__ import annotations

import http.server
import threading

import dashboard_app  # noqa: F401 - makes the dashboard's modules importable
import pytest
from gateway_server import serve

from sources.gateway import DEFAULT_URL, Access, GatewayClient, GatewayError, gateway_client

NOBODY = "http://127.0.0.1:9"
ENV = {"PEDRO_ADMIN_KEY": "sk-pedro-secret"}


@pytest.fixture(scope="module")
def gateway(tmp_path_factory):
    with serve(tmp_path_factory.mktemp("gateway")) as running:
        yield running


def test_the_gateway_says_what_a_key_opens(gateway):
    revoked = gateway.store.create_key("acme", ("admin",))
    gateway.store.revoke_key(revoked[0].id)
    for key, access in (
        ("", Access.NONE),
        ("sk-pedro-nobodys", Access.UNKNOWN),
        (revoked[1], Access.UNKNOWN),
        (gateway.key(), Access.TENANT),
        (gateway.key("acme", ("infer", "train", "read")), Access.TENANT),
        (gateway.key("ops", ("admin",)), Access.ADMIN),
    ):
        status = GatewayClient(gateway.url, key).status()
        assert (status.answers, status.ready, status.access) == (True, True, access)


def test_where_nothing_answers_it_is_said_and_nothing_is_raised():
    status = GatewayClient(NOBODY, "sk-pedro-secret").status()
    assert not status.answers
    assert NOBODY in status.problem


def test_a_gateway_that_is_not_ready_is_told_from_one_that_is_away(gateway):
    gateway.backend.is_ready = False
    try:
        status = GatewayClient(gateway.url).status()
    finally:
        gateway.backend.is_ready = True
    assert (status.answers, status.ready) == (True, False)


@pytest.mark.parametrize(
    "url", ["", "nonsense", "ftp://127.0.0.1", "http://", "http://:99999999", "file:///etc/passwd"]
)
def test_an_address_that_is_none_is_refused_with_an_example(url):
    with pytest.raises(GatewayError, match=DEFAULT_URL):
        GatewayClient(url).models()
    assert not GatewayClient(url).status().answers


@pytest.mark.parametrize("key", ["sk-pedro-secret\nx", "sk-pedro-sécret", "sk pedro secret", "sk-pedro-secret\x7f"])
def test_a_key_that_no_header_can_carry_is_refused_without_being_repeated(gateway, key):
    with pytest.raises(GatewayError) as refused:
        GatewayClient(gateway.url, key).models()
    assert "secret" not in str(refused.value)
    assert "pedro" not in str(refused.value)
    assert refused.value.__cause__ is None


def test_the_key_is_in_no_representation_and_no_error():
    gateway = GatewayClient(NOBODY, "sk-pedro-secret")
    assert "secret" not in repr(gateway)
    with pytest.raises(GatewayError) as away:
        gateway.promote("acme.support", 2)
    assert "secret" not in str(away.value)
    assert away.value.__suppress_context__, "the request, with the key in it, would stand in a traceback"


def test_the_key_of_the_environment_goes_to_the_homes_own_gateway_alone():
    own = "http://127.0.0.1:8123"
    assert gateway_client(own, "", own, ENV).key == "sk-pedro-secret"
    assert gateway_client(f"{own}/v1/", "", own, ENV).key == "sk-pedro-secret"
    assert gateway_client("", "", own, ENV) == GatewayClient(own, "sk-pedro-secret")
    assert gateway_client("http://elsewhere:8123", "", own, ENV).key == ""
    assert gateway_client(f"{own}.elsewhere", "", own, ENV).key == ""
    assert gateway_client("http://elsewhere:8123", "sk-pedro-typed", own, ENV).key == "sk-pedro-typed"
    assert gateway_client(own, " sk-pedro-typed ", own, ENV).key == "sk-pedro-typed"


def test_errors_of_the_gateway_come_in_its_own_words(gateway):
    admin = GatewayClient(gateway.url, gateway.key("ops", ("admin",)))
    with pytest.raises(GatewayError, match="has no version 7") as refused:
        admin.promote("acme.support", 7)
    assert refused.value.status == 404
    with pytest.raises(GatewayError, match="no previous version") as refused:
        admin.rollback("acme.support")
    assert refused.value.status == 409
    with pytest.raises(GatewayError, match="the scope") as refused:
        GatewayClient(gateway.url, gateway.key()).promote("acme.support", 2)
    assert refused.value.status == 403


def test_promote_and_roll_back_give_the_adapter_as_it_is_then(gateway):
    admin = GatewayClient(gateway.url, gateway.key("ops", ("admin",)))
    assert admin.promote("globex.faq", 1)["aliases"] == {"champion": 1, "previous": 2}
    assert admin.rollback("globex.faq")["aliases"] == {"champion": 2, "previous": 1}
    assert admin.adapter("globex.faq")["residence"] == []


def test_what_is_no_gateway_is_told_from_one():
    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>hello</html>")

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        status = GatewayClient(f"http://127.0.0.1:{server.server_address[1]}").status()
        server.shutdown()
    assert not status.answers
    assert "no gateway" in status.problem
