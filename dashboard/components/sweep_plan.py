"""What a sweep varies, chosen on the Train page: r, orders, the learning rate; how many trials, how they end."""

from __future__ import annotations

from typing import Any

import streamlit as st

from sources import sweep_space as data


def choose(method: str) -> data.SweepChoice | None:
    """None for a space in which nothing varies, which is said."""
    space: dict[str, Any] = {}
    left, right = st.columns(2)
    if label := data.WIDTHS.get(method):
        widths = left.multiselect(
            label,
            data.WIDTH_CHOICES,
            default=data.WIDTH_DEFAULT,
            key="train_sweep_widths",
            persist_state="session",
            accept_new_options=True,
            help="Each trial has one of them; others can be typed.",
        )
        space |= data.listed("method.r", data.whole_numbers(widths))
    if method in data.RATIONAL:
        orders = right.multiselect(
            "Orders (m, n) of the activation",
            data.ORDERS,
            default=data.ORDERS_DEFAULT,
            format_func=lambda pair: f"({pair[0]}, {pair[1]})",
            key="train_sweep_orders",
            persist_state="session",
            help="Of the rational function between the bottleneck's two layers; the paper's are (6, 5).",
        )
        space |= data.listed("method.orders", [list(pair) for pair in orders])
    numbers = st.columns(4)
    low = numbers[0].number_input(
        "Learning rate from", 1e-7, 10.0, 1e-3, 1e-4, format="%.2g", key="train_sweep_from", persist_state="session"
    )
    high = numbers[1].number_input(
        "to", 1e-7, 10.0, 3e-2, 1e-4, format="%.2g", key="train_sweep_to", persist_state="session"
    )
    trials = numbers[2].number_input(
        "Trials", 1, data.MOST_TRIALS, data.TRIALS, key="train_sweep_trials", persist_state="session"
    )
    every = numbers[3].number_input(
        "Validate every",
        1,
        10**6,
        data.EVERY,
        key="train_sweep_every",
        persist_state="session",
        help="Steps. Weak trials are stopped at such a validation.",
    )
    how, stops = st.columns(2, vertical_alignment="bottom")
    algorithm = how.segmented_control(
        "Trials are",
        list(data.ALGORITHMS),
        default="random",
        required=True,
        format_func=lambda name: data.ALGORITHMS[name],
        key="train_sweep_algorithm",
        persist_state="session",
    )
    early = stops.toggle("Stop weak trials early (ASHA)", True, key="train_sweep_early", persist_state="session")
    if low < high:
        space["training.lr"] = {"loguniform": [float(low), float(high)]}
    elif low == high:
        space["training.lr"] = {"choice": [float(low)]}
    else:
        st.error("Learning rate: the lower bound is above the upper one.", icon=":material/error:")
        return None
    if data.said(space) == "nothing":
        st.error("Nothing varies: choose more than one value of something.", icon=":material/error:")
        return None
    st.caption(
        f"{int(trials)} trials with different values of {data.said(space)}; the one with the least validation loss "
        "becomes the version. The learning rate above applies where the sweep does not vary it."
    )
    return data.sweep(space, str(algorithm or "random"), int(trials), every=int(every), early=early)
