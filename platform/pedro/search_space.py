"""Search spaces: which values a key may take, how they are searched, and lists of parameters drawn from a seed.

What the keys mean is no concern of this file.
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Iterator, Mapping
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from pedro.errors import ConfigError
from pedro.spec_reader import Frozen

Kind = Literal["grid", "choice", "uniform", "loguniform", "randint"]
KINDS: tuple[str, ...] = get_args(Kind)
LISTS = ("grid", "choice")
MOST = 100_000  # trials
DRAWS = 10
TRIES = 100  # draws in search of a combination that was not drawn before


class Dimension(Frozen):
    """The values of one key: `{grid: [3, 6, 12]}`, `{choice: [a, b]}`, `{uniform: [0, 0.2]}`,
    `{loguniform: [1e-4, 1e-1]}` or `{randint: [2, 9]}` (both ends included).

    All values of a grid are tried, with every combination of the others; of a choice one is drawn for each trial.
    """

    kind: Kind
    values: tuple[Any, ...]

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: Any) -> Any:
        if isinstance(value, Mapping) and value.keys() == {"kind", "values"}:
            return value
        kinds = f"one of {', '.join(KINDS)} with its values, for instance {{loguniform: [1e-4, 1e-1]}}"
        if not isinstance(value, Mapping) or len(value) != 1:
            raise ValueError(f"expected {kinds}")
        ((kind, values),) = value.items()
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is not a kind of search space; expected {kinds}")
        if not isinstance(values, (list, tuple)):
            raise ValueError(f"{kind}: expected a list of values")
        return {"kind": kind, "values": [_number(item) for item in values]}

    @model_validator(mode="after")
    def _sensible(self) -> Dimension:
        if self.kind in LISTS:
            if not self.values:
                raise ValueError(f"{self.kind}: expected at least one value")
            if len({_key(value) for value in self.values}) < len(self.values):
                raise ValueError(f"{self.kind}: a value appears twice")
            return self
        whole = self.kind == "randint"
        if len(self.values) != 2 or not all(_is_number(value, whole) for value in self.values):
            raise ValueError(f"{self.kind}: expected [lowest, highest], two {'whole ' if whole else ''}numbers")
        low, high = self.values
        if not low < high:
            raise ValueError(f"{self.kind}: the lowest value must be less than the highest")
        if self.kind == "loguniform" and low <= 0:
            raise ValueError("loguniform: the lowest value must be more than 0")
        return self

    @property
    def listed(self) -> bool:
        """Whether its values are a list rather than a range."""
        return self.kind in LISTS

    def draw(self, generator: random.Random) -> Any:
        """One value by chance; a grid counts as a choice here."""
        if self.listed:
            return generator.choice(self.values)
        low, high = self.values
        if self.kind == "randint":
            return generator.randint(low, high)
        if self.kind == "uniform":
            return rounded(generator.uniform(low, high), low, high)
        return rounded(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)


Space = Mapping[str, Dimension]
Parameters = dict[str, Any]


class SearchSpec(Frozen):
    """What is tried."""

    algorithm: Literal["random", "grid", "optuna"] = "random"
    """random: `trials` draws, each with every combination of the grids; grid: every combination of grids and choices;
    optuna: Optuna's TPE sampler, which learns from the trials before."""
    trials: int | None = Field(None, ge=1, le=MOST)
    """How many draws; 10 if not given, and 1 where the space has grids alone. Not for algorithm grid."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Of the draws; each trial's own seed is training.seed."""

    def draws(self, space: Space) -> int:
        """How many draws the search makes."""
        return self.trials or (1 if all(each.kind == "grid" for each in space.values()) else DRAWS)

    def check(self, space: Space) -> None:
        """Raise ValueError for a space that is not searched so."""
        grids = [key for key, dimension in space.items() if dimension.kind == "grid"]
        if self.trials is not None and self.algorithm == "grid":
            raise ValueError("search.trials: algorithm grid tries every combination; leave it out")
        if self.trials is not None and self.algorithm == "random" and len(grids) == len(space):
            raise ValueError("search.trials: the space has grids alone, and every combination is tried; leave it out")
        if self.algorithm == "optuna" and grids:
            raise ValueError(f"space.{grids[0]}: optuna chooses what it tries; give a choice instead of a grid")

    def planned(self, space: Space) -> list[Parameters] | None:
        """What will be tried, in order; None where each trial depends on the ones before. Raises ConfigError."""
        if self.algorithm == "optuna":
            return None
        return every(space) if self.algorithm == "grid" else drawn(space, self.draws(space), self.seed)


