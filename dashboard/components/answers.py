"""The Playground's answers: columns as they stream, beside what was wanted, and afterwards their differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import streamlit as st

from pedro.errors import PedroError
from pedro.refs import ModelRef
from sources.answer_html import difference_html, tokens_html
from sources.request_code import as_curl, as_python

if TYPE_CHECKING:
    from sources import playground as data

ENDS = {"stop": "finished", "length": "reached the token limit", "cancelled": "stopped", "": ""}


def draw(answers: Sequence[data.StreamedAnswer], wanted: str = "") -> None:
    """A column an answer."""
    if not answers:
        return
    if wanted:
        st.caption("Expected, from the test file:")
        st.code(wanted, language=None, wrap_lines=True)
    for column, answer in zip(st.columns(len(answers), gap="medium"), answers, strict=True):
        with column.container(border=True):
            st.markdown(f"**{answer.model}**{mark(answer, wanted)}")
            version(answer)
            if answer.error:
                st.error(answer.error, icon=":material/error:")
            if answer.done and answer.seen:
                st.html(tokens_html(answer.shown))
            else:
                st.code(answer.text or ("" if answer.done else "…"), language=None, wrap_lines=True)
            st.caption(timing(answer))


def mark(answer: data.StreamedAnswer, wanted: str) -> str:
    """Whether it is the wanted one to the letter, blanks around it apart."""
    if not wanted or not answer.done or answer.error:
        return ""
    right = answer.text.strip() == wanted.strip()
    return " :green[:material/check: as wanted]" if right else " :red[:material/close: not as wanted]"


def version(answer: data.StreamedAnswer) -> None:
    """Which one answered, with the way to it."""
    try:
        answered = ModelRef.parse(answer.version)
    except PedroError:  # the backbone, or nobody yet
        st.caption(" ")
        return
    st.page_link(
        "views/adapters.py",
        label=answer.version,
        icon=":material/extension:",
        query_params={"adapter": answered.name, "version": str(answered.version)},
    )


def after(answers: Sequence[data.StreamedAnswer], url: str, asked: data.AskedPrompt | None) -> None:
    """What is to be seen of answers that have ended: where they differ, and the request as code."""
    whole = [answer for answer in answers if answer.done and answer.text]
    if any(answer.seen for answer in whole):
        st.caption("The less probable a token was, the more orange; its probability and the likeliest others on hover.")
    if len(whole) > 1:
        with st.expander("Differences", icon=":material/difference:"):
            for other in whole[1:]:
                st.caption(f"{other.model}, with what {whole[0].model} alone says struck out")
                st.html(difference_html(whole[0].text, other.text))
    if answers and asked is not None:
        with st.expander("This request as code", icon=":material/code:"):
            body = {"model": answers[0].model, **asked.body}
            for name, language, text in (
                ("curl", "bash", as_curl(url, asked.path, body)),
                ("Python", "python", as_python(url, asked.path, body)),
            ):
                st.caption(name)
                st.code(text, language=language, wrap_lines=True)


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
