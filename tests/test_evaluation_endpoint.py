"""lm-eval over HTTP: what is no server of ours, or no address, key or time at all, is told at once."""

import threading
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "pedro-platform[harness]")')

from pedro.errors import ConfigError, PedroError
from pedro.evaluation.harness.endpoint import LONGEST_WAIT_S, EndpointModel, wait_s


@contextmanager
def server(status, body, **headers):
    """A web server with one answer to everything; gives its address and the paths that were asked."""
    asked = []

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *words):
            pass

    made = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{made.server_port}", asked
    finally:
        made.shutdown()
        made.server_close()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("<html>hello</html>", "no JSON object"),
        ("[1]", "no JSON object"),
        ('{"id": "acme.faq"}', "no max_model_len"),
    ],
)
def test_another_web_server_is_told_by_what_it_answers(body, why):
    with server(200, body) as (url, _), pytest.raises(ConfigError, match=f"base_url: {url}.*{why}"):
        EndpointModel(model="acme.faq", base_url=url, api_key="k")


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        *(({"base_url": url}, "base_url") for url in ("http://[::1", "foo", "ftp://x", "http://", "http://x:port")),
        *(({"api_key": key}, "api_key") for key in ("sk-pedro-é", "sk-pedro\nx", "two words")),
        *(({"timeout_s": value}, "timeout_s") for value in ("abc", -1, 0, "nan", "inf")),
    ],
)
def test_an_address_key_or_timeout_that_cannot_be_is_refused_without_asking(arguments, field):
    with server(200, "{}") as (url, asked), pytest.raises(ConfigError, match=f"^{field}: "):
        EndpointModel(**{"model": "acme.faq", "base_url": url, "api_key": "k"} | arguments)
    assert asked == []


def test_a_server_that_wants_no_second_try_gets_none():
    with server(429, "used up", x_should_retry="false", Retry_After="3600") as (url, asked):
        with pytest.raises(PedroError, match="429, used up"):
            EndpointModel(model="acme.faq", base_url=url, api_key="k")
        assert asked == ["/v1/models/acme.faq"]


def test_retry_after_is_obeyed_as_a_number_or_a_date_within_reason():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    past = format_datetime(datetime.now(UTC) - timedelta(seconds=30), usegmt=True)
    assert wait_s("7", attempt=2) == 7
    assert wait_s("0", attempt=2) == 0
    assert 25 < wait_s(soon, attempt=2) <= 30
    assert wait_s("3600", attempt=2) == wait_s("inf", attempt=2) == LONGEST_WAIT_S
    assert {wait_s(told, attempt=2) for told in (None, "", "-1", "nan", "soon", past)} == {2.0}