class SchedulerSpec(Frozen):
    """Which trials are stopped early."""

    name: Literal["asha", "none"] = "asha"
    """asha (Li et al. 2020, arXiv 1810.05934): at each rung the best 1/reduction of the trials continue."""
    grace_steps: int | None = Field(None, ge=1, le=10**9)
    """Steps that every trial gets; base.training.eval_every if not given. Rungs lie at grace_steps × reduction^k."""
    reduction: float = Field(3, ge=1.1, le=1000)
    """What divides the number of trials at each rung, and multiplies their steps."""


def every(space: Space) -> list[Parameters]:
    """All combinations of a space of lists, in the order of the file."""
    for key, dimension in space.items():
        if not dimension.listed:
            raise ConfigError(
                f"space.{key}: a {dimension.kind} has no list of values to go through; give a grid, or set "
                "search.algorithm to random or optuna",
                param=f"space.{key}",
            )
    _bound(space, 1)
    return list(_product(space))


def drawn(space: Space, trials: int, seed: int) -> list[Parameters]:
    """`trials` different draws of all but the grids, each with every combination of the grids.

    Raises ConfigError where there are fewer.
    """
    grids = {key: dimension for key, dimension in space.items() if dimension.kind == "grid"}
    _bound(grids, trials)
    rest = {key: dimension for key, dimension in space.items() if dimension.kind != "grid"}
    generator = random.Random(seed)  # noqa: S311
    seen: dict[str, Parameters] = {}
    for _ in range(trials * TRIES):
        if len(seen) == trials:
            break
        draw = {key: dimension.draw(generator) for key, dimension in rest.items()}
        seen.setdefault(_key(draw), draw)
    if len(seen) < trials:
        raise ConfigError(
            f"search.trials: {trials} different trials were asked for, but the space holds about {len(seen)}; lower it "
            "or set search.algorithm=grid",
            param="search.trials",
        )
    return [_ordered(space, {**draw, **combination}) for draw in seen.values() for combination in _product(grids)]


def _bound(grids: Space, trials: int) -> None:
    """Raise ConfigError where the grids make more combinations than anybody could train."""
    combinations = trials * math.prod(len(dimension.values) for dimension in grids.values())
    if combinations > MOST:
        raise ConfigError(
            f"space: {combinations:,} trials, and a sweep may have {MOST:,}; take values out of the grids",
            param="space",
        )


def rounded(value: float, low: float, high: float) -> float:
    """Six digits are enough to say and to repeat what was tried."""
    return min(max(float(f"{value:.6g}"), float(low)), float(high))


def _product(space: Space) -> Iterator[Parameters]:
    for values in itertools.product(*(dimension.values for dimension in space.values())):
        yield dict(zip(space, values, strict=True))


def _ordered(space: Space, parameters: Parameters) -> Parameters:
    return {key: parameters[key] for key in space}


def _key(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-3 as text; everybody means the number. "nan" and "inf" stay what they are."""
    if isinstance(value, str):
        try:
            number = float(value)
        except ValueError:
            return value
        return number if math.isfinite(number) else value
    return value


def _is_number(value: Any, whole: bool) -> bool:
    kinds = (int,) if whole else (int, float)
    if not isinstance(value, kinds) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond any float
        return False
