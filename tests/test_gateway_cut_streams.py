"""What OpenAI's client makes of a connection that dies under it, before an answer began and after.

Between client and gateway is a relay of this test, which dies as a proxy does: its connections end.
"""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path

import openai
import pytest
from gateway_backend import BACKBONE, WordBackend
from gateway_server import serve

from pedro.errors import PedroError
from pedro.gateway.answer import FanIn, to_its_end, while_connected
from pedro.gateway.backend import Delta, GenerateCall

PAGE = Path(__file__).parents[1] / "docs" / "reference" / "http-api.md"
GUARD_S = 60
WORDS = "one three five seven"


class Relay:
    """Passes bytes on between its own port and another one."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self.bytes_back = 0
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def port(self) -> int:
        return int(self._listener.getsockname()[1])

    def die(self) -> None:
        """End every connection; who connects again meets one that lives."""
        pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):  # closed by its other side already
                    end.shutdown(socket.SHUT_RDWR)
                end.close()

    def close(self) -> None:
        self._listener.close()
        self.die()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self._target))
            self._pairs.append((client, server))
            for source, target in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=(source, target, target is client), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, back: bool) -> None:
        try:
            while some := source.recv(65536):
                if back:
                    self.bytes_back += len(some)
                target.sendall(some)
        except OSError:
            pass


@pytest.fixture
def gateway(tmp_path):
    with serve(tmp_path) as running:
        yield running


@pytest.fixture
def relay(gateway):
    with closing(Relay(int(gateway.url.rpartition(":")[2]))) as running:
        yield running


@pytest.fixture
def client(gateway, relay):
    """OpenAI's own, as it is when nobody sets anything."""
    return openai.OpenAI(base_url=f"http://127.0.0.1:{relay.port}/v1", api_key=gateway.key(), timeout=GUARD_S)


def documented():
    """The function that the reference page gives to applications."""
    code = re.search(r"```python\n(import openai\n.*?def stream_text.*?)\n\n\nfor piece", PAGE.read_text(), re.DOTALL)
    assert code is not None, "the page has it"
    names: dict[str, object] = {}
    exec(code[1], names)
    return names["stream_text"]


def until(condition):
    waiting = threading.Event()
    for _ in range(GUARD_S * 200):
        if condition():
            return
        waiting.wait(0.005)
    raise AssertionError("it did not happen")


def chat(client, **options):
    messages = [{"role": "user", "content": WORDS}]
    return client.chat.completions.create(model=BACKBONE, messages=messages, max_tokens=4, temperature=0, **options)


def text_of(chunks):
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


@pytest.mark.parametrize("stream", [True, False])
def test_an_answer_whose_connection_dies_before_anything_could_be_shown_is_asked_again_by_the_stock_client(
    gateway, relay, client, stream
):
    gateway.backend.allowed = 0
    answers = []

    def ask():
        answer = chat(client, stream=stream)
        answers.append(text_of(answer) if stream else answer.choices[0].message.content)

    asking = threading.Thread(target=ask)
    asking.start()
    until(lambda: gateway.backend.running == 1)
    assert relay.bytes_back == 0, "not even a status"
    relay.die()
    gateway.backend.allowed = 4
    asking.join(GUARD_S)
    assert answers == ["one three five seven "]
    assert len(gateway.backend.calls) == 2


def test_a_stream_that_dies_in_the_middle_is_an_error_to_the_stock_client_and_never_looks_whole(gateway, relay, client):
    gateway.backend.allowed = 2
    seen = []

    def read():
        for chunk in chat(client, stream=True):
            seen.append(chunk)
            if text_of(seen) == "one three ":
                relay.die()

    with pytest.raises(openai.APIConnectionError):
        read()
    assert text_of(seen) == "one three "
    assert all(chunk.choices[0].finish_reason is None for chunk in seen)
    assert len(gateway.backend.calls) == 1, "it is not asked again"


