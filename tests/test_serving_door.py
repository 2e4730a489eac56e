"""Who connects while a server's port has nobody waits, and is answered by the server that comes."""

import json
import socket
import threading
import urllib.error
import urllib.request
from contextlib import closing, contextmanager, suppress

import pytest
import uvicorn

from pedro.cluster import free_port, port_is_free
from pedro.gateway.connections import BoundedProtocol, ConnectionLimits
from pedro.gateway.passed_connections import shared_key
from pedro.serving import door
from pedro.serving.door import Door, listeners

GUARD_S = 120


@pytest.fixture
def port(monkeypatch):
    monkeypatch.setattr(door, "LOOK_S", 0.01)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)  # the servers here read no line of the kept port
    if not door.TABLES[0].is_file():
        pytest.skip("this system has no tables of who listens")
    return free_port()


@contextmanager
def watched(port, ready=lambda: True, wanted=lambda: True, host="127.0.0.1"):
    keeper = Door(host, port, wanted, ready)
    keeper.start()
    try:
        yield keeper
    finally:
        keeper.close()


class Server:
    """Answers each line with the same in capitals, beside others on the port."""

    def __init__(self, port, host="127.0.0.1"):
        self.peers, self.heard = [], []
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self._listener.bind((host, port))
        self._listener.listen()
        self._lines = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                line, peer = self._listener.accept()
            except OSError:
                return
            self._lines.append(line)
            self.peers.append(peer[0])
            threading.Thread(target=self._answer, args=(line,), daemon=True).start()

    def _answer(self, line):
        with closing(line), line.makefile("rwb") as file:
            for said in file:
                self.heard.append(said)
                file.write(said.upper())
                file.flush()

    def die(self):
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for line in self._lines:
            with suppress(OSError):
                line.shutdown(socket.SHUT_RDWR)


def connect(port, host="127.0.0.1"):
    line = socket.create_connection((host, port), timeout=GUARD_S)
    return line, line.makefile("rwb")


def say(file, text):
    file.write(text + b"\n")
    file.flush()


def until(condition):
    waited = threading.Event()
    for _ in range(GUARD_S * 100):
        if condition():
            return
        waited.wait(0.01)
    raise AssertionError("it did not happen in time")


def test_who_connects_while_nobody_listens_is_answered_by_the_server_that_comes(port):
    with watched(port):
        until(lambda: listeners(port))
        lines = [connect(port) for _ in range(20)]
        for number, (_, file) in enumerate(lines):
            say(file, b"early %d" % number)
        server = Server(port)
        assert [file.readline() for _, file in lines] == [b"EARLY %d\n" % number for number in range(20)]
        until(lambda: len(listeners(port)) == 1)
        line, file = connect(port)
        say(file, b"directly")
        assert file.readline() == b"DIRECTLY\n"
        server.die()
        assert file.readline() == b""
        until(lambda: listeners(port))
        again, file = connect(port)
        say(file, b"again")
        second = Server(port)
        assert file.readline() == b"AGAIN\n"
        second.die()
        assert file.readline() == b"", "the end of the server's side is passed on"
        for one in (line, again, *(one for one, _ in lines)):
            one.close()


def test_a_stranger_is_not_taken_for_somebody_on_this_machine(port):
    with watched(port, host="0.0.0.0"):
        until(lambda: listeners(port))
        line, file = connect(port, "127.0.0.2")  # stands for an address of the network
        say(file, b"hello")
        server = Server(port, "0.0.0.0")
        assert file.readline() == b"HELLO\n"
        assert "127.0.0.1" not in server.peers
        line.close()
        server.die()


def test_a_server_that_is_gone_again_before_it_was_asked_is_waited_for(port):
    servers = []

    def ready():
        until(lambda: servers)
        if len(servers) == 1:
            servers[0].die()
        return True

    with watched(port, ready):
        until(lambda: listeners(port))
        line, file = connect(port)
        say(file, b"early")
        servers.append(Server(port))
        until(lambda: servers[0]._listener.fileno() == -1)
        servers.append(Server(port))
        assert file.readline() == b"EARLY\n"
        line.close()
        servers[1].die()


