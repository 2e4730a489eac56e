"""Whose a connection is that a kept port passes on (`serving/door.py`): its first line names the client's address.

The line is signed with the token of this home's Ray head, which the proxy and `pedro serve` have: nobody else can take
another address. Knows nothing of HTTP.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

WORD = b"PEDRO-PASSES-ON "
LONGEST = 160  # of the line: an address and a digest
MOST_HELD = 1024
"""So many connections a kept port holds, and so many the proxy lets come from there whose line it has not read yet."""


def shared_key(env: Mapping[str, str] = os.environ) -> bytes | None:
    """What the line is signed with; None where there is no token, or where the proxy is not bounded by us."""
    if "pedro.gateway.connections" not in env.get("RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH", ""):
        return None
    try:
        token = Path(env.get("RAY_AUTH_TOKEN_PATH", "")).read_bytes().strip()
    except OSError:
        return None
    return hashlib.sha256(b"pedro: passed connections\n" + token).digest() if token else None


def line_for(address: str, key: bytes) -> bytes:
    """The line that goes before whatever the client says."""
    return b"%s%s %s\r\n" % (WORD, address.encode(), _signed(address.encode(), key))


def read_line(said: bytes, key: bytes) -> tuple[str, bytes] | None:
    """The client's address and what it said, or "" and all of it where it does not begin with such a line; None while
    that cannot be told yet."""
    if WORD.startswith(said[: len(WORD)]):
        line, end, rest = said.partition(b"\r\n")
        if not end and len(said) < LONGEST:
            return None
        address, _, signature = line[len(WORD) :].partition(b" ")
        if end and hmac.compare_digest(signature, _signed(address, key)):
            return address.decode(), rest
    return "", said


def plain(address: str) -> str:
    """An IPv4 address as itself where a socket for both kinds writes it as one of IPv6."""
    with suppress(ValueError):
        mapped = getattr(ipaddress.ip_address(address), "ipv4_mapped", None)
        return address if mapped is None else str(mapped)
    return address


def counted_as(address: str) -> str:
    """What is one client: an address, of IPv6 its network, of which a single host has 2⁶⁴."""
    with suppress(ValueError):
        if ":" in address:
            return str(ipaddress.ip_network((address.partition("%")[0], 64), strict=False))
    return address


def _signed(address: bytes, key: bytes) -> bytes:
    return hmac.new(key, address, "sha256").hexdigest().encode()
