"""The login: who may look at a dashboard that more than this machine can reach. The holder of an admin key.

The key is checked by the gateway where one is named (`PEDRO_GATEWAY_URL`), else in this home's own key store.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pedro.errors import AuthenticationError, PedroError
from pedro.store import ADMIN, Store
from sources.gateway import MAKE_KEY, Access, GatewayClient, default_url

if TYPE_CHECKING:
    from pedro.config import Settings

REQUIRE_KEY = "PEDRO_DASHBOARD_REQUIRE_KEY"
NOT_ADMIN = f"This is not an admin key. `{MAKE_KEY}` makes one."


def required(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a key is asked for; `pedro dashboard` asks for one on every address but loopback."""
    return env.get(REQUIRE_KEY, "").lower() not in ("", "0", "false", "no")


def refusal(key: str, settings: Settings, env: Mapping[str, str] = os.environ) -> str:
    """Why this key opens nothing, for people; empty if it does."""
    key = key.strip()
    if not key:
        return "A key is needed."
    if env.get("PEDRO_GATEWAY_URL"):
        return _asked_at_the_gateway(GatewayClient(default_url(env), key))
    sqlite = settings.database_url.removeprefix("sqlite:///")
    if sqlite != settings.database_url and not Path(sqlite).is_file():
        return f"No key exists yet. `{MAKE_KEY}` makes one."
    store = None
    try:
        store = Store(settings.database_url)
        record, _ = store.authenticate(key)
    except AuthenticationError as error:
        return error.message
    except PedroError as error:
        return f"The key cannot be checked: {error.message}"
    finally:
        if store is not None:
            store.close()
    return "" if ADMIN in record.scopes else NOT_ADMIN


def _asked_at_the_gateway(gateway: GatewayClient) -> str:
    status = gateway.status()
    if status.problem:
        return f"The key cannot be checked: {status.problem}"
    return "" if status.access is Access.ADMIN else NOT_ADMIN
