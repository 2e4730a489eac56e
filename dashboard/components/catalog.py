"""Picks an adapter version from the registry: cached reads, the notice for an empty registry, the version selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import streamlit as st

from sources import adapters as data

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry import Version

REFRESH_S = 5
EMPTY = "The registry holds no adapters yet. `make demo` trains three; `pedro submit SPEC.yaml` trains yours."

read_catalog = st.cache_data(ttl=REFRESH_S, show_spinner="Reading the registry …")(data.read_catalog)
read_versions = st.cache_data(ttl=REFRESH_S, show_spinner=False)(data.read_versions)
read_stored = st.cache_data(ttl=60, show_spinner="Fetching the adapter …", max_entries=200)(data.read_stored)


def catalog_or_notice(settings: Settings) -> data.Catalog:
    """The catalog; where it is empty or cannot be read, the page says so."""
    catalog = read_catalog(settings)
    if catalog.problem:
        st.warning(f"The registry cannot be read.\n\n```\n{catalog.problem}\n```", icon=":material/database_off:")
    elif not catalog.rows:
        st.info(EMPTY, icon=":material/extension_off:")
    return catalog


def select_version(
    column: Any, versions: data.Versions, preferred: Version, label: Callable[[Version], str], key: str
) -> Version:
    """One of an adapter's versions, `preferred` until the reader picks another."""
    by_number = {version.version: version for version in versions.versions}
    number = column.selectbox(
        "Version",
        list(by_number),
        index=list(by_number).index(preferred.version),
        format_func=lambda held: label(by_number[held]),
        key=key,
    )
    return by_number[number]


def forget() -> None:
    """Drop cached reads after an alias has moved."""
    read_catalog.clear()
    read_versions.clear()
