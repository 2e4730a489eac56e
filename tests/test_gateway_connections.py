"""The server in front of the gateway bounds what a client that sends slowly, or opens too much, can hold."""

import socket
import time
from contextlib import ExitStack

import pytest
import uvicorn.config
from gateway_server import serve

from pedro.errors import ConfigError
from pedro.gateway.carried_bodies import CarriedBodies
from pedro.gateway.connections import BoundedProtocol, ConnectionLimits, bound_connections
from pedro.gateway.not_yet import NotYet
from pedro.gateway.passed_connections import counted_as, line_for, plain, read_line, shared_key

HEAD = "POST /v1/completions HTTP/1.1\r\nHost: x\r\n"


@pytest.fixture
def limits(monkeypatch):
    """Sets the limits as the proxy of Ray Serve does when it starts."""
    monkeypatch.setitem(uvicorn.config.HTTP_PROTOCOLS, "auto", uvicorn.config.HTTP_PROTOCOLS["auto"])
    monkeypatch.setattr(BoundedProtocol, "limits", ConnectionLimits())
    monkeypatch.setattr(BoundedProtocol, "key", None)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)

    def limits(**given):
        for name, value in given.items():
            monkeypatch.setenv(f"PEDRO_HTTP_{name.upper()}", str(value))
        assert [middleware.cls for middleware in bound_connections()] == [NotYet, CarriedBodies]

    return limits


def connect(gateway):
    host, port = gateway.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=10)


def health(line):
    """A whole answer, which may come in pieces."""
    line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    answer = b""
    while not answer.endswith(b"}"):
        piece = line.recv(65536)
        assert piece, answer
        answer += piece
    return answer


def ending(line, send=b"", every_s=0.2):
    """What comes until the server closes the connection, and after how long; `send` is said again and again."""
    begun, answer = time.monotonic(), b""
    line.settimeout(every_s)
    while time.monotonic() < begun + 30:
        try:
            if send:
                line.sendall(send)
            piece = line.recv(65536)
        except TimeoutError:
            continue
        except OSError:
            break
        if not piece:
            break
        answer += piece
    return answer, time.monotonic() - begun


def test_half_sent_headers_are_closed_in_time_however_they_trickle_and_a_silent_connection_too(limits, tmp_path):
    limits(headers_timeout_s=1)
    with serve(tmp_path) as gateway, connect(gateway) as trickling, connect(gateway) as silent:
        trickling.sendall(HEAD.encode())
        answer, lasted_s = ending(trickling, b"x-a: 1\r\n")
        assert 0.5 < lasted_s < 30
        assert answer.startswith(b"HTTP/1.1 408")
        assert b'"code": "request_timeout"' in answer
        assert ending(silent)[0] == b""


def test_a_further_request_on_a_connection_has_the_same_time_for_its_headers(limits, tmp_path):
    limits(headers_timeout_s=1)
    with serve(tmp_path) as gateway, connect(gateway) as line:
        assert health(line).startswith(b"HTTP/1.1 200")
        time.sleep(1.5)  # idle between requests: that is no half-sent one
        assert health(line).startswith(b"HTTP/1.1 200")
        line.sendall(b"GET /hea")
        assert 0.5 < ending(line)[1] < 30


def test_a_body_that_is_held_back_is_closed_and_one_that_keeps_coming_is_read(limits, tmp_path):
    limits(body_timeout_s=2)
    with serve(tmp_path) as gateway, connect(gateway) as held, connect(gateway) as slow:
        head = f"{HEAD}Authorization: Bearer {gateway.key()}\r\nContent-Length: 10\r\n\r\n"
        begun = time.monotonic()
        held.sendall(head.encode())
        slow.sendall(head.encode())
        held.settimeout(0.3)
        with pytest.raises(TimeoutError):
            held.recv(1)  # it has time
        for _ in range(10):
            time.sleep(0.3)  # three seconds together
            slow.sendall(b"1")
        answer, _ = ending(held)
        assert time.monotonic() - begun < 30
        assert answer.startswith(b"HTTP/1.1 408")
        assert slow.recv(65536).startswith(b"HTTP/1.1 400"), "read to its end, and no JSON object"


def test_an_answer_may_take_longer_than_its_request(limits, tmp_path):
    limits(headers_timeout_s=1, body_timeout_s=1)
    with serve(tmp_path, token_s=0.4) as gateway, gateway.http(gateway.key()) as http:
        body = {"model": "words-1", "prompt": "a b c", "max_tokens": 4}
        assert http.post("/v1/completions", json=body).json()["usage"]["completion_tokens"] == 4


