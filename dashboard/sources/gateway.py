"""The gateway's HTTP client for operators.

The key is sent to the gateway only: it appears in no message, no representation and no log.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from typing import Any

import httpx

from pedro.errors import PedroError

DEFAULT_URL = "http://127.0.0.1:8000"
START = "pedro serve"
MAKE_KEY = "pedro keys create ops --scope admin"
TIMEOUT_S = 10.0
STREAM_TIMEOUT_S = 120.0
NOT_NAMED = "-"  # the name of no adapter: what an admin key is told of it is a plain 404


class GatewayError(PedroError):
    """The gateway refused, or could not be asked. `status` is its answer's, 0 where there was none."""

    def __init__(self, message: str, status: int = 0, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, param=param, code=code)
        self.status = status


class Access(Enum):
    """What the key opens."""

    NONE = "no key"
    UNKNOWN = "unknown or revoked key"
    TENANT = "a tenant's key"
    ADMIN = "admin key"


@dataclass(frozen=True)
class GatewayStatus:
    """Whether the gateway answers, and as whom we speak to it. `problem` says why it does not answer."""

    answers: bool
    ready: bool = False
    access: Access = Access.NONE
    problem: str = ""


@dataclass(frozen=True)
class GatewayClient:
    """Address and key of one gateway."""

    url: str
    key: str = field(default="", repr=False)

    def status(self) -> GatewayStatus:
        """Three short requests; never raises."""
        try:
            self.ask("GET", "/health", keyed=False)
        except GatewayError as error:
            return GatewayStatus(False, problem=error.message)
        try:
            ready = self.ask("GET", "/ready", keyed=False).get("status") == "ready"
        except GatewayError:
            ready = False
        try:
            return GatewayStatus(True, ready, self._access())
        except GatewayError as error:
            return GatewayStatus(True, ready, problem=error.message)

    def metrics_history(self, seconds: float, after: float = 0.0) -> dict[str, Any]:
        """What was served in the last `seconds`, of it what ended later than `after`. The key must be an admin key."""
        return self.ask("GET", f"/metrics/history?seconds={seconds:.0f}&after={after:.3f}")

    def models(self) -> list[dict[str, Any]]:
        """The models that the key may ask for: the backbone, and champions."""
        models: list[dict[str, Any]] = self.ask("GET", "/v1/models")["data"]
        return models

    def adapter(self, name: str) -> dict[str, Any]:
        """Versions, aliases, and where it is resident."""
        return self.ask("GET", f"/v1/adapters/{name}")

    def promote(self, name: str, version: int) -> dict[str, Any]:
        """Make a version champion; gives the adapter as it is then."""
        return self.ask("POST", f"/v1/adapters/{name}/promote", {"version": version})

    def rollback(self, name: str) -> dict[str, Any]:
        """Swap champion and previous; gives the adapter as it is then."""
        return self.ask("POST", f"/v1/adapters/{name}/rollback")

    def stream(self, path: str, body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """The events of a streamed answer. An error on the way is raised as one before it would be."""
        with self._sent("POST", path, {**body, "stream": True}, STREAM_TIMEOUT_S) as reply, self._errors():
            for line in reply.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = _parsed(line.removeprefix("data: "))
                    if "error" in event:
                        raise GatewayError(str(_error_of(event).get("message") or "the answer broke off"), 200)
                    yield event

    def _access(self) -> Access:
        if not self.key:
            return Access.NONE
        try:
            self.ask("POST", f"/v1/adapters/{NOT_NAMED}/unpin")  # of the routes that operators alone have, and no act
        except GatewayError as error:
            if error.status in (401, 403, 404):
                return {401: Access.UNKNOWN, 403: Access.TENANT, 404: Access.ADMIN}[error.status]
            raise
        return Access.ADMIN

    def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        keyed: bool = True,
        timeout_s: float = TIMEOUT_S,
        **more: Any,
    ) -> dict[str, Any]:
        """The JSON object that it answers with; `more` is of httpx: `headers`, or `files` and `data` of a form."""
        with self._sent(method, path, body, timeout_s, keyed=keyed, **more) as reply:
            return _parsed(reply.text)

    @contextmanager
    def _sent(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        timeout_s: float = TIMEOUT_S,
        *,
        keyed: bool = True,
        headers: Mapping[str, str] | None = None,
        **more: Any,
    ) -> Iterator[httpx.Response]:
        """A reply of status 200, its body not read yet where there is much of it to come."""
        sent = dict(headers or {})
        if self.key and keyed:
            sent["Authorization"] = f"Bearer {checked_key(self.key)}"
        timeout = httpx.Timeout(timeout_s, connect=3.0)
        with self._errors():
            asked = _client().build_request(
                method, f"{checked_url(self.url)}{path}", json=body, headers=sent, timeout=timeout, **more
            )
            reply = _client().send(asked, stream=True)
        try:
            with self._errors():
                streamed = reply.status_code == 200 and "event-stream" in reply.headers.get("content-type", "")
                if not streamed:
                    reply.read()
            if reply.status_code != 200:
                raise _refusal(_error_of(_json(reply.text)), reply.status_code)
            yield reply
        finally:
            reply.close()

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """What goes wrong on the way becomes a GatewayError without the request, which holds the key."""
        try:
            yield
        except httpx.TimeoutException:
            raise GatewayError(f"{self.url} does not answer in time") from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, UnicodeError) as error:
            raise GatewayError(f"{self.url} does not answer ({type(error).__name__})") from None


