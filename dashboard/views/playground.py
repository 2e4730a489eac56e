"""Playground: one prompt to up to three models at once, their answers side by side as they stream."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import streamlit as st

import connection
from components import answers, saved_prompts
from pedro.errors import NotFoundError
from pedro.refs import ModelRef
from sources import adapters as registry
from sources import playground as data
from sources import test_file
from sources.compare import literal
from sources.gateway import Access, GatewayClient, GatewayError
from sources.services import gateway_url

if TYPE_CHECKING:
    from pedro.config import Settings
    from sources.test_file import TestRow

LOOK_S = 0.08  # between two looks at what has come
LONGEST_S = 300.0
CHAT, RAW = "Chat", "Raw"
HELD = "playground_answers"
ASKED = "playground_asked"  # and what they answer
WANTED = "playground_wanted"  # and the answer that a test file has
PROMPT = "playground_prompt"
ROW = "playground_row"  # the prompt that was taken from a test file, and the answer that it wants
CHOSEN = "playground_models"
OFFERED = "playground_offered"  # whether there was anything to choose when the page was drawn last
REFRESH_S = 5


read_tested = st.cache_data(ttl=60, show_spinner=False, max_entries=100)(test_file.rows_of)


class Asking(NamedTuple):
    """How to ask."""

    sampling: data.Sampling
    chat: bool
    probabilities: bool


def page() -> None:
    settings = connection.settings()
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
    asking = options()
    prompts = saved_prompts.load(gateway) if able else []
    if able:
        offered(settings, gateway, names, models, prompts)
    with st.form("ask", border=False):
        st.session_state.setdefault(PROMPT, "play some jazz music")
        prompt = st.text_area("Prompt", key=PROMPT, persist_state="session", height=100)
        send, stop, keep, _ = st.columns([2, 2, 2, 3])
        pressed = send.form_submit_button(
            "Send", icon=":material/send:", type="primary", width="stretch", disabled=not able
        )
        stop.form_submit_button(
            "Stop", icon=":material/stop:", width="stretch", help="Stops answers that are still streaming."
        )
        keep.form_submit_button(
            "Save",
            icon=":material/bookmark:",
            width="stretch",
            disabled=not able,
            help="Keeps the prompt in this browser, for this key.",
            on_click=lambda: saved_prompts.save(st.session_state[PROMPT]),
        )
    if pressed and not prompt.strip():
        st.warning("Type a prompt.", icon=":material/edit:")
    elif pressed and not models:
        st.warning("Choose a model.", icon=":material/checklist:")
    elif pressed:
        stream(gateway, models, prompt, asking)
        return
    answers.draw(st.session_state.get(HELD, ()), st.session_state.get(WANTED, ""))
    answers.after(st.session_state.get(HELD, ()), gateway.url, st.session_state.get(ASKED))


def adapter_of(model: str) -> str:
    """The `tenant.adapter` that a model is a version of; empty for a backbone."""
    try:
        return ModelRef.parse(model).name
    except NotFoundError:
        return ""


def offered(
    settings: Settings, gateway: GatewayClient, names: Sequence[str], models: Sequence[str], prompts: list[str]
) -> None:
    """Prompts to take: saved ones, and rows of the first adapter's test file, if this gateway serves it to this key."""
    left, right = st.columns(2)
    with left:
        saved_prompts.choose(prompts, use)
    model = next((name for name in models if adapter_of(name)), "")
    served = {adapter_of(name) for name in names}
    with right:
        if not model or adapter_of(model) not in served or gateway.url != gateway_url(settings):
            return
        rows, problem = read_tested(settings, model)
        by_line = {row.line: row for row in rows}
        line = st.selectbox(
            f"Rows of the test file of {model}",
            list(by_line),
            index=None,
            key=f"tested_{model}",
            format_func=lambda line: f"{line}: {saved_prompts.label(by_line[line].prompt)}",
            placeholder="Choose one" if rows else problem or "None that one message can ask",
            disabled=not rows,
            on_change=lambda: take(by_line, f"tested_{model}"),
        )
        if line is not None:
            st.caption(f"Wanted: {literal(by_line[line].wanted)}")


def use(prompt: str, wanted: str = "") -> None:
    """Put a prompt into the box; `wanted` is the answer to it, if one is known."""
    st.session_state[PROMPT] = prompt
    st.session_state[ROW] = (prompt, wanted)


def take(by_line: dict[int, TestRow], key: str) -> None:
    row = by_line.get(st.session_state.get(key, -1))
    if row is not None:
        use(row.prompt, row.wanted)


def choose_at_first(names: list[str]) -> None:
    """Choose for a key that is new here, unless something is chosen: it may be typed long after the page was opened."""
    if names and not st.session_state.get(OFFERED) and not st.session_state.get(CHOSEN):
        asked = st.query_params.get("model", "")
        st.session_state[CHOSEN] = data.beside_backbone(asked, names) if asked else data.first_choice(names)
    st.session_state[OFFERED] = bool(names)


def options() -> Asking:
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
        probabilities = one.toggle(
            "Token probabilities", help="Shades tokens, and tells the likeliest others on hover."
        )
    sampling = data.Sampling(
        int(max_tokens), temperature, top_p, int(top_k), penalty, None if seed is None else int(seed)
    )
    return Asking(sampling, shape != RAW, probabilities)


@st.cache_data(ttl=REFRESH_S, show_spinner=False, max_entries=50)
def model_names(url: str, key: str) -> list[str]:
    """What the key may ask for; with it the candidates and previous versions that the registry names."""
    try:
        served = data.model_names(GatewayClient(url, key).models())
    except GatewayError:
        return []
    rows = {row.name: row for row in registry.read_catalog(connection.settings()).rows}
    others = [
        str(replace(ModelRef.parse(name), alias=alias))
        for name in served
        if name in rows
        for alias, version in (("candidate", rows[name].candidate), ("previous", rows[name].previous))
        if version is not None
    ]
    return data.model_names({"id": name} for name in [*served, *others])


def stream(gateway: GatewayClient, models: Sequence[str], prompt: str, asking: Asking) -> None:
    """Ask, and draw what comes until all have ended. A press of any button ends this run, and with it the answers."""
    asked = data.asked_prompt(prompt, asking.chat, asking.sampling, asking.probabilities)
    of_row, answer = st.session_state.get(ROW, ("", ""))
    wanted = answer if of_row == prompt else ""
    st.session_state.update({HELD: (), ASKED: asked, WANTED: wanted})
    running = data.ParallelAnswers(gateway, models, asked)
    area = st.empty()
    deadline = time.monotonic() + LONGEST_S
    try:
        while not running.wait(LOOK_S) and time.monotonic() < deadline:
            with area.container():
                answers.draw(running.answers(), wanted)
    finally:
        running.cancel()
        st.session_state[HELD] = tuple(running.answers())
    with area.container():
        answers.draw(running.answers(), wanted)
    answers.after(running.answers(), gateway.url, asked)


if __name__ == "__main__":
    page()
