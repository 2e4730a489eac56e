"""Whose key this is, and what it opens: an admin key everything, a tenant's key what is its tenant's.

At a dashboard that more than this machine can reach each reader has to give one. Keys are looked up in this home's own
store, and where a gateway is named (`PEDRO_GATEWAY_URL`) admin keys are checked by that.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pedro.errors import AuthenticationError, UnavailableError
from pedro.store import ADMIN, READ, TRAIN
from pedro.store.keys import unknown_key
from sources.gateway import MAKE_KEY, Access, GatewayClient, default_url
from sources.stores import ask_store, is_there

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.store import KeyRecord, Store

REQUIRE_KEY = "PEDRO_DASHBOARD_REQUIRE_KEY"
MAKE_TENANT_KEY = "pedro keys create TENANT --scope read"


@dataclass(frozen=True)
class Reader:
    """Who looks. `tenant` is None for an operator, who sees every tenant."""

    tenant: str | None = None
    trains: bool = True


OPERATOR = Reader()
NOBODY = Reader("", trains=False)  # who has yet to log in: of no tenant


def required(env: Mapping[str, str] = os.environ) -> bool:
    """Whether a key is asked for; `pedro dashboard` asks for one on every address but loopback."""
    return env.get(REQUIRE_KEY, "").lower() not in ("", "0", "false", "no")


def admit(key: str, settings: Settings, env: Mapping[str, str] = os.environ) -> Reader:
    """Who the holder of this key is. Raises AuthenticationError that says why it opens nothing, and UnavailableError
    where that cannot be told now."""
    key = key.strip()
    if not key:
        raise AuthenticationError("A key is needed.")
    if env.get("PEDRO_GATEWAY_URL"):
        status = GatewayClient(default_url(env), key).status()
        if status.problem:
            raise UnavailableError(f"The key cannot be checked: {status.problem}")
        if status.access is Access.ADMIN:
            return OPERATOR
        if status.access is not Access.TENANT:
            raise AuthenticationError(f"The key is unknown or revoked. `{MAKE_KEY}` makes one.")
    elif not is_there(settings.database_url):
        raise AuthenticationError(f"No key exists yet. `{MAKE_KEY}` makes one.")
    record, problem = ask_store(settings, lambda store: _live_key(store, key), None)
    if problem:
        raise UnavailableError(f"The key cannot be checked: {problem}")
    if record is None:
        raise unknown_key()
    if ADMIN in record.scopes and not env.get("PEDRO_GATEWAY_URL"):
        return OPERATOR
    if record.adapters is not None:
        raise AuthenticationError("This key is restricted to some adapters, but these pages show the whole tenant.")
    if not {READ, TRAIN} & {*record.scopes}:
        raise AuthenticationError(f"This key may not look at jobs. `{MAKE_TENANT_KEY}` makes one that may.")
    return Reader(record.tenant, TRAIN in record.scopes)


def reader_of_typed(key: str, settings: Settings) -> Reader:
    """Who looks where nobody has to log in: a tenant, if that is whose key was typed, else an operator."""
    record, _ = ask_store(settings, lambda store: _live_key(store, key.strip()), None) if key.strip() else (None, "")
    if record is None or ADMIN in record.scopes:
        return OPERATOR
    return Reader(record.tenant, TRAIN in record.scopes)


def _live_key(store: Store, key: str) -> KeyRecord | None:
    try:
        return store.authenticate(key)[0]
    except AuthenticationError:
        return None
