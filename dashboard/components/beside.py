"""Two jobs or two versions beside each other: parameters that differ, measurements, curves overlaid."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import streamlit as st

from components.job_details import curves
from sources import differences as data

if TYPE_CHECKING:
    from pedro.config import Settings
    from sources.differences import Side


def beside(settings: Settings, one: Side, other: Side, where: str) -> None:
    """`where` tells the widgets of one place on the page from those of another."""
    names = {"one": one.name, "other": other.name}
    left, right = st.columns([3, 2], gap="large")
    with left:
        st.markdown("**Parameters that differ**")
        rows = data.parameters(one, other)
        if rows:
            columns = {key: st.column_config.TextColumn(name) for key, name in names.items()}
            st.dataframe(
                pd.DataFrame(rows),
                hide_index=True,
                width="stretch",
                column_config={"what": st.column_config.TextColumn("Parameter", pinned=True), **columns},
            )
        else:
            st.caption("None: both were submitted with the same parameters.")
    with right:
        st.markdown("**Measured**")
        measured = data.metrics(one, other)
        if measured:
            shown = {key: st.column_config.NumberColumn(name, format="%.4g") for key, name in names.items()}
            st.dataframe(
                pd.DataFrame(measured, columns=["metric", *names, "more"]),
                hide_index=True,
                width="stretch",
                column_config={
                    "metric": st.column_config.TextColumn("Metric", pinned=True),
                    **shown,
                    "more": st.column_config.NumberColumn(
                        "More", format="%+.4g", help=f"{one.name} minus {other.name}"
                    ),
                },
            )
        else:
            st.caption("Nothing was measured of either.")
    curves(settings, {**one.runs, **other.runs}, "Neither recorded a curve.", where)
