"""What a shared URL asks for: an unknown name is an error that names it, not silently another one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import streamlit as st


def check(key: str, known: Collection[str], what: str, remedy: str, *, settled: bool = False) -> bool:
    """Whether the URL's parameter `key` names nothing but what is known; otherwise the page says what it names.

    To be called before the widget that is bound to `key`, which takes an unknown value out of the URL. The error stays
    until the reader chooses something, which `settled` says of a widget that is not bound.
    """
    kept = f"unknown_{key}"
    if settled:
        st.session_state.pop(kept, None)
        return True
    if missing := [value for value in st.query_params.get_all(key) if value not in known]:
        st.session_state[kept] = missing
    elif st.session_state.get(key):
        st.session_state.pop(kept, None)
    missing = st.session_state.get(kept, [])
    if missing:
        names = ", ".join(f"`{value[:120].replace('`', '')}`" for value in missing[:5])
        st.error(f"{what} {names}: not found. {remedy}", icon=":material/search_off:")
    return not missing


def choose(
    label: str,
    options: Sequence[str],
    key: str,
    *,
    titles: Mapping[str, str],
    what: str,
    placeholder: str,
    empty: bool = False,
) -> str | None:
    """A selectbox over ids that shows their titles and keeps the id in the URL, where a bound widget would keep titles.

    None while the URL asks for one that is not there, or with `empty` until the reader chooses.
    """
    settled = st.session_state.get(key) is not None
    known = check(key, options, what, "Choose one of those below.", settled=settled)
    asked = st.query_params.get(key)
    if key not in st.session_state and asked in options:
        st.session_state[key] = asked
    chosen = st.selectbox(
        label,
        options,
        index=0 if known and not empty else None,
        format_func=lambda option: titles.get(option, option),
        key=key,
        placeholder=placeholder,
    )
    if chosen is not None and st.query_params.get(key) != chosen:
        st.query_params[key] = chosen
    return chosen
