"""The sidebar's connection to the gateway: address, this session's key, and what the key gives access to."""

from __future__ import annotations

import streamlit as st

from pedro.config import Settings
from sources import login
from sources.gateway import MAKE_KEY, START, Access, GatewayClient, GatewayStatus, gateway_client
from sources.services import gateway_url
from sources.view import View, tenant_seen

ASK_AGAIN_S = 5
KEY = "gateway_key"  # in the session; the login of app.py puts its key there
READER = "reader"  # in the session: who looks, as app.py found at this run of a page
ACCESS_LABELS = {
    Access.NONE: ":orange[:material/key_off:] answers; no key",
    Access.UNKNOWN: ":red[:material/key_off:] answers; unknown or revoked key",
    Access.TENANT: ":green[:material/key:] answers; a tenant's key",
    Access.ADMIN: ":green[:material/verified_user:] answers; admin key",
}


def settings() -> Settings:
    """The environment as this session's reader sees it: a tenant sees its own alone."""
    own = Settings.from_env()
    reader: login.Reader = st.session_state.get(READER, login.OPERATOR)
    return own if reader.tenant is None else View.of(own, reader.tenant, reader.trains)


def sidebar() -> tuple[GatewayClient, GatewayStatus]:
    """Draw it; returns the client and what its key gives access to. The key stays in the session."""
    with st.sidebar:
        st.subheader("Gateway", anchor=False)
        own, logged_in = gateway_url(Settings.from_env()), login.required()
        tenant = tenant_seen(settings()) if logged_in else None
        url = own  # a tenant who had to log in may send the dashboard nowhere else, nor use its key
        if tenant is None:
            url = st.text_input(
                "Address",
                own,
                key="gateway_url",
                persist_state="session",
                help="At first PEDRO_GATEWAY_URL, else where this home serves.",
            )
        typed = st.text_input(
            "API key",
            key=KEY,
            persist_state="session",
            type="password",
            autocomplete="off",
            placeholder="PEDRO_ADMIN_KEY is set" if _client(url, "", own, tenant).key else "sk-pedro-…",
            help=f"An admin key (`{MAKE_KEY}`) moves aliases and sees every tenant; a tenant's own key is enough for "
            "the Playground. It stays in this session. PEDRO_ADMIN_KEY, if set, goes to this home's own gateway alone.",
        )
        gateway = _client(url, typed, own, tenant)
        status = _status(gateway.url, gateway.key)
        if not status.answers:
            st.caption(f":red[:material/cloud_off:] {status.problem}")
        elif status.problem:
            st.caption(f":orange[:material/warning:] {status.problem}")
        else:
            st.caption(ACCESS_LABELS[status.access] + ("" if status.ready else "; not ready yet"))
    return gateway, status


def _client(url: str, typed: str, own: str, tenant: str | None) -> GatewayClient:
    return gateway_client(url, typed, own) if tenant is None else gateway_client(url, typed, own, {})


def missing(
    gateway: GatewayClient, status: GatewayStatus, what: str, key: str = f"an admin key (`{MAKE_KEY}` makes one)"
) -> None:
    """Say which command provides what the page lacks."""
    if status.answers:
        st.info(f"{what} needs {key}. Paste it in the sidebar.", icon=":material/key:")
    else:
        st.info(
            f"{what} needs the gateway, and {gateway.url} does not answer. Start it with `{START}`, or give another "
            "address in the sidebar.",
            icon=":material/cloud_off:",
        )


def forget() -> None:
    """Drop the cached status."""
    _status.clear()


@st.cache_data(ttl=ASK_AGAIN_S, show_spinner=False, max_entries=100)
def _status(url: str, key: str) -> GatewayStatus:
    return GatewayClient(url, key).status()
