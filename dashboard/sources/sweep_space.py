"""Search spaces as the Train page offers them, and a sweep's trials from its job's events."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

WIDTHS = {"pedro": "Bottleneck sizes r", "lora": "Ranks r"}  # of methods that the page names and that have one
WIDTH_CHOICES = [2, 4, 8, 12, 16, 24, 32, 48, 64]
WIDTH_DEFAULT = [4, 8, 12, 16]
RATIONAL = ("pedro",)
ORDERS = [(6, 5), (1, 0), (2, 1), (3, 2), (4, 3), (5, 4), (8, 7), (6, 0)]
ORDERS_DEFAULT = [(6, 5), (4, 3), (2, 1)]
ALGORITHMS = {"random": "drawn at random", "optuna": "proposed by Optuna"}
TRIALS, MOST_TRIALS = 8, 100
EVERY = 20
TITLES = {"method.r": "r", "method.orders": "the orders", "training.lr": "the learning rate"}


def listed(key: str, values: Sequence[Any]) -> dict[str, Any]:
    """The key with the values that it may take; nothing where there is no choice to make, or it is as it is."""
    return {key: {"choice": list(values)}} if values else {}


def whole_numbers(given: Iterable[Any]) -> list[Any]:
    """Numbers as they were picked or typed, each once; what is none stays, for the API to refuse by name."""
    made = [int(value) if str(value).strip().isdecimal() else value for value in given]
    return list(dict.fromkeys(made))


def said(space: Mapping[str, Any]) -> str:
    """What varies, in words; a list of one value does not."""
    names = [TITLES.get(key, key) for key, values in space.items() if len(next(iter(values.values()))) > 1]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 2 else names) or "nothing"


class SweepChoice(NamedTuple):
    """A sweep as it was chosen: the section `sweep` of a job's request, and the steps from validation to validation."""

    section: dict[str, Any]
    eval_every: int


def sweep(space: Mapping[str, Any], algorithm: str, trials: int, *, every: int, early: bool) -> SweepChoice:
    """`early`: weak trials are stopped at a validation."""
    scheduler = {"name": "asha", "grace_steps": every, "reduction": 2} if early else {"name": "none"}
    search = {"algorithm": algorithm, "trials": trials}
    return SweepChoice({"space": dict(space), "search": search, "scheduler": scheduler}, every)


def sweep_of(job: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The section of a job that the API tells of; None for a job that is no sweep."""
    told: Mapping[str, Any] | None = (job["method"].get("pedro") or {}).get("sweep")
    return told


def trials_told(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a trial that has ended, in order; of one that was run again, how it ended last."""
    found: dict[int, dict[str, Any]] = {}
    for event in events:
        data = event.get("data") or {}
        if "trial" in data:
            found[int(data["trial"])] = {
                "trial": int(data["trial"]),
                "state": str(data["state"]),
                "loss": data.get("valid_loss"),
                "step": data.get("step"),
                **{key: str(value) if isinstance(value, list) else value for key, value in data["parameters"].items()},
            }
    return [found[number] for number in sorted(found)]


def planned(events: Iterable[Mapping[str, Any]]) -> int | None:
    """How many trials there are to be, once one has ended."""
    totals = [int(event["data"]["trials"]) for event in events if "trials" in (event.get("data") or {})]
    return totals[-1] if totals else None
