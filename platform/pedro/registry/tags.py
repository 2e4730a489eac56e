"""The namespace of the platform's tags in MLflow: they begin with `pedro.`, which is spelled here only."""

from __future__ import annotations

from collections.abc import Mapping

PREFIX = "pedro."
PARENT = "mlflow.parentRunId"  # MLflow's own: the run that this one is a part of
RUN_NAME = "mlflow.runName"


def stored(tags: Mapping[str, str]) -> dict[str, str]:
    """Our tags as MLflow keeps them."""
    return {f"{PREFIX}{key}": value for key, value in tags.items()}


def ours(tags: Mapping[str, str]) -> dict[str, str]:
    """Those of MLflow's tags that are ours, as the platform calls them."""
    return {key.removeprefix(PREFIX): value for key, value in tags.items() if key.startswith(PREFIX)}
