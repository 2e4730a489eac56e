"""Webhook endpoints for tests of the store, which sends nothing."""

from __future__ import annotations

from collections.abc import Sequence

from pedro.store import EVENT_TYPES, SecretSource, WebhookEndpoint

MADE = 1_900_000_000.0  # after anything that tests do


def stub_endpoint(
    name: str = "hook", tenant: str = "acme", event_types: Sequence[str] = EVENT_TYPES, salt: str = "salt"
) -> WebhookEndpoint:
    """An endpoint `we_NAME` that was not entered yet."""
    source, url = SecretSource(salt, "key"), "https://example.com/secret-path"
    return WebhookEndpoint(f"we_{name}", tenant, name, url, tuple(event_types), (source,), "whsec_…", MADE, MADE)
