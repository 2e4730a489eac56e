"""What must be said beside a table so that nobody takes it for more than it is: budgets, seeds, intervals, failures.

Knows nothing of how tables are made or shown.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from pedro.comparison.layout import current
from pedro.comparison.results import Cell, Comparison
from pedro.comparison.statistics import DRAWS, FEWEST

if TYPE_CHECKING:
    from pedro.comparison.tables import Entry


NEAR = 0.1  # of a budget: what is farther from it is told


def notes_of(comparison: Comparison, entries: Sequence[Entry], average: str) -> tuple[str, ...]:
    """Sentences for the caption of the table that holds `entries`; `average` is its column over the tasks."""
    labels = {entry.label for entry in entries}
    groups = {(entry.backbone, entry.budget) for entry in entries}
    shown, others = current(comparison)
    cells = [cell for cell in shown if cell.label in labels and (cell.backbone, cell.budget) in groups]
    tasks = [entry for entry in entries if entry.task != average]
    notes = [
        _equal(comparison, cells, tasks),
        _values(entries, average),
        _learning_rates(comparison, cells),
        _intervals(tasks),
        _best(entries),
        _chance(tasks),
        _rows(tasks),
        *_failures(tasks),
        *_mixed(cells),
    ]
    if others:
        notes.append(f"{others} earlier runs with other settings are in the folder and not in the table.")
    if comparison.problems:
        count = len(comparison.problems)
        notes.append(f"{count} file{'s' * (count > 1)} could not be read: {'; '.join(comparison.problems[:3])}.")
    return tuple(note for note in notes if note)


def _equal(comparison: Comparison, cells: Sequence[Cell], tasks: Sequence[Entry]) -> str:
    """Which budget is equal."""
    ended = [cell for cell in cells if cell.finished]
    if not ended:
        return f"Equal for all methods: {comparison.equal}. No run has finished yet."
    if uncounted := list(dict.fromkeys(cell.label for cell in ended if not cell.steps)):
        unknown = ", ".join(uncounted)
        return f"Whether compute or training rows are equal was not compared: no steps are known of {unknown}."
    batches = _range({cell.training.get("batch_size") for cell in ended} - {None})
    steps = _by_task(ended, lambda cell: cell.steps)
    compute = f"the same training rows; steps: {steps}" + (f"; rows a step: {batches}" if batches else "")
    more = dict.fromkeys(cell.label for cell in ended if cell.optimizer_steps > cell.steps)
    took = ", ".join(f"{label} up to {max(c.optimizer_steps for c in ended if c.label == label):,}" for label in more)
    extra = f"; counting those for parameters that learn from rows of their own, {took}" if more else ""
    sizes = _range({entry.parameters for entry in tasks if entry.parameters})
    budget = next((cell.budget for cell in ended if cell.budget), None)
    if comparison.equal == "parameters":
        near = f", as near to {budget:,} as a method's size allows" if budget else ""
        far = {
            e.label: e.parameters
            for e in tasks
            if budget and e.parameters and abs(e.parameters - budget) > NEAR * budget
        }
        near += f"; not near it: {', '.join(f'{label} {count:,}' for label, count in far.items())}" if far else ""
        return (
            f"Equal for all methods: the number of trained parameters ({sizes}{near}) and compute ({compute}{extra})."
        )
    asked = f" (asked for: {budget:,})" if budget else ""
    return f"Equal for all methods: compute ({compute}{extra}). Not equal: trained parameters, {sizes}{asked}."


def _values(entries: Sequence[Entry], average: str) -> str:
    """What the numbers are, and of how many seeds."""
    seeds = sorted({seed for entry in entries for seed, _ in entry.values})
    most = max((entry.seeds for entry in entries), default=0)
    few = [f"; {e.label} on {e.task}: {e.seeds}" for e in entries if 0 < e.seeds < most and e.task != average]
    count = f"{most} seeds" if most != 1 else "one seed"
    scale = "percent (a judge's marks: 1 to 10)" if any(entry.metric == "judge" for entry in entries) else "percent"
    text = f"Values in {scale}: median of {count} ({', '.join(map(str, seeds))}{''.join(few)})."
    if any(entry.task == average for entry in entries):
        text += f" {average}: mean of the medians, for methods that have them all."
    return text


def _learning_rates(comparison: Comparison, cells: Sequence[Cell]) -> str:
    spec = comparison.head.get("spec") or {}
    tune = spec.get("tune")
    if not tune:
        rates = _range({cell.lr for cell in cells if cell.lr == cell.lr})
        return f"Learning rate: {rates}, given and not searched." if rates else ""
    tried = ", ".join(f"{lr:g}" for lr in tune.get("lr", ()))
    text = (
        f"Learning rate: for each method and task the best of {tried} on validation rows (seed {tune.get('seed', 0)})"
    )
    if tune.get("seed", 0) in (spec.get("seeds") or ()):
        text += ", whose run counts as that seed's"
    like: dict[str, list[str]] = defaultdict(list)
    for task in spec.get("tasks") or ():
        if task.get("tune_like"):
            like[task["tune_like"]].append(task["task"])
    text += "".join(f"; {', '.join(others)} as on {task}" for task, others in like.items())
    if tune.get("once") and spec.get("budgets"):
        text += "; searched at the middle budget alone"
    borrowed = [task for others in like.values() for task in others]
    chosen = {(cell.label, cell.task): cell.lr for cell in cells if cell.task not in borrowed}
    if edge := sum(lr in _ends(tune["lr"]) for lr in chosen.values()) if tune.get("lr") else 0:
        text += f"; {edge} of {len(chosen)} times it is the smallest or the largest of them"
    return f"{text}."


def _intervals(tasks: Sequence[Entry]) -> str:
    most = max((entry.seeds for entry in tasks), default=0)
    if tasks and not any(entry.draws is not None for entry in tasks):
        return "No intervals: each method has one value." if most else ""
    if tasks and not any(entry.rows for entry in tasks):
        return f"[low, high]: 95 % bootstrap of that median ({DRAWS:,} draws of seeds alone; rows are not known)."
    text = (
        f"[low, high]: 95 % hierarchical bootstrap of that median ({DRAWS:,} draws of seeds and of test rows, the same "
        "rows for all methods)"
    )
    if most < FEWEST:
        text += "; with one seed of rows alone: the spread over seeds is not in it, and no difference is proven"
    elif most == FEWEST:
        text += "; with two seeds it is too narrow where seeds differ much"
    return f"{text}. It does not speak of other training data."


def _best(entries: Sequence[Entry]) -> str:
    """How the marks are meant, and which hold."""
    bests = [entry for entry in entries if entry.mark == "best"]
    if not bests:
        return ""
    proven = [f"{entry.task} ({entry.label})" for entry in bests if entry.proven]
    held = f"proven: {', '.join(proven)}" if proven else "no column has a proven best"
    return (
        "Best of a column in bold only where the 95 % interval of its difference to every other method, on the same "
        f"rows, excludes zero (and none of its runs failed); else * marks it without a claim. Here {held}. "
        "Second underlined."
    )


def _chance(tasks: Sequence[Entry]) -> str:
    if not any(entry.at_chance for entry in tasks):
        return ""
    order = dict.fromkeys(entry.task for entry in tasks)
    rates = {entry.task: entry.majority for entry in tasks if entry.at_chance and entry.majority is not None}
    text = ", ".join(f"{task} {100 * rates[task]:.1f}" for task in order if task in rates)
    return (
        f"† at chance: the interval holds, or lies below, what always giving the most frequent answer scores ({text})."
    )


def _rows(tasks: Sequence[Entry]) -> str:
    """How many rows each task has, and how many did not fit: once where that is the same for all methods."""
    parts = []
    for task in dict.fromkeys(entry.task for entry in tasks):
        found = [entry for entry in tasks if entry.task == task and entry.rows]
        out = {entry.left_out for entry in found}
        if not found:
            continue
        text = f"{task} {_range({entry.rows for entry in found})}"
        if out == {0}:
            parts.append(text)
        elif len(out) == 1:
            parts.append(f"{text} ({max(out):,} more are too long)")
        else:
            each = ", ".join(f"{entry.label} {entry.left_out:,}" for entry in found)
            parts.append(f"{text} (too long and left out: {each})")
    return f"Test rows: {', '.join(parts)}." if parts else ""


def _failures(tasks: Sequence[Entry]) -> Iterable[str]:
    for entry in tasks:
        if entry.failed:
            reason = entry.reason.partition(";")[0].rstrip(".")
            count = f"{entry.failed} of {entry.failed + entry.seeds} runs failed"
            yield f"{entry.label} on {entry.task}: {count} ({reason})."


def _mixed(cells: Sequence[Cell]) -> Iterable[str]:
    """Runs of one entry that were trained with different settings: a spec that was changed half way."""
    settings: dict[tuple[str, str], set[str]] = defaultdict(set)
    for cell in cells:
        own = {name: value for name, value in cell.training.items() if name not in ("seed", "lr")}
        settings[cell.label, cell.task].add(repr((sorted(own.items()), sorted(cell.options.items()), cell.wording)))
    mixed = [f"{label} on {task}" for (label, task), found in settings.items() if len(found) > 1]
    if mixed:
        yield f"Runs with different settings are mixed in {', '.join(mixed)}: run the comparison again."


def _by_task(cells: Sequence[Cell], value: Callable[[Cell], int]) -> str:
    """One range for all tasks, or one for each group of tasks that share it."""
    by_task: dict[str, set[int]] = defaultdict(set)
    for cell in cells:
        by_task[cell.task].add(value(cell))
    alike: dict[str, list[str]] = defaultdict(list)
    for task, values in by_task.items():
        alike[_range(values)].append(task)
    if len(alike) == 1:
        return next(iter(alike))
    return ", ".join(f"{text} ({', '.join(tasks)})" for text, tasks in alike.items())


def _range(values: Iterable[Any]) -> str:
    values = set(values)
    if not values:
        return ""
    low, high = _ends(values)
    return _number(low) if low == high else f"{_number(low)} to {_number(high)}"


def _ends(values: Iterable[Any]) -> tuple[Any, Any]:
    ordered = sorted(values)
    return ordered[0], ordered[-1]


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"
