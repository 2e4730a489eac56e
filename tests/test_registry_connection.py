"""An MLflow server that asks for a password gets it, from a file, and nobody else hears of it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from pedro.config import Settings
from pedro.errors import UnavailableError
from pedro.registry import Registry

USER, WORD = "pedro", "w:rd/%"
IN_A_URL = "pedro:w%3Ard%2F%25"


class Locked(BaseHTTPRequestHandler):
    """Answers as an empty MLflow does, and 401 without the password."""

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("content-length") or 0))
        self._answer()

    def _answer(self) -> None:
        wanted = "Basic " + base64.b64encode(f"{USER}:{WORD}".encode()).decode()
        allowed = self.headers.get("authorization") == wanted
        body = json.dumps({} if allowed else {"error_code": "PERMISSION_DENIED"}).encode()
        self.send_response(200 if allowed else 401)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    """The address of the server, without scheme."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Locked) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{http.server_address[1]}"
        http.shutdown()


@pytest.fixture(autouse=True)
def _variables(monkeypatch):
    """What one registry sets is gone for the next test."""
    for name in ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD"):
        monkeypatch.setenv(name, "nobody")


def registry(tmp_path, url):
    (tmp_path / "url").write_text(url + "\n")
    return Registry.open(
        Settings.from_env({"PEDRO_HOME": str(tmp_path / "home"), "MLFLOW_TRACKING_URI_FILE": str(tmp_path / "url")})
    )


def test_a_password_from_a_file_opens_the_server(server, tmp_path):
    registry(tmp_path, f"http://{IN_A_URL}@{server}").connect()


@pytest.mark.parametrize("url", ["http://pedro:wrong-word@{}", "http://pedro:wrong-word@127.0.0.1:9", "http://{}"])
def test_a_wrong_password_and_a_server_that_is_away_are_told_without_it(server, tmp_path, url, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UnavailableError, match=r"no registry answers at http://") as raised:
        registry(tmp_path, url.format(server)).connect()
    told: BaseException | None = raised.value
    while told is not None:  # what it came of is logged, too
        assert "wrong-word" not in str(told)
        told = told.__cause__
