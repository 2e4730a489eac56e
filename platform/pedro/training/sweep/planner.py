"""The parameters of the next trial: the next in a list, or Optuna's proposal based on earlier trials.

When a sweep is resumed, the planner is rebuilt from the trials begun so far; it has no state that a kill could lose.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Protocol

from pedro.search_space import Dimension, Parameters, rounded
from pedro.training.sweep.records import Trial, TrialState
from pedro.training.sweep.variants import planned_trials

if TYPE_CHECKING:
    from pedro.training.sweep.spec import SweepSpec


class TrialPlanner(Protocol):
    """Where parameters come from."""

    total: int
    """Trials in all."""

    def propose(self, number: int) -> Parameters:
        """Parameters for the trial `number`, counted from 0 and less than `total`."""

    def learn(self, trial: Trial) -> None:
        """Learn the result of a trial that has ended."""


def make_planner(spec: SweepSpec, begun: Iterable[Trial]) -> TrialPlanner:
    """The planner of a spec, given the trials begun before."""
    planned = planned_trials(spec)
    return OptunaPlanner(spec, begun) if planned is None else ListPlanner(planned)


class ListPlanner:
    """Iterates over a list."""

    def __init__(self, planned: list[Parameters]) -> None:
        self._planned, self.total = planned, len(planned)

    def propose(self, number: int) -> Parameters:
        return self._planned[number]

    def learn(self, trial: Trial) -> None:
        """No effect: the list is fixed."""


class OptunaPlanner:
    """Optuna's TPE sampler (https://optuna.readthedocs.io, `TPESampler`), through ask and tell."""

    def __init__(self, spec: SweepSpec, begun: Iterable[Trial]) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        begun = list(begun)
        self.total = spec.search.draws(spec.space)
        self._space = spec.space
        self._distributions = {key: _distribution(dimension) for key, dimension in spec.space.items()}
        # a resumed sampler must not repeat the first one's draws
        sampler = optuna.samplers.TPESampler(seed=spec.search.seed * 1_000_003 + len(begun))
        self._study = optuna.create_study(direction="minimize", sampler=sampler)
        self._asked: dict[int, Any] = {}
        for trial in begun:
            if trial.state.final:
                self._study.add_trial(self._as_told(trial))

    def propose(self, number: int) -> Parameters:
        asked = self._study.ask(self._distributions)
        self._asked[number] = asked
        return {key: _value(dimension, asked.params[key]) for key, dimension in self._space.items()}

    def learn(self, trial: Trial) -> None:
        asked = self._asked.pop(trial.number, None)
        if asked is None:  # begun before a kill, so not asked for in this study
            self._study.add_trial(self._as_told(trial))
            return
        import optuna.trial

        loss = _told(trial)
        self._study.tell(
            asked, loss, state=optuna.trial.TrialState.FAIL if loss is None else optuna.trial.TrialState.COMPLETE
        )

    def _as_told(self, trial: Trial) -> Any:
        import optuna.trial

        loss = _told(trial)
        inside = {key: _inside(dimension, trial.parameters[key]) for key, dimension in self._space.items()}
        state = optuna.trial.TrialState.FAIL if loss is None else optuna.trial.TrialState.COMPLETE
        return optuna.trial.create_trial(state=state, value=loss, params=inside, distributions=self._distributions)


def _told(trial: Trial) -> float | None:
    """The loss reported to Optuna; None for a failure. For trials stopped early, their last loss."""
    return trial.loss if trial.state in (TrialState.FINISHED, TrialState.STOPPED) else None


def _distribution(dimension: Dimension) -> Any:
    """Lists are represented by index, since Optuna only supports scalars and `orders` are pairs."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if dimension.listed:
        return CategoricalDistribution(tuple(range(len(dimension.values))))
    low, high = dimension.values
    if dimension.kind == "randint":
        return IntDistribution(low, high)
    return FloatDistribution(low, high, log=dimension.kind == "loguniform")


def _value(dimension: Dimension, inside: Any) -> Any:
    if dimension.listed:
        return dimension.values[inside]
    return inside if dimension.kind == "randint" else rounded(inside, *dimension.values)


def _inside(dimension: Dimension, value: Any) -> Any:
    return dimension.values.index(value) if dimension.listed else value