def test_nobody_is_let_in_before_the_server_says_that_it_is_ready(port):
    ready = threading.Event()
    with watched(port, ready.is_set):
        until(lambda: listeners(port))
        line, file = connect(port)
        say(file, b"early")
        server = Server(port)
        until(lambda: len(listeners(port)) == 1)
        line.settimeout(0.2)
        with pytest.raises(TimeoutError):
            line.recv(1)
        line.settimeout(GUARD_S)
        ready.set()
        assert line.recv(100) == b"EARLY\n"
        server.die()
        line.close()


def test_a_port_is_kept_only_as_long_as_a_server_belongs_there(port):
    wanted, looks = threading.Event(), []

    def is_wanted():
        looks.append(wanted.is_set())
        return wanted.is_set()

    with watched(port, wanted=is_wanted):
        until(lambda: len(looks) > 3)
        assert not listeners(port)
        wanted.set()
        until(lambda: listeners(port))
        wanted.clear()
        until(lambda: not listeners(port))


def test_a_port_that_is_given_up_is_free_and_who_waited_is_let_go(port):
    with watched(port):
        until(lambda: listeners(port))
        line, _ = connect(port)
    with suppress(ConnectionResetError):  # as one that had not been accepted yet
        assert line.recv(1) == b""
    line.close()
    assert port_is_free(port)


def test_a_client_that_leaves_while_it_waits_is_forgotten_and_has_asked_nothing(port):
    with watched(port) as keeper:
        until(lambda: listeners(port))
        line, file = connect(port)
        say(file, b"gone")
        until(lambda: keeper._held.total() == 1)
        file.close()
        line.close()
        until(lambda: keeper._held.total() == 0)
        server = Server(port)
        until(lambda: len(listeners(port)) == 1)
        other, file = connect(port)
        say(file, b"here")
        assert file.readline() == b"HERE\n"
        assert server.heard == [b"here\n"]
        server.die()
        other.close()


def test_who_has_waited_for_too_long_is_told_to_come_again(port, monkeypatch):
    monkeypatch.setattr(door, "PATIENCE_S", 0.05)
    with watched(port):
        until(lambda: listeners(port))
        with pytest.raises(urllib.error.HTTPError) as told:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=GUARD_S)
        assert (told.value.code, told.value.headers["retry-after"]) == (503, "5")
        assert json.load(told.value)["error"]["code"] == "unavailable"


def test_one_client_holds_no_more_connections_than_it_may(port, monkeypatch):
    monkeypatch.setenv("PEDRO_HTTP_CONNECTIONS_PER_CLIENT", "2")
    with watched(port) as keeper:
        until(lambda: listeners(port))
        lines = [connect(port)[0] for _ in range(2)]
        until(lambda: keeper._held.total() == 2)
        third, file = connect(port)
        assert file.read() == b""
        other = socket.create_connection(("127.0.0.1", port), timeout=GUARD_S, source_address=("127.0.0.2", 0))
        until(lambda: keeper._held == {"127.0.0.1": 2, "127.0.0.2": 1})
        for one in (*lines, third, other):
            one.close()


