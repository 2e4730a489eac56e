"""Signing secrets of webhook endpoints, and signatures that OpenAI's clients can verify; no HTTP and no SQL.

A secret is an HMAC of endpoint and salt under a platform key: the salt is in the database, the key in a file on the
gateways' hosts, and neither alone reveals the secret.
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
    """Derives secrets from the keys of one file, which is created with the first secret."""

    def __init__(self, file: Path) -> None:
        self._keys = KeyFile(file, "PEDRO_WEBHOOK_KEY_FILE")

    def new_endpoint(
        self, tenant: str, name: str, url: str, event_types: tuple[str, ...], now: float
    ) -> tuple[WebhookEndpoint, str]:
        """A new endpoint, not stored yet, and its secret."""
        endpoint_id = new_webhook_id()
        source, secret = self.new(endpoint_id)
        return WebhookEndpoint(endpoint_id, tenant, name, url, event_types, (source,), hint(secret), now, now), secret

    def new(self, endpoint_id: str) -> tuple[SecretSource, str]:
        """A new secret for an endpoint, and its salt. Raises UnavailableError without a key."""
        try:
            key = self._keys.first()
        except ConfigError as error:
            raise _no_key(error) from error
        source = SecretSource(secrets.token_hex(16), _name(key))
        return source, _secret(key, endpoint_id, source.salt)

    def of(self, endpoint: WebhookEndpoint, now: float) -> list[str]:
        """The signing secrets of an endpoint, newest first. Raises UnavailableError if the newest's key is missing."""
        try:
            keys = {_name(key): key for key in self._keys.all()}
        except ConfigError as error:
            raise _no_key(error) from error
        wanted = [one for one in endpoint.secrets if one.until is None or now < one.until]
        if wanted[0].key not in keys:
            raise UnavailableError("its signing secret can no longer be derived here; rotate it", code="webhook_secret")
        return [_secret(keys[one.key], endpoint.id, one.salt) for one in wanted if one.key in keys]


def hint(secret: str) -> str:
    """A shortened secret for display."""
    return f"{PREFIX}…{secret[-5:]}"


def signed_headers(signing: Sequence[str], event_id: str, timestamp: int, body: str) -> dict[str, str]:
    """The headers of one attempt, which a receiver accepts for five minutes after `timestamp` (Unix seconds)."""
    content = f"{event_id}.{timestamp}.{body}".encode()
    macs = [hmac.new(base64.b64decode(one.removeprefix(PREFIX)), content, hashlib.sha256).digest() for one in signing]
    return {
        "webhook-id": event_id,
        "webhook-timestamp": str(timestamp),
        "webhook-signature": " ".join(f"v1,{base64.b64encode(mac).decode()}" for mac in macs),
    }


def _no_key(error: ConfigError) -> UnavailableError:
    """The error for tenants; the log has the reason for operators."""
    log.error("no webhook can be signed: %s", error.message)
    return UnavailableError("This server has no key for webhook secrets.", code="webhook_key_file")


def _name(key: bytes) -> str:
    """An id for a key that does not reveal it."""
    return hashlib.sha256(b"pedro webhook key" + key).hexdigest()[:16]


def _secret(key: bytes, endpoint_id: str, salt: str) -> str:
    text = json.dumps(["pedro webhook secret", endpoint_id, salt]).encode()
    return PREFIX + base64.b64encode(hmac.new(key, text, hashlib.sha256).digest()).decode()
