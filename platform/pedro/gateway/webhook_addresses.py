"""Addresses to which webhooks may be sent: tenants must not reach internal hosts through the gateway (SSRF).

A URL is parsed once, by the library that sends; its host is resolved only here, and the connection goes to a checked
address. So neither DNS rebinding nor unusual spellings of an address reach internal hosts. Lookups run on separate
threads, few per tenant, so that an unresponsive name server only delays the tenant that uses it.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import httpx

from pedro.errors import PedroError

MAX_URL = 2048  # characters
MAX_ADDRESSES = 8  # of one host that are checked
THREADS, THREADS_PER_TENANT = 32, 4
LOOKUP_S = 5.0
HOST = re.compile(rb"[a-z0-9._-]{1,253}|[0-9a-f:.]{2,45}")  # a name, or an address
CLOUDS_OWN = ipaddress.IPv4Address("168.63.129.16")  # looks public, but is internal to Azure's machines
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class WebhookUrlError(PedroError):
    """No webhook may be sent to this URL."""

    code = "invalid_webhook_url"

    def __init__(self, why: str) -> None:
        super().__init__(f"url: {why}", param="url")
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.why,)


class Addresses:
    """`networks`: allowed private networks, also without TLS. `lookup` resolves names, by default as the host does."""

    def __init__(self, networks: Sequence[str] = (), lookup: Callable[[str, int], list[str]] | None = None) -> None:
        self._networks = [ipaddress.ip_network(network) for network in networks]
        self._lookup = lookup or _lookup
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pedro-webhook-dns")
        self._busy: Counter[str] = Counter()

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def of(self, tenant: str, url: httpx.URL) -> list[str]:
        """The current addresses of a tenant's URL, all of them allowed. Raises WebhookUrlError."""
        port = url.port or (443 if url.scheme == "https" else 80)
        try:
            async with asyncio.timeout(LOOKUP_S):
                found = await asyncio.wrap_future(self._begin(tenant, url.raw_host.decode("ascii"), port))
        except (OSError, UnicodeError, TimeoutError):
            raise WebhookUrlError(f"its host {url.host[:80]!r} has no address") from None
        addresses = [ipaddress.ip_address(one.partition("%")[0]) for one in dict.fromkeys(found)][:MAX_ADDRESSES]
        own = [self._is_own(address) for address in addresses]
        if not all(mine or _is_public(address) for mine, address in zip(own, addresses, strict=True)):
            raise WebhookUrlError(f"its host {url.host[:80]!r} is not on the public network")
        if url.scheme != "https" and not all(own):
            raise WebhookUrlError("expected https://")
        return [str(address) for address in addresses]

    def _begin(self, tenant: str, host: str, port: int) -> Future[list[str]]:
        if self._busy[tenant] >= THREADS_PER_TENANT:
            raise WebhookUrlError("the addresses of your other webhooks are still being looked up; try again")
        self._busy[tenant] += 1
        loop, begun = asyncio.get_running_loop(), self._threads.submit(self._lookup, host, port)

        def ended(_: Future[list[str]]) -> None:  # the caller may be gone, the loop may be closed
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._end, tenant)

        begun.add_done_callback(ended)
        return begun

    def _end(self, tenant: str) -> None:
        self._busy[tenant] -= 1
        if not self._busy[tenant]:
            del self._busy[tenant]

    def _is_own(self, address: Address) -> bool:
        return any(address.version == network.version and address in network for network in self._networks)


def read_url(text: str) -> httpx.URL:
    """A tenant's URL, normalised for sending; its host is not resolved yet. Raises WebhookUrlError."""
    if len(text) > MAX_URL:
        raise WebhookUrlError(f"expected at most {MAX_URL} characters, got {len(text)}")
    if not text.isascii() or not text.isprintable() or " " in text or "\\" in text:
        raise WebhookUrlError("expected printable ASCII without spaces and backslashes; percent-encode everything else")
    try:
        url = httpx.URL(text)
        port_is_one = url.port is None or 0 < url.port < 2**16
    except (httpx.InvalidURL, ValueError) as error:
        raise WebhookUrlError(f"is not a URL ({error})") from None
    if url.scheme not in ("https", "http") or not HOST.fullmatch(url.raw_host) or not port_is_one:
        raise WebhookUrlError("expected for instance https://example.com/hooks")
    if url.userinfo or "@" in re.split(r"[/?#]", text.partition("://")[2], maxsplit=1)[0]:
        raise WebhookUrlError("must not contain user or password; check the signature instead")
    if url.fragment:
        raise WebhookUrlError("must not have a fragment (#…), which is never sent")
    return url


def _is_public(address: Address) -> bool:
    """Whether it is a public address, and not a private one in another notation."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved or address == CLOUDS_OWN)
    if address.ipv4_mapped is not None:
        return _is_public(address.ipv4_mapped)
    tunnel = address.sixtofour is not None or address.teredo is not None
    return address.is_global and not (tunnel or address.is_multicast or address.is_reserved or address.is_site_local)


def _lookup(host: str, port: int) -> list[str]:
    return [str(found[4][0]) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
