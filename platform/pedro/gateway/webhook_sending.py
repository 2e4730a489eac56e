"""Sends one event to one endpoint, once: signed, to a checked address, within limits of time and size.

Redirects are not followed, proxies from the environment are ignored, and only the status of the response is read.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING

import httpx

from pedro import __version__
from pedro.errors import PedroError
from pedro.gateway.webhook_addresses import read_url
from pedro.gateway.webhook_signing import signed_headers
from pedro.store import event_body, new_event_id

if TYPE_CHECKING:
    from pedro.gateway.webhook_addresses import Addresses
    from pedro.gateway.webhook_signing import WebhookSecrets
    from pedro.store import WebhookEndpoint

ATTEMPT_S = 15.0  # from the lookup to the status
CONNECT_S = 5.0


class NotSentError(PedroError):
    """There was no response; the message says why, without the library's text."""

    code = "webhook_not_sent"


class WebhookSender:
    """For one event loop. `clock` gives Unix seconds."""

    def __init__(self, secrets: WebhookSecrets, addresses: Addresses, clock: Callable[[], float] = time.time) -> None:
        self.secrets, self.addresses, self._clock = secrets, addresses, clock

    @cached_property
    def _transport(self) -> httpx.AsyncHTTPTransport:
        """Does not reuse connections: the next request to an address may be for another host. Logs no URL."""
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        return httpx.AsyncHTTPTransport(limits=limits)

    def close(self) -> None:
        """Stop sending."""
        self.addresses.close()

    async def send(self, endpoint: WebhookEndpoint, event_id: str, body: str) -> int:
        """The status of the response. Raises NotSentError if there is none, and PedroError if it cannot be sent: the
        URL is no longer allowed, or the secret's key is missing."""
        url = read_url(endpoint.url)
        now = self._clock()
        signing = await asyncio.to_thread(self.secrets.of, endpoint, now)
        headers = {
            "host": url.netloc.decode("ascii"),
            "content-type": "application/json",
            "user-agent": f"pedro/{__version__}",
            **signed_headers(signing, event_id, int(now), body),
        }
        try:
            async with asyncio.timeout(ATTEMPT_S):
                last: httpx.ConnectError | httpx.ConnectTimeout | None = None
                for address in await self.addresses.of(endpoint.tenant, url):
                    try:
                        return await self._post(url, address, headers, body)
                    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                        last = error
                assert last is not None, "a host has an address"
                raise last
        except (TimeoutError, httpx.TimeoutException):
            raise NotSentError("no response within the time limit") from None
        except httpx.ConnectError as error:
            raise NotSentError("no connection could be made" + _of_tls(error)) from None
        except httpx.TransportError:
            raise NotSentError("the connection was closed, or the response is not HTTP") from None

    async def _post(self, url: httpx.URL, address: str, headers: dict[str, str], body: str) -> int:
        """Send to this address, whatever the name resolves to now; the certificate must match the name."""
        timeout = httpx.Timeout(ATTEMPT_S, connect=CONNECT_S)
        request = httpx.Request(
            "POST",
            url.copy_with(host=address),
            headers=headers,
            content=body.encode(),
            extensions={"timeout": timeout.as_dict(), "sni_hostname": url.raw_host.decode("ascii")},
        )
        response = await self._transport.handle_async_request(request)
        await response.aclose()
        return response.status_code


def sample(kind: str, now: float) -> tuple[str, str]:
    """A sample event: its id and body."""
    event_id = new_event_id()
    return event_id, event_body(event_id, kind, {"id": "test"}, now)


def _of_tls(error: BaseException | None) -> str:
    """The TLS error, if that is why there is no connection."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f" (its certificate is not valid: {error.verify_message})"
        if isinstance(error, ssl.SSLError):
            return " (TLS negotiation failed)"
        error = error.__cause__ or error.__context__
    return ""
