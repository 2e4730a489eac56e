"""Prompts that the reader saved, in the browser's own storage, apart for each gateway and key: no server keeps them."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import streamlit as st

if TYPE_CHECKING:
    from collections.abc import Callable

    from sources.gateway import GatewayClient

MOST = 50
HELD = "saved_prompts"
OF = "saved_prompts_of"
CHANGED = "saved_prompts_changed"
LABEL_CHARS = 80
SCRIPT = """
export default function ({ data, parentElement, setStateValue }) {
  const at = "pedro.prompts." + data.area;
  try {
    if (data.prompts !== null) {
      localStorage.setItem(at, JSON.stringify(data.prompts));
    } else if (parentElement.pedroRead !== at) {
      parentElement.pedroRead = at;
      setStateValue("kept", localStorage.getItem(at) || "[]");
    }
  } catch (error) {
    setStateValue("kept", "[]");
  }
}
"""


def load(gateway: GatewayClient) -> list[str]:
    """Those of this gateway and key, the last saved first; to be called once in a run, on the page itself."""
    area = hashlib.sha256(f"{gateway.url}\n{gateway.key}".encode()).hexdigest()[:24]
    if st.session_state.get(OF) != area:
        st.session_state.update({OF: area, HELD: [], CHANGED: False})
    prompts = list(st.session_state[HELD]) if st.session_state[CHANGED] else None
    told = _browser()(key=f"browser_{area}", data={"area": area, "prompts": prompts}, on_kept_change=_nothing)
    if prompts is None:
        st.session_state[HELD] = _read(getattr(told, "kept", None))
    return list(st.session_state[HELD])


def save(prompt: str) -> None:
    """Keep a prompt as the first one."""
    others = [kept for kept in st.session_state.get(HELD, []) if kept != prompt]
    st.session_state.update({HELD: [prompt, *others][:MOST], CHANGED: True})


def forget(prompt: str) -> None:
    st.session_state.update({HELD: [kept for kept in st.session_state.get(HELD, []) if kept != prompt], CHANGED: True})


def choose(prompts: list[str], use: Callable[[str], None]) -> None:
    """A list of them: one that is picked goes to `use`."""

    def picked() -> None:
        prompt = st.session_state.get("saved_prompt")
        if prompt:
            use(prompt)

    left, right = st.columns([5, 3], vertical_alignment="bottom")
    chosen = left.selectbox(
        "Saved prompts",
        prompts,
        index=None,
        key="saved_prompt",
        format_func=label,
        placeholder="Choose one" if prompts else "None in this browser yet",
        on_change=picked,
        disabled=not prompts,
    )
    right.button(
        "Forget",
        icon=":material/delete:",
        width="stretch",
        disabled=chosen is None,
        on_click=lambda: forget(str(chosen)),
    )


def label(prompt: str) -> str:
    line = " ".join(prompt.split())
    return line if len(line) <= LABEL_CHARS else f"{line[: LABEL_CHARS - 1]}…"


@st.cache_resource(show_spinner=False)
def _browser() -> Any:
    return st.components.v2.component("pedro_saved_prompts", js=SCRIPT)


def _read(told: Any) -> list[str]:
    """What the browser had, which anybody may have written there."""
    try:
        kept = json.loads(told or "[]")
    except (TypeError, ValueError):
        return []
    return [text for text in kept if isinstance(text, str)][:MOST] if isinstance(kept, list) else []


def _nothing() -> None:
    """A run of the page is all that is needed."""
