"""Promote and roll back: two buttons and a confirmation; the gateway moves the alias."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd
import streamlit as st

import connection
from pedro.registry import CHAMPION, Version
from sources import adapters as data
from sources.gateway import GatewayClient, GatewayError

SAID = "moves_said"  # in the session: how the last change ended, and when
SHOWN_S = 60.0
YES, NO = "move_yes", "move_no"
Act = Callable[[], Mapping[str, Any]]
Moved = Callable[[str, int | None], None]
"""Called with the adapter and its champion, None where the move failed."""


def buttons(
    gateway: GatewayClient | None,
    chosen: Version,
    champion: Version | None,
    previous: Version | None,
    moved: Moved,
) -> None:
    """Both are off without a gateway that may do it; `moved` is called when an alias has moved, or may have."""
    promote, rollback, _ = st.columns([2, 2, 3])
    is_champion = champion is not None and chosen.version == champion.version
    promotes = promote.button(
        f"Promote v{chosen.version}",
        icon=":material/arrow_upward:",
        type="primary",
        disabled=gateway is None or is_champion,
        help="It is the champion already." if is_champion else None,
        width="stretch",
    )
    returns = rollback.button(
        f"Roll back to v{previous.version}" if previous else "Roll back",
        icon=":material/undo:",
        disabled=gateway is None or previous is None,
        help=None if previous else "There is no previous champion.",
        width="stretch",
    )
    if gateway is None:
        return
    name = chosen.name
    if promotes:
        title = f"Promote {name} to v{chosen.version}?"
        confirm_promotion(title, gateway, champion, chosen, lambda: gateway.promote(name, chosen.version), moved)
    elif returns and previous is not None:
        title = f"Roll {name} back to v{previous.version}?"
        confirm_promotion(title, gateway, champion, previous, lambda: gateway.rollback(name), moved)


def confirm_promotion(
    title: str, gateway: GatewayClient, old: Version | None, new: Version, act: Act, moved: Moved
) -> None:
    """A dialog that says what would change; the alias moves only from its button."""

    @st.dialog(title, width="medium")
    def ask() -> None:
        st.markdown("Requests that run end on the version that they began with; later ones get the new champion.")
        st.dataframe(pd.DataFrame([row("Now", old), row("Then", new)]), hide_index=True, width="stretch")
        if old is not None and old.digest == new.digest:
            st.info(
                f"v{old.version} and v{new.version} have the same weights (digest {data.short(new.digest)}): answers "
                "will not change.",
                icon=":material/equal:",
            )
        verdict, reason = data.gate_of(new)
        if verdict == "refused":
            st.warning(f"The gate refused v{new.version}: {reason}", icon=":material/block:")
        st.caption(f"Through {gateway.url}/v1/adapters")
        yes, no = st.columns(2)
        yes.button(
            "Yes, move it", type="primary", width="stretch", key=YES, on_click=carry_out, args=(new.name, act, moved)
        )
        no.button("Cancel", width="stretch", key=NO)
        if st.session_state.get(YES) or st.session_state.get(NO):
            st.rerun()

    ask()


def carry_out(name: str, act: Act, moved: Moved) -> None:
    """Move the alias; `show_outcome` says how it ended, beside the buttons."""
    champion: int | None = None
    try:
        champion = (act().get("aliases") or {}).get(CHAMPION)
        good, text = True, f"{name}: v{champion} is the champion now."
    except GatewayError as error:
        good, text = False, error.message
        connection.forget()
    st.session_state[SAID] = (name, good, text, time.monotonic())
    moved(name, champion)


def show_outcome(name: str) -> None:
    """How the last change of this adapter ended, for a while: the first run that draws it may be cut off."""
    of, good, text, at = st.session_state.get(SAID, ("", True, "", 0.0))
    if of == name and time.monotonic() - at < SHOWN_S:
        (st.success if good else st.error)(text, icon=":material/check:" if good else ":material/error:")


def show_outcome_elsewhere(name: str | None) -> None:
    """The same of an adapter that is not the one shown: it may be gone."""
    of = st.session_state.get(SAID, ("",))[0]
    if of and of != name:
        show_outcome(of)


def row(when: str, version: Version | None) -> dict[str, Any]:
    if version is None:
        return {"": when, "version": "none", "accuracy": "–", "method": "–", "digest": "–"}
    accuracy = data.number_of(version.metrics, "accuracy")
    return {
        "": when,
        "version": f"v{version.version}",
        "accuracy": "–" if accuracy is None else f"{accuracy:.1%}",
        "method": version.method,
        "digest": data.short(version.digest),
    }
