"""The dashboard: its pages, and a login if other machines can reach it. A tenant's key opens that tenant's view.

Start it with `pedro dashboard`. A page is a file of `views/`, which only draws; what it shows comes from `sources/`,
which imports without Streamlit; larger pieces of pages are in `components/`.
"""

from __future__ import annotations

import time
from pathlib import Path

import streamlit as st

import connection
from drawing import STYLE
from pedro.config import Settings
from pedro.errors import AuthenticationError, PedroError
from sources import demo, login
from sources.gateway import MAKE_KEY

HERE = Path(__file__).parent
ICON = str(HERE / "icon.png")
PAGES = (
    ("overview", "Overview", ":material/dashboard:"),
    ("compare", "Compare", ":material/compare_arrows:"),
    ("train", "Train", ":material/model_training:"),
    ("runs", "Runs", ":material/play_circle:"),
    ("sweeps", "Sweeps", ":material/tune:"),
    ("activations", "Activations", ":material/show_chart:"),
    ("adapters", "Adapters", ":material/extension:"),
    ("usage", "Usage", ":material/receipt_long:"),
    ("serving", "Serving", ":material/speed:"),
    ("playground", "Playground", ":material/forum:"),
    ("demo", "Demo", ":material/flag:"),
)
START = "start"  # of the first page, which Streamlit serves at / alone
WRONG_KEY_S = 1.0  # a guess is answered late
ADMITTED = "admitted"  # in the session: the key of the login, which is looked up again at each run, and its reader
ASK_AGAIN_S = 5


def main() -> None:
    st.set_page_config(page_title="pedro", page_icon=ICON, layout="wide")
    st.logo(ICON, size="large")
    st.html(STYLE)
    reader = find_reader()
    st.session_state[connection.READER] = reader or login.NOBODY
    locked = reader is None
    pages = [
        st.Page(
            ask_for_key if locked else HERE / "views" / f"{name}.py",  # a link into the pages holds through the login
            title="pedro" if locked else title,
            icon=icon,
            url_path=START if name == "overview" else name,
            default=name == "overview",
        )
        for name, title, icon in PAGES
        if name != "demo" or (reader == login.OPERATOR and demo.result_path(Settings.from_env().home).is_file())
    ]

    def overview() -> None:
        st.switch_page(pages[0])

    pages.append(st.Page(overview, title="Overview", url_path="overview", visibility="hidden"))
    chosen = st.navigation(pages, position="hidden" if locked else "sidebar")
    if reader is not None and reader.tenant is not None:
        st.sidebar.caption(f":material/visibility: Only {reader.tenant}'s data")
    chosen.run()


def find_reader() -> login.Reader | None:
    """Who looks; None while that is to be told by a key."""
    settings = Settings.from_env()
    if not login.required():
        return typed(st.session_state.get(connection.KEY) or "", settings)
    admitted: tuple[str, login.Reader | None] = st.session_state.get(ADMITTED, ("", None))
    key, reader = admitted
    try:
        return admit(key, settings) if key else None
    except AuthenticationError:  # it was revoked, or has expired
        st.session_state.pop(ADMITTED)
        return None
    except PedroError:  # the gateway or the records are away for a moment
        return reader


admit = st.cache_data(ttl=ASK_AGAIN_S, show_spinner=False, max_entries=1000)(login.admit)
typed = st.cache_data(ttl=ASK_AGAIN_S, show_spinner=False, max_entries=1000)(login.reader_of_typed)


def ask_for_key() -> None:
    """The login: an admin key opens every tenant's view, a tenant's key its own."""
    st.title("pedro", anchor=False)
    with st.form("login", width=460):
        key = st.text_input("Key", type="password", autocomplete="current-password", placeholder="sk-pedro-…")
        st.caption(
            f"An admin key (`{MAKE_KEY}`) opens every tenant's view, a tenant's key its own "
            f"(`{login.MAKE_TENANT_KEY}`)."
        )
        asked = st.form_submit_button("Open", type="primary")
    if not asked:
        return
    try:
        reader = login.admit(key, Settings.from_env())
    except PedroError as error:
        time.sleep(WRONG_KEY_S)
        st.error(error.message, icon=":material/lock:")
        return
    st.session_state[ADMITTED] = key.strip(), reader
    st.session_state[connection.KEY] = key.strip()  # the pages that ask the gateway use it too
    st.rerun()


main()