def test_the_documented_function_goes_on_where_a_stream_was_cut_and_says_nothing_twice(gateway, relay, client):
    gateway.backend.allowed = 2
    seen = []
    request = {"model": BACKBONE, "messages": [{"role": "user", "content": WORDS}], "max_tokens": 4, "temperature": 0}
    for text in documented()(client, **request):
        seen.append(text)
        if "".join(seen) == "one three ":
            relay.die()
            gateway.backend.allowed = 4
    assert "".join(seen) == "one three five seven "
    assert len(gateway.backend.calls) == 2


def test_the_documented_function_gives_up_where_every_try_is_cut(gateway, relay, client):
    gateway.backend.allowed = 1
    request = {"model": BACKBONE, "messages": [{"role": "user", "content": WORDS}], "max_tokens": 4, "temperature": 0}
    client = client.with_options(max_retries=0)
    cutting = threading.Event()

    def cut():
        while not cutting.wait(0.05):
            relay.die()

    thread = threading.Thread(target=cut)
    thread.start()
    try:
        with pytest.raises(openai.APIConnectionError):
            list(documented()(client, tries=2, **request))
    finally:
        cutting.set()
        thread.join()


@pytest.mark.parametrize(("first", "status"), [('{"name": ', 400), ("I look: ", 200)])
def test_a_call_of_a_tool_is_shown_once_it_is_whole_and_may_fail_until_then_as_if_nothing_had_begun(
    gateway, monkeypatch, first, status
):
    async def generate(call):
        yield Delta(0, first, (1,), prompt_tokens=1, completion_tokens=1)
        raise PedroError("The adapter went away.", code="adapter_gone")

    monkeypatch.setattr(gateway.backend, "generate", generate)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    body = {"model": BACKBONE, "messages": [{"role": "user", "content": "look"}], "stream": True, "tools": tools}
    with gateway.http(gateway.key()) as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.status_code == status
    assert "adapter_gone" in answer.text
    assert ("[DONE]" in answer.text) == (status == 200)


def test_a_streamed_call_still_begins_by_saying_who_speaks(gateway, client, monkeypatch):
    async def generate(call):
        for text, reason in (('{"name": "look", ', None), ('"arguments": {}}', None), ("", "stop")):
            yield Delta(0, text, (1,), prompt_tokens=1, completion_tokens=1, finish_reason=reason)

    monkeypatch.setattr(gateway.backend, "generate", generate)
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
    first, *others = [chunk.choices[0] for chunk in chat(client, stream=True, tools=tools)]
    assert first.delta.role == "assistant"
    assert [one.delta.role for one in others] == [None] * len(others)
    assert [one.delta.tool_calls[0].function.name for one in others if one.delta.tool_calls] == ["look"]
    assert others[-1].finish_reason == "tool_calls"


def test_a_request_that_is_cancelled_twice_still_frees_what_it_holds():
    """As a batch's are: its rows are cancelled with it, and then once more by whoever waits for them."""
    backend = WordBackend(token_s=60.0)
    call = GenerateCall("cmpl-1-0", "acme", BACKBONE, prompt="a b")

    async def work():
        async with FanIn(backend, [call]) as deltas:
            await deltas.admitted()

    async def cancelled_twice():
        request = asyncio.create_task(while_connected(asyncio.Event().wait, work()))
        while not backend.running:
            await asyncio.sleep(0)
        for _ in range(2):
            request.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await request
        return backend.running

    assert asyncio.run(cancelled_twice()) == 0


@pytest.mark.parametrize("times", [0, 1, 3])
def test_a_clean_up_goes_on_however_often_who_waits_for_it_is_cancelled(times):
    async def cleaned():
        done = asyncio.Event()

        async def clean():
            await asyncio.sleep(0.02)
            done.set()
            return "clean"

        waiting = asyncio.create_task(to_its_end(clean()))
        for _ in range(times):
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            waiting.cancel()
        (end,) = await asyncio.gather(waiting, return_exceptions=True)
        return done.is_set(), end

    done, end = asyncio.run(cleaned())
    assert done
    assert isinstance(end, asyncio.CancelledError) if times else end == "clean"


def test_what_breaks_in_a_clean_up_is_raised():
    async def broken():
        raise PedroError("no room")

    with pytest.raises(PedroError, match="no room"):
        asyncio.run(to_its_end(broken()))