def default_url(env: Mapping[str, str] = os.environ) -> str:
    """Where the gateway is unless the reader says otherwise (`PEDRO_GATEWAY_URL`)."""
    return (env.get("PEDRO_GATEWAY_URL") or DEFAULT_URL).rstrip("/")


def gateway_client(url: str, typed_key: str, own_url: str, env: Mapping[str, str] = os.environ) -> GatewayClient:
    """The gateway at `url`. The key that the environment holds (`PEDRO_ADMIN_KEY`) goes to `own_url` alone.

    Otherwise whoever opens the dashboard could have that key sent wherever they like.
    """
    url, own = (address.strip().rstrip("/").removesuffix("/v1") for address in (url, own_url))
    kept = env.get("PEDRO_ADMIN_KEY", "") if not url or url == own else ""
    return GatewayClient(url or own, (typed_key or kept).strip())


def checked_url(url: str) -> str:
    """`url` if it can be asked; GatewayError if not."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        parsed = httpx.URL("")
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise GatewayError(f"{url!r} is no address of a gateway; expected for instance {DEFAULT_URL}")
    return url


def checked_key(key: str) -> str:
    """`key` if a header can carry it; what httpx says of one that cannot would hold the key itself."""
    if not (key.isascii() and key.isprintable() and " " not in key):
        raise GatewayError("the key holds characters that no key has; paste it again", 401)
    return key


@cache
def _client() -> httpx.Client:
    """One for the process: a client's own setting up costs more than a request."""
    return httpx.Client(limits=httpx.Limits(max_connections=64, max_keepalive_connections=16))


def _parsed(text: str) -> dict[str, Any]:
    document = _json(text)
    if not isinstance(document, dict):
        raise GatewayError("what answers there is no gateway of pedro: its answer is no JSON object")
    return document


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _error_of(document: Any) -> dict[str, Any]:
    error = document.get("error") if isinstance(document, dict) else None
    return error if isinstance(error, dict) else {}


def _refusal(error: Mapping[str, Any], status: int) -> GatewayError:
    """As the API says it."""
    said = str(error.get("message") or f"it answered with status {status}")
    param, code = (str(error[name]) if error.get(name) else None for name in ("param", "code"))
    return GatewayError(said, status, param=param, code=code)