async def who_asks(scope, receive, send):
    """An application that answers with the address of its client."""
    told = scope["client"][0].encode()
    headers = [(b"content-type", b"text/plain"), (b"content-length", b"%d" % len(told))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": told})


@contextmanager
def bounded_server(port, host):
    """As Ray Serve's proxy listens, beside others on the port."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    listener.bind((host, port))
    server = uvicorn.Server(uvicorn.Config(who_asks, http=BoundedProtocol, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(GUARD_S)
        listener.close()


def ask(port, source, host="127.0.0.1"):
    line = socket.create_connection((host, port), timeout=GUARD_S, source_address=(source, 0))
    line.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return line


def heard(line):
    """Status and body of an answer."""
    with line.makefile("rb") as file:
        status, length = int(file.readline().split()[1]), 0
        while header := file.readline().strip().lower():
            if header.startswith(b"content-length:"):
                length = int(header.split()[1])
        return status, file.read(length).decode()


@pytest.fixture
def shared(monkeypatch, tmp_path, port):
    """A proxy with the key of the kept port before it."""
    (tmp_path / "token").write_text("of the head")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    monkeypatch.setenv("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", "pedro.gateway.connections:bound_connections")
    monkeypatch.setattr(BoundedProtocol, "key", shared_key())
    monkeypatch.setattr(BoundedProtocol, "limits", ConnectionLimits(connections_per_client=2))


def test_behind_the_kept_port_each_client_is_known_by_its_address_and_bounded_by_itself(port, shared):
    """They connect while nobody listens, stay, and then ask the server directly, too."""
    first, second = "127.0.0.1", "127.0.0.2"
    lines = []
    with watched(port, host="0.0.0.0"):
        until(lambda: listeners(port))
        for source in (first, first, second, second):
            lines.append(ask(port, source))
        with bounded_server(port, "0.0.0.0"):
            assert [heard(line) for line in lines] == [(200, first)] * 2 + [(200, second)] * 2
            assert BoundedProtocol.held == {first: 2, second: 2}
            lines.append(ask(port, first))
            assert heard(lines[-1])[0] == 503
            lines.append(socket.create_connection(("127.0.0.1", port), GUARD_S, (second, 0)))  # hears it unasked
            assert heard(lines[-1])[0] == 503
            lines[0].close()
            until(lambda: BoundedProtocol.held[first] == 1)
            lines.append(ask(port, first))
            assert heard(lines[-1]) == (200, first)
            for line in lines:
                line.close()
            until(lambda: not BoundedProtocol.held)


def test_when_the_server_is_gone_again_who_waits_is_still_counted_by_his_own_address(port, monkeypatch):
    """And who leaves in that time has asked nothing."""
    monkeypatch.setenv("PEDRO_HTTP_CONNECTIONS_PER_CLIENT", "2")
    servers, sources = [], ("127.0.0.1", "127.0.0.1", "127.0.0.2", "127.0.0.2")

    def ready():
        until(lambda: servers)
        if len(servers) == 1:
            servers[0].die()
        return True

    with watched(port, ready, host="0.0.0.0") as keeper:
        until(lambda: listeners(port))
        lines = [socket.create_connection(("127.0.0.1", port), GUARD_S, (source, 0)) for source in sources]
        for number, line in enumerate(lines):
            line.sendall(b"%d\n" % number)
        until(lambda: keeper._held == {"127.0.0.1": 2, "127.0.0.2": 2})
        servers.append(Server(port, "0.0.0.0"))
        until(lambda: servers[0]._listener.fileno() == -1)
        until(lambda: keeper._holds)
        lines[0].close()
        until(lambda: keeper._held == {"127.0.0.1": 1, "127.0.0.2": 2})
        servers.append(Server(port, "0.0.0.0"))
        assert [line.recv(9) for line in lines[1:]] == [b"1\n", b"2\n", b"3\n"]
        assert b"0\n" not in servers[1].heard
        for line in lines:
            line.close()
        servers[1].die()


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6 here")
def test_a_port_of_both_kinds_of_addresses_is_kept_and_its_clients_are_known(port, shared):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("no IPv6 here")
    with watched(port, host="::"):
        until(lambda: listeners(port))
        lines = [ask(port, "::1", "::1"), ask(port, "127.0.0.2")]
        with bounded_server(port, "::"):
            assert [heard(line) for line in lines] == [(200, "::1"), (200, "127.0.0.2")]
            for line in lines:
                line.close()
