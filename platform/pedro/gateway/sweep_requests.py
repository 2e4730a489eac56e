"""The section `sweep` of a fine-tuning request: many trials of one job, the best of which becomes the version.

Checks that do not need the files are made at once, by field; each trial's values are checked together with the files.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from pydantic import Field, ValidationError

from pedro.errors import ConfigError, PedroError
from pedro.search_space import Dimension, SchedulerSpec, SearchSpec
from pedro.spec_reader import Frozen, mistakes

SECTION = "method.pedro.sweep"
MOST_TRIALS, MOST_KEYS, MOST_VALUES = 100, 16, 64
VARY = ("method", "training")  # sections whose keys may vary; data, resources and gate are the same for every trial
ONE_METHOD = ("name", "peft_type")
SHOWN = ("name", "space", "search", "scheduler", "concurrency")


class SweepRequest(Frozen):
    """The section as in a spec of `pedro sweep`, without the job."""

    name: str = Field("search", pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")
    """The sweep's name among those of its adapter."""
    space: dict[str, Dimension] = Field(min_length=1, max_length=MOST_KEYS)
    """Dotted keys of the sections method and training, each with the values that it may take."""
    search: SearchSpec = SearchSpec()
    scheduler: SchedulerSpec = SchedulerSpec()
    concurrency: int | None = Field(None, ge=1, le=MOST_TRIALS)
    """Maximum number of concurrent trials; default: as many as fit."""


def sweep_of(given: Any, spec: Mapping[str, Any]) -> dict[str, Any]:
    """The section of a job's spec. Raises PedroError naming invalid fields."""
    try:
        asked = SweepRequest.model_validate(given)
    except ValidationError as error:
        where = ".".join(str(part) for part in error.errors()[0]["loc"])
        raise _wrong(
            f"{SECTION}.{where}".rstrip("."), f"{SECTION}: " + "; ".join(mistakes(error, SweepRequest))
        ) from None
    for key, dimension in asked.space.items():
        _check_key(key, dimension, "parent" in spec)
    try:
        asked.search.check(asked.space)
        _check_count(asked)
        asked.search.planned(asked.space)
    except (ValueError, ConfigError) as error:
        message = error.message if isinstance(error, ConfigError) else str(error)
        raise _wrong(f"{SECTION}.{message.partition(': ')[0]}", f"{SECTION}.{message}") from None
    return asked.model_dump(mode="json")


def shown_sweep(spec: Mapping[str, Any]) -> dict[str, Any] | None:
    """The description of a job that is a sweep; None for any other."""
    section = spec.get("sweep")
    return {name: section[name] for name in SHOWN if name in section} if isinstance(section, dict) else None


def _check_key(key: str, dimension: Dimension, goes_on: bool) -> None:
    section, _, option = key.partition(".")
    field = f"{SECTION}.space.{key[:80]}"
    if section not in VARY or not option or "." in option:
        raise _wrong(field, f"{field}: cannot vary; a key is method.OPTION or training.OPTION")
    if section == "method" and option in ONE_METHOD:
        raise _wrong(field, f"{field}: cannot vary; a sweep tries settings of one method")
    if section == "method" and goes_on:
        raise _wrong(field, f"{field}: cannot vary; trials start from a model and keep its method")
    if len(dimension.values) > MOST_VALUES:
        raise _wrong(field, f"{field}: expected at most {MOST_VALUES} values, got {len(dimension.values)}")


def _check_count(asked: SweepRequest) -> None:
    """Count before expanding them into a list."""
    listed = ("grid", "choice") if asked.search.algorithm == "grid" else ("grid",)
    combinations = math.prod(len(each.values) for each in asked.space.values() if each.kind in listed)
    trials = combinations * (1 if asked.search.algorithm == "grid" else asked.search.draws(asked.space))
    if trials > MOST_TRIALS:
        raise _wrong(
            f"{SECTION}.search.trials",
            f"{SECTION}: {trials:,} trials, but a sweep over HTTP may have {MOST_TRIALS}; lower search.trials, or "
            "remove values from the space",
        )


def _wrong(field: str, message: str) -> PedroError:
    return PedroError(message, param=field, code="invalid_value")
