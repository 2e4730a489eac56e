"""Signing secrets of webhook endpoints, and signatures as OpenAI's clients check them; no HTTP and no SQL.

A secret is an HMAC over endpoint and salt by a key of the platform's: the database holds the salt, a file on the hosts
of the gateways the key, and neither alone the secret.
Reference: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

from pedro.errors import ConfigError, UnavailableError
from pedro.key_files import KeyFile
from pedro.store import SecretSource, WebhookEndpoint, new_webhook_id

if TYPE_CHECKING:
    from pathlib import Path

PREFIX = "whsec_"
log = logging.getLogger("pedro.gateway")


class WebhookSecrets:
    """Makes secrets by the keys of one file, which is made with the first of them."""

    def __init__(self, file: Path) -> None:
        self._keys = KeyFile(file, "PEDRO_WEBHOOK_KEY_FILE")

    def new_endpoint(
        self, tenant: str, name: str, url: str, event_types: tuple[str, ...], now: float
    ) -> tuple[WebhookEndpoint, str]:
        """An endpoint that was not entered yet, and its secret."""
        endpoint_id = new_webhook_id()
        source, secret = self.new(endpoint_id)
        return WebhookEndpoint(endpoint_id, tenant, name, url, event_types, (source,), hint(secret), now, now), secret

    def new(self, endpoint_id: str) -> tuple[SecretSource, str]:
        """Another secret of an endpoint, and what it is made of. Raises UnavailableError without a key."""
        try:
            key = self._keys.first()
        except ConfigError as error:
            raise _no_key(error) from error
        source = SecretSource(secrets.token_hex(16), _name(key))
        return source, _secret(key, endpoint_id, source.salt)

    def of(self, endpoint: WebhookEndpoint, now: float) -> list[str]:
        """The secrets that sign for an endpoint, the newest first. Raises UnavailableError without the newest's key."""
        try:
            keys = {_name(key): key for key in self._keys.all()}
        except ConfigError as error:
            raise _no_key(error) from error
        wanted = [one for one in endpoint.secrets if one.until is None or now < one.until]
        if wanted[0].key not in keys:
            raise UnavailableError("its signing secret cannot be made here any more; rotate it", code="webhook_secret")
        return [_secret(keys[one.key], endpoint.id, one.salt) for one in wanted if one.key in keys]


def hint(secret: str) -> str:
    """A secret for people: enough to tell it from another."""
    return f"{PREFIX}…{secret[-5:]}"


def signed_headers(signing: Sequence[str], event_id: str, timestamp: int, body: str) -> dict[str, str]:
    """The headers of one attempt, which a receiver takes for five minutes after `timestamp` (Unix seconds)."""
    content = f"{event_id}.{timestamp}.{body}".encode()
    macs = [hmac.new(base64.b64decode(one.removeprefix(PREFIX)), content, hashlib.sha256).digest() for one in signing]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(mac).decode()}" for mac in macs),
    }


def _no_key(error: ConfigError) -> UnavailableError:
    """For tenants; operators have the reason in the log."""
    log.error("no webhook can be signed: %s", error.message)
    return UnavailableError("This server has no key for the secrets of webhooks.", code="webhook_key_file")


def _name(key: bytes) -> str:
    """What a key is called where it must not stand."""
    return hashlib.sha256(b"pedro webhook key" + key).hexdigest()[:16]


def _secret(key: bytes, endpoint_id: str, salt: str) -> str:
    text = json.dumps(["pedro webhook secret", endpoint_id, salt]).encode()
    return PREFIX + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
