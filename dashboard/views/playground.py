"""Playground: one prompt to up to three models at once, their answers side by side as they stream."""

from __future__ import annotations

import time
from collections.abc import Sequence

import streamlit as st

import connection
from pedro.config import Settings
from sources import adapters as registry
from sources import playground as data
from sources.gateway import Access, GatewayClient, GatewayError

LOOK_S = 0.08  # between two looks at what has come
LONGEST_S = 300.0
CHAT, RAW = "Chat", "Raw"
HELD = "playground_answers"
CHOSEN = "playground_models"
OFFERED = "playground_offered"  # whether there was anything to choose when the page was drawn last
REFRESH_S = 5
ENDS = {"stop": "ended by itself", "length": "as long as allowed", "cancelled": "stopped", "": ""}


def page() -> None:
    gateway, status = connection.sidebar()
    st.title("Playground", anchor=False)
    able = status.answers and status.access in (Access.TENANT, Access.ADMIN)
    if not able:
        connection.missing(gateway, status, "The Playground", "a key (`pedro keys create TENANT` makes one)")
    names = model_names(gateway.url, gateway.key) if able else []
    choose_at_first(names)
    models = st.multiselect(
        "Models",
        names,
        key=CHOSEN,
        persist_state="session",
        max_selections=data.MOST_COLUMNS,
        accept_new_options=True,
        placeholder="an adapter, a version of one, or the backbone",
        help="Up to three: adapters, a version (`acme.support:2`), an alias (`acme.support@candidate`), the backbone. "
        "What is not listed can be typed.",
    )
    sampling, shape = options()
    with st.form("ask", border=False):
        prompt = st.text_area(
            "Prompt", "play some jazz music", key="playground_prompt", persist_state="session", height=100
        )
        send, stop, _ = st.columns([2, 2, 5])
        pressed = send.form_submit_button(
            "Send", icon=":material/send:", type="primary", width="stretch", disabled=not able
        )
        stop.form_submit_button("Stop", icon=":material/stop:", width="stretch", help="Ends answers that still stream.")
    if pressed and not prompt.strip():
        st.warning("Type a prompt.", icon=":material/edit:")
    elif pressed and not models:
        st.warning("Choose a model.", icon=":material/checklist:")
    elif pressed:
        stream(gateway, models, prompt, shape == CHAT, sampling)
        return
    draw(st.session_state.get(HELD, ()))


def choose_at_first(names: list[str]) -> None:
    """Choose for a key that is new here, unless something is chosen: it may be typed long after the page was opened."""
    if names and not st.session_state.get(OFFERED) and not st.session_state.get(CHOSEN):
        asked = st.query_params.get("model", "")
        st.session_state[CHOSEN] = data.beside_backbone(asked, names) if asked else data.first_choice(names)
    st.session_state[OFFERED] = bool(names)


def options() -> tuple[data.Sampling, str]:
    """How to ask, and how answers are drawn."""
    with st.expander("Sampling", icon=":material/tune:"):
        one, two, three = st.columns(3)
        shape = one.radio(
            "Prompt as",
            (CHAT, RAW),
            horizontal=True,
            help="Chat: a message, in the format that the adapter was trained on. Raw: the text as it stands.",
        )
        max_tokens = one.number_input("Tokens at most", 1, 4096, 64)
        temperature = two.slider("Temperature", 0.0, 2.0, 0.0, 0.1, help="0 is greedy.")
        top_p = two.slider("Top-p", 0.05, 1.0, 1.0, 0.05)
        top_k = three.number_input("Top-k", 0, 1000, 0, help="0 is off.")
        seed = three.number_input("Seed", min_value=0, max_value=2**31, value=None, placeholder="by chance")
        penalty = two.slider("Repetition penalty", 1.0, 2.0, 1.0, 0.05)
    chosen = data.Sampling(
        int(max_tokens), temperature, top_p, int(top_k), penalty, None if seed is None else int(seed)
    )
    return chosen, shape or CHAT


@st.cache_data(ttl=REFRESH_S, show_spinner=False, max_entries=50)
def model_names(url: str, key: str) -> list[str]:
    """What the key may ask for; with it the candidates and previous versions that the registry names."""
    try:
        served = data.model_names(GatewayClient(url, key).models())
    except GatewayError:
        return []
    rows = {row.name: row for row in registry.read_catalog(Settings.from_env()).rows}
    others = [
        f"{name}@{alias}"
        for name in served
        if name in rows
        for alias, version in (("candidate", rows[name].candidate), ("previous", rows[name].previous))
        if version is not None
    ]
    return data.model_names({"id": name} for name in [*served, *others])


def stream(gateway: GatewayClient, models: Sequence[str], prompt: str, chat: bool, sampling: data.Sampling) -> None:
    """Ask, and draw what comes until all have ended. A press of any button ends this run, and with it the answers."""
    st.session_state[HELD] = ()
    running = data.ParallelAnswers(gateway, models, prompt, chat, sampling)
    area = st.empty()
    deadline = time.monotonic() + LONGEST_S
    try:
        while not running.wait(LOOK_S) and time.monotonic() < deadline:
            with area.container():
                draw(running.answers())
    finally:
        running.cancel()
        st.session_state[HELD] = tuple(running.answers())
    with area.container():
        draw(running.answers())


def draw(answers: Sequence[data.StreamedAnswer]) -> None:
    """A column an answer."""
    if not answers:
        return
    for column, answer in zip(st.columns(len(answers), gap="medium"), answers, strict=True):
        with column.container(border=True):
            st.markdown(f"**{answer.model}**")
            st.caption(answer.version if answer.version not in ("", answer.model) else " ")
            if answer.error:
                st.error(answer.error, icon=":material/error:")
            st.code(answer.text or ("" if answer.done else "…"), language=None, wrap_lines=True)
            st.caption(timing(answer))


def timing(answer: data.StreamedAnswer) -> str:
    """What is known of its times so far."""
    if answer.first_token_s is None:
        return "" if answer.done else "waiting for the first token …"
    figures = [f"first token {1000 * answer.first_token_s:,.0f} ms", f"latency {1000 * answer.seconds:,.0f} ms"]
    if answer.tokens:
        figures.append(f"{answer.tokens:,} tokens")
    if answer.tokens_per_s is not None:
        figures.append(f"**{answer.tokens_per_s:,.0f} tokens/s**")
    if ENDS.get(answer.finish_reason, answer.finish_reason):
        figures.append(ENDS.get(answer.finish_reason, answer.finish_reason))
    return " · ".join(figures)


if __name__ == "__main__":
    page()
