"""A small body goes with its request from the proxy to the gateway; who knows nothing of that gets it as before."""

import asyncio
import pickle

import pytest

from pedro.gateway import carried_bodies
from pedro.gateway.carried_bodies import CARRIED, MOST, CarriedBodies
from pedro.gateway.edge import Edge


def scope(length):
    return {"type": "http", "headers": [(b"content-length", str(length).encode())]}


def part(body, more=False):
    return {"type": "http.request", "body": body, "more_body": more}


class Client:
    """Sends `messages`, one for each time that it is asked, then says nothing until `leave` is set."""

    def __init__(self, *messages):
        self.messages = list(messages)
        self.leave = asyncio.Event()

    async def __call__(self):
        if self.messages:
            return self.messages.pop(0)
        await self.leave.wait()
        return {"type": "http.disconnect"}


async def unsent(_message):
    raise AssertionError("nothing is answered here")


def through_the_proxy(headers, *messages, wanted=1):
    """What the application behind the proxy is given, and the first messages that it receives."""

    async def go():
        client, seen = Client(*messages), []

        async def app(given, receive, _send):
            client.leave.set()
            seen.append(given)
            seen.extend([await receive() for _ in range(wanted)])

        await CarriedBodies(app)(headers, client, unsent)
        return seen

    return asyncio.run(go())


def test_a_small_body_is_carried_and_comes_once_more_for_whoever_knows_nothing_of_it():
    given, *received = through_the_proxy(scope(4), part(b"ab", more=True), part(b"cd"), wanted=3)
    assert given[CARRIED] == b"abcd"
    assert received == [part(b"ab", more=True), part(b"cd"), {"type": "http.disconnect"}]
    assert pickle.loads(pickle.dumps(given))[CARRIED] == b"abcd", "Serve pickles it"


def test_a_body_that_is_late_is_waited_for_by_nobody_and_not_lost(monkeypatch):
    monkeypatch.setattr(carried_bodies, "SOON_S", 0.0)
    given, *received = through_the_proxy(scope(4), wanted=1)
    assert CARRIED not in given
    given, *received = through_the_proxy(scope(4), part(b"ab", more=True), wanted=2)
    assert CARRIED not in given
    assert received == [part(b"ab", more=True), {"type": "http.disconnect"}]


@pytest.mark.parametrize("length", ["0", "", "-1", "x", "²", str(MOST + 1), "9" * 30])
def test_no_other_body_is_touched(length):
    given, received = through_the_proxy(scope(length), part(b"body"))
    assert CARRIED not in given
    assert received == part(b"body")


@pytest.mark.parametrize("late", [True, False])
def test_the_gateway_reads_a_carried_body_once_and_hears_when_its_client_leaves(late):
    async def go():
        client, sent = Client(*([] if late else [part(b"ab", more=True), part(b"cd")])), []

        async def app(given, receive, send):
            assert CARRIED not in given
            assert await receive() == part(b"abcd")
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if late:  # the second copy comes after it was read
                client.messages = [part(b"abcd")]
            client.leave.set()
            assert await receive() == {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await Edge(app)(scope(4) | {CARRIED: b"abcd"}, client, send)
        return sent

    (start,) = asyncio.run(go())
    assert b"connection" not in dict(start["headers"]), "the body was read: others may come by the same connection"


def test_a_request_that_is_refused_before_its_carried_body_was_read_ends_its_connection():
    async def go():
        sent = []

        async def app(_given, _receive, send):
            await send({"type": "http.response.start", "status": 401, "headers": []})

        async def send(message):
            sent.append(message)

        await Edge(app)(scope(4) | {CARRIED: b"abcd"}, Client(), send)
        return sent

    (start,) = asyncio.run(go())
    assert dict(start["headers"])[b"connection"] == b"close"