def test_one_address_holds_so_many_connections_and_finds_room_again_once_some_are_closed(limits, tmp_path):
    limits(connections_per_client=3)
    with serve(tmp_path) as gateway, ExitStack() as open_ones:
        lines = [open_ones.enter_context(connect(gateway)) for _ in range(3)]
        for line in lines:
            line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
            assert line.recv(65536).startswith(b"HTTP/1.1 200")
        with connect(gateway) as refused:
            answer, _ = ending(refused)
            assert answer.startswith(b"HTTP/1.1 503")
            assert b"holds 3 connections" in answer
        lines.pop().close()
        for _ in range(50):
            with connect(gateway) as line:
                line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
                if line.recv(65536).startswith(b"HTTP/1.1 200"):
                    break
            time.sleep(0.1)
        else:
            pytest.fail("no room, though a connection was closed")
    assert not BoundedProtocol.held, "none is counted any more"


@pytest.fixture
def key(tmp_path, monkeypatch):
    """Of a kept port and the proxy behind it."""
    (tmp_path / "token").write_text("of the head\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "pedro.gateway.connections:bound_connections")
    return shared_key()


def first_line(gateway, said, source="127.0.0.1"):
    """Say that and ask for /health; the status, and the connection."""
    host, port = gateway.url.removeprefix("http://").split(":")
    line = socket.create_connection((host, int(port)), timeout=30, source_address=(source, 0))
    *pieces, last = said or [b""]
    for piece in pieces:
        line.sendall(piece)
    line.sendall(last + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    return int(line.recv(65536).split()[1]), line


def test_connections_that_a_kept_port_passes_on_are_counted_for_the_clients_that_it_names(limits, key, tmp_path):
    limits(connections_per_client=2)
    with serve(tmp_path) as gateway, ExitStack() as open_ones:

        def status(*said, source="127.0.0.1"):
            number, line = first_line(gateway, said, source)
            open_ones.enter_context(line)
            return number

        one, two = line_for("203.0.113.1", key), line_for("203.0.113.2", key)
        assert [status(one) for _ in range(3)] == [200, 200, 503]
        assert [status(two) for _ in range(2)] == [200, 200]
        network = [line_for(f"2001:db8::{host}", key) for host in (1, 2, 3)]
        assert [status(line) for line in network] == [200, 200, 503], "one host has a whole network of addresses"
        assert status(*(bytes([byte]) for byte in line_for("203.0.113.3", key))) == 200, "in pieces"
        assert [status() for _ in range(3)] == [200, 200, 503], "those that come by themselves are counted as ever"
        assert BoundedProtocol.held["203.0.113.1"] == 2
    assert not BoundedProtocol.held


def test_no_stranger_takes_another_address_by_such_a_line(limits, key, tmp_path):
    limits()
    with serve(tmp_path) as gateway:
        for said, source in (
            (line_for("203.0.113.1", b"guessed"), "127.0.0.1"),
            (line_for("203.0.113.1", key).replace(b".1 ", b".2 "), "127.0.0.1"),
            (b"PEDRO-PASSES-ON 203.0.113.1\r\n", "127.0.0.1"),
            (b"PEDRO-PASSES-ON " + b"1" * 500, "127.0.0.1"),
            (line_for("203.0.113.1", key), "127.0.0.2"),  # not from where a kept port connects
        ):
            status, line = first_line(gateway, [said], source)
            line.close()
            assert status == 400, said
    assert not BoundedProtocol.held


def test_a_line_that_has_not_come_in_time_ends_its_connection(limits, key, tmp_path):
    limits(headers_timeout_s=1)
    with serve(tmp_path) as gateway, connect(gateway) as half:
        half.sendall(line_for("203.0.113.1", key)[:20])
        assert ending(half)[0] == b""
    assert not BoundedProtocol.held


def test_there_is_a_key_only_where_a_head_has_a_token_and_the_proxy_is_ours(key, monkeypatch, tmp_path):
    assert len(key) == 32
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "mine:own")
    assert shared_key() is None
    ours = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "pedro.gateway.connections:bound_connections"}
    (tmp_path / "token").write_text(" \n")
    for path in ({}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "none")}, {"RAY_AUTH_TOKEN_PATH": str(tmp_path / "token")}):
        assert shared_key({**ours, **path}) is None


def test_addresses_of_both_kinds_are_told_and_counted_as_what_they_are():
    assert (plain("::ffff:127.0.0.1"), plain("127.0.0.1"), plain("::1")) == ("127.0.0.1", "127.0.0.1", "::1")
    assert counted_as("2001:db8::1") == counted_as("2001:db8::ffff:0:1") == "2001:db8::/64"
    assert counted_as("fe80::1%eth0") == "fe80::/64"
    assert (counted_as("192.0.2.1"), counted_as("a socket")) == ("192.0.2.1", "a socket")
    assert read_line(line_for("fe80::1%eth0", b"k") + b"GET", b"k") == ("fe80::1%eth0", b"GET")
    assert (read_line(b"PEDRO", b"k"), read_line(b"POST / HTTP/1.1", b"k")) == (None, ("", b"POST / HTTP/1.1"))


def test_a_limit_that_is_no_number_is_named():
    with pytest.raises(ConfigError, match="PEDRO_HTTP_BODY_TIMEOUT_S: expected a whole number"):
        ConnectionLimits.from_env({"PEDRO_HTTP_BODY_TIMEOUT_S": "1.5"})
