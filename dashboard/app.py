"""The operators' dashboard: its pages and what they share. Drawing only.

Start it with `pedro dashboard` (or `streamlit run dashboard/app.py`). A page is a file of `views/`, what it shows comes
from `sources/`, which imports without Streamlit.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

HERE = Path(__file__).parent
PAGES = (
    ("overview", "Overview", ":material/dashboard:"),
    ("compare", "Compare", ":material/compare_arrows:"),
    ("runs", "Runs", ":material/play_circle:"),
    ("sweeps", "Sweeps", ":material/tune:"),
    ("activations", "Activations", ":material/show_chart:"),
    ("adapters", "Adapters", ":material/extension:"),
    ("serving", "Serving", ":material/speed:"),
    ("playground", "Playground", ":material/forum:"),
)


def main() -> None:
    st.set_page_config(page_title="pedro", page_icon=str(HERE / "icon.png"), layout="wide")
    st.logo(str(HERE / "icon.png"), size="large")
    pages = [
        st.Page(HERE / "views" / f"{name}.py", title=title, icon=icon, url_path=name, default=name == "overview")
        for name, title, icon in PAGES
        if (HERE / "views" / f"{name}.py").is_file()
    ]
    st.navigation(pages).run()


main()
