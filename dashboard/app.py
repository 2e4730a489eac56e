"""The operators' dashboard: its pages, and a login where others than this machine can reach it.

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
from sources import demo, login

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
    ("serving", "Serving", ":material/speed:"),
    ("playground", "Playground", ":material/forum:"),
    ("demo", "Demo", ":material/flag:"),
)
START = "start"  # of the first page, which Streamlit serves at / alone
WRONG_KEY_S = 1.0  # a guess is answered late


def main() -> None:
    st.set_page_config(page_title="pedro", page_icon=ICON, layout="wide")
    st.logo(ICON, size="large")
    st.html(STYLE)
    locked = login.required() and not st.session_state.get("admitted")
    pages = [
        st.Page(
            ask_for_key if locked else HERE / "views" / f"{name}.py",  # a link into the pages holds through the login
            title="pedro" if locked else title,
            icon=icon,
            url_path=START if name == "overview" else name,
            default=name == "overview",
        )
        for name, title, icon in PAGES
        if name != "demo" or demo.result_path(Settings.from_env().home).is_file()
    ]

    def overview() -> None:
        st.switch_page(pages[0])

    pages.append(st.Page(overview, title="Overview", url_path="overview", visibility="hidden"))
    st.navigation(pages, position="hidden" if locked else "sidebar").run()


def ask_for_key() -> None:
    """The login: an admin key, since every page shows every tenant."""
    st.title("pedro", anchor=False)
    with st.form("login", width=460):
        key = st.text_input("Admin key", type="password", autocomplete="current-password", placeholder="sk-pedro-…")
        st.caption("These pages show every tenant. `pedro keys create ops --scope admin` makes a key.")
        asked = st.form_submit_button("Open", type="primary")
    if not asked:
        return
    problem = login.refusal(key, Settings.from_env())
    if problem:
        time.sleep(WRONG_KEY_S)
        st.error(problem, icon=":material/lock:")
        return
    st.session_state["admitted"] = True
    st.session_state[connection.KEY] = key.strip()  # the pages that ask the gateway use it too
    st.rerun()


main()
