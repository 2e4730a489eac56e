"""What a gateway, or a Prometheus, observed: one copy for all sessions and pages, refreshed when due."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import streamlit as st

from pedro.traffic.history import FINE_S
from sources.prometheus import PrometheusHistory
from sources.serving import History

if TYPE_CHECKING:
    from sources.gateway import GatewayClient

LONG_S = 86400.0


def history_of(gateway: GatewayClient, seconds: float) -> History:
    """The history that holds the last `seconds`: the fine one where that reaches back far enough."""
    return _history(gateway.url, hashlib.sha256(gateway.key.encode()).hexdigest(), seconds <= FINE_S)


def kept_elsewhere(url: str, seconds: float) -> PrometheusHistory:
    """The last `seconds` as a Prometheus has them. It tells everything to whoever asks: ask for operators alone."""
    return _prometheus(url.rstrip("/"), seconds)


def refresh(gateway: GatewayClient, history: History, seconds: float, now: float) -> str:
    """Ask for what is new if it is time to; why the last asking failed, or nothing."""
    if history.due(now):
        history.problem = history.refresh(gateway, FINE_S if seconds <= FINE_S else LONG_S)
    return history.problem


@st.cache_resource(max_entries=16, show_spinner=False)
def _history(url: str, key_digest: str, fine: bool) -> History:  # noqa: ARG001 - part of the key
    """What a key opened is shown only to those who hold it."""
    return History()


@st.cache_resource(max_entries=16, show_spinner=False)
def _prometheus(url: str, seconds: float) -> PrometheusHistory:
    return PrometheusHistory(url=url, seconds=seconds)
