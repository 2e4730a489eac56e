"""Captions: what must be said beside a table so that it is not over-interpreted.

Budgets, seeds, intervals, failures, from the runs and the entries that the table shows.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from pedro.comparison.result_model import (
    AVERAGE,
    BACKBONE,
    BUDGET_TOLERANCE,
    CAP,
    EARLY,
    JUDGE,
    Comparison,
    RunResult,
    Selection,
    TableEntry,
    format_score,
)
from pedro.comparison.statistics import FEWEST, NUM_SAMPLES

TEXT = "WikiText-2's test part"


def captions(selection: Selection, entries: Sequence[TableEntry]) -> tuple[str, ...]:
    """The sentences below the table that holds `entries`."""
    comparison = selection.comparison
    labels = {entry.label for entry in entries}
    table_keys = {(entry.backbone, entry.budget) for entry in entries}
    shown = [run for run in selection.runs if run.label in labels and (run.backbone, run.budget) in table_keys]
    runs = [run for run in shown if run.method != BACKBONE]
    tasks = [entry for entry in entries if entry.task != AVERAGE]
    notes = [
        _equal(comparison, runs, tasks) if runs or not shown else "",
        _ends_of_training(runs),
        _values(entries),
        _learning_rates(comparison, runs),
        _untrained(shown),
        _intervals(tasks),
        _best(entries),
        _chance(tasks),
        _rows(tasks),
        *_failures(tasks),
        *_mixed(runs),
        *_measured(runs),
    ]
    if selection.left_out:
        notes.append(f"{selection.left_out} earlier runs with other settings are in the folder and not in the table.")
    if comparison.problems:
        count = len(comparison.problems)
        notes.append(f"{count} file{'s' * (count > 1)} could not be read: {'; '.join(comparison.problems[:3])}.")
    return tuple(note for note in notes if note)


def _equal(comparison: Comparison, runs: Sequence[RunResult], tasks: Sequence[TableEntry]) -> str:
    """Which budget is equal."""
    ended = [run for run in runs if run.finished]
    if not ended:
        return f"Equal for all methods: {comparison.equal}. No run has finished yet."
    if uncounted := list(dict.fromkeys(run.label for run in ended if not run.steps)):
        unknown = ", ".join(uncounted)
        return f"Whether compute or training rows are equal was not compared: no steps are known of {unknown}."
    batches = _range({run.training.get("batch_size") for run in ended} - {None})
    steps = _by_task(ended, lambda run: run.steps)
    compute = f"the same training rows; steps: {steps}" + (f"; rows a step: {batches}" if batches else "")
    more = dict.fromkeys(run.label for run in ended if run.optimizer_steps > run.steps)
    took = ", ".join(f"{label} up to {max(c.optimizer_steps for c in ended if c.label == label):,}" for label in more)
    extra = f"; counting those for parameters that learn from rows of their own, {took}" if more else ""
    sizes = _range({entry.parameters for entry in tasks if entry.parameters})
    budget = next((run.budget for run in ended if run.budget), None)
    if comparison.equal == "parameters":
        near = f", as near to {budget:,} as a method's size allows" if budget else ""
        far = {
            e.label: e.parameters
            for e in tasks
            if budget and e.parameters and abs(e.parameters - budget) > BUDGET_TOLERANCE * budget
        }
        near += f"; not near it: {', '.join(f'{label} {count:,}' for label, count in far.items())}" if far else ""
        return (
            f"Equal for all methods: the number of trained parameters ({sizes}{near}) and compute ({compute}{extra})."
        )
    asked = f" (asked for: {budget:,})" if budget else ""
    trained = f"trained parameters, {sizes}{asked}"
    if not comparison.equal:
        parts = [f"steps {steps}{extra}", f"rows a step {batches}" if batches else "", trained if sizes else ""]
        return f"Nothing was held equal for these jobs: {'; '.join(filter(None, parts))}."
    if comparison.equal == "effort":
        return (
            "Equal for all methods: effort (the same training rows, the same rules for the learning rate and for the "
            f"end of training; rows a step: {batches}). Not equal: steps ({steps}{extra}) and trained parameters, "
            f"{sizes}{asked}."
        )
    if uneven := [task for task, counts in _steps_by_task(ended).items() if len(counts) > 1]:
        return f"Not equal: compute (steps: {steps}; they differ on {', '.join(uneven)}) and {trained}."
    if len({entry.parameters for entry in tasks if entry.parameters}) == 1:
        return f"Equal for all methods: compute ({compute}{extra}) and the number of {trained}."
    return f"Equal for all methods: compute ({compute}{extra}). Not equal: {trained}."


def _ends_of_training(runs: Sequence[RunResult]) -> str:
    """What ended training, and how often that was the cap: such a run might have gone on."""
    known = [run for run in runs if run.ended_by in (EARLY, CAP)]
    if not known:
        return ""
    patience = _range({run.training.get("patience") for run in known} - {None})
    every = _range({run.training.get("eval_every") for run in known} - {None})
    capped = Counter(f"{run.label} on {run.task}" for run in known if run.ended_by == CAP)
    steps = _by_task([run for run in known if run.ended_by == CAP], lambda run: run.steps)
    where = "; ".join(f"{name}: {count}" for name, count in capped.items())
    return (
        f"Training ends after {patience} validations ({every} steps apart) without a better loss, or at a cap. "
        f"The cap was hit by {capped.total()} of {len(known)} runs" + (f" ({steps} steps; {where})." if capped else ".")
    )


def _untrained(runs: Sequence[RunResult]) -> str:
    """What the rows of the backbone itself are."""
    if all(run.method != BACKBONE for run in runs):
        return ""
    return (
        "Backbone: nothing is trained. It is told the task's instruction, then worked examples from the training rows "
        "(others for each seed); its answer is the likeliest of the task's labels, or, by exact match, what it writes."
    )


def _values(entries: Sequence[TableEntry]) -> str:
    """What the numbers are, and of how many seeds."""
    seeds = sorted({seed for entry in entries for seed, _ in entry.values})
    most = max((entry.seeds for entry in entries), default=0)
    few = [f"; {e.label} on {e.task}: {e.seeds}" for e in entries if 0 < e.seeds < most and e.task != AVERAGE]
    count = f"{most} seeds" if most != 1 else "one seed"
    scale = "percent (a judge's marks: 1 to 10)" if any(entry.metric == JUDGE for entry in entries) else "percent"
    text = f"Values in {scale}: median of {count} ({', '.join(map(str, seeds))}{''.join(few)})."
    if any(entry.task == AVERAGE for entry in entries):
        text += f" {AVERAGE}: mean of the medians, for methods that have them all."
    return text


def _learning_rates(comparison: Comparison, runs: Sequence[RunResult]) -> str:
    spec = comparison.metadata.get("spec") or {}
    tune = spec.get("tune")
    if not tune:
        rates = _range({run.lr for run in runs if run.lr == run.lr})
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
    searches = list({(run.label, run.task): run.searched for run in runs}.values())
    if tune.get("extend"):
        more = Counter(searched.get("extended", 0) for searched in searches)
        counts = ", ".join(f"{count} times by {values}" for values, count in sorted(more.items()) if values)
        text += f"; where the best is the smallest or the largest, up to {tune['extend']} values beyond it are tried"
        text += f" ({counts})" if counts else " (never needed)"
    if tune.get("once") and spec.get("budgets"):
        text += "; searched at the middle budget alone"
    borrowed = [task for others in like.values() for task in others]
    chosen = {(run.label, run.task): run.lr for run in runs if run.task not in borrowed}
    if tune.get("extend"):
        edge = sum(bool(searched.get("at_edge")) for searched in searches)
    else:
        edge = sum(lr in _ends(tune["lr"]) for lr in chosen.values()) if tune.get("lr") else 0
    if edge:
        text += f"; {edge} of {len(chosen)} times it is the smallest or the largest of them"
    return f"{text}."


def _intervals(tasks: Sequence[TableEntry]) -> str:
    most = max((entry.seeds for entry in tasks), default=0)
    if tasks and not any(entry.samples is not None for entry in tasks):
        return "No intervals: each method has one value." if most else ""
    if tasks and not any(entry.rows for entry in tasks):
        return f"[low, high]: 95 % bootstrap of that median ({NUM_SAMPLES:,} draws of seeds alone; rows are not known)."
    text = (
        f"[low, high]: 95 % hierarchical bootstrap of that median ({NUM_SAMPLES:,} draws of seeds and of test rows, "
        "the same rows for all methods)"
    )
    if most < FEWEST:
        text += "; with one seed of rows alone: the spread over seeds is not in it, and no difference is proven"
    elif most == FEWEST:
        text += "; with two seeds it is too narrow where seeds differ much"
    return f"{text}. It does not speak of other training data."


def _best(entries: Sequence[TableEntry]) -> str:
    """How the marks are meant, and which hold."""
    bests = [entry for entry in entries if entry.mark == "best"]
    if not bests:
        return ""
    proven = [f"{entry.task} ({entry.label})" for entry in bests if entry.proven]
    held = f"proven: {', '.join(proven)}" if proven else "no column has a proven best"
    return (
        "Best of a column in bold only where the 95 % interval of its difference to every other method, on the same "
        f"rows, excludes zero (and none of its runs failed); else * marks the highest value. Here {held}. "
        "Second underlined."
    )


def _chance(tasks: Sequence[TableEntry]) -> str:
    if not any(entry.at_chance for entry in tasks):
        return ""
    order = dict.fromkeys(entry.task for entry in tasks)
    rates = {entry.task: entry.majority for entry in tasks if entry.at_chance and entry.majority is not None}
    text = ", ".join(f"{task} {100 * rates[task]:.1f}" for task in order if task in rates)
    return (
        f"† at chance: the interval holds, or lies below, what always giving the most frequent answer scores ({text})."
    )


def _rows(tasks: Sequence[TableEntry]) -> str:
    """How many rows each task has, and how many did not fit: once where that is the same for all methods."""
    parts = []
    for task in dict.fromkeys(entry.task for entry in tasks):
        scored = [entry for entry in tasks if entry.task == task and entry.rows]
        out = {entry.left_out for entry in scored}
        if not scored:
            continue
        text = f"{task} {_range({entry.rows for entry in scored})}"
        if out == {0}:
            parts.append(text)
        elif len(out) == 1:
            parts.append(f"{text} ({max(out):,} more are too long)")
        else:
            each = ", ".join(f"{entry.label} {entry.left_out:,}" for entry in scored)
            parts.append(f"{text} (too long and left out: {each})")
    return f"Test rows: {', '.join(parts)}." if parts else ""


def _failures(tasks: Sequence[TableEntry]) -> Iterable[str]:
    for entry in tasks:
        if entry.failed:
            reason = entry.reason.partition(";")[0].rstrip(".")
            count = f"{entry.failed} of {entry.failed + entry.seeds} runs failed"
            yield f"{entry.label} on {entry.task}: {count} ({reason})."


def _mixed(runs: Sequence[RunResult]) -> Iterable[str]:
    """Runs of one entry that were trained with different settings: a spec that was changed half way."""
    settings: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in runs:
        own = {name: value for name, value in run.training.items() if name not in ("seed", "lr")}
        settings[run.label, run.task].add(repr((sorted(own.items()), sorted(run.options.items()), run.wording)))
    mixed = [f"{label} on {task}" for (label, task), variants in settings.items() if len(variants) > 1]
    if mixed:
        yield f"Runs with different settings are mixed in {', '.join(mixed)}: run the comparison again."


def _measured(runs: Sequence[RunResult]) -> Iterable[str]:
    """How forgetting and serving were measured, where they were."""
    asked = [run.forgetting for run in runs if run.forgetting]
    if asked:
        before = _range({round(math.exp(found["loss_before"]), 2) for found in asked if found.get("loss_before")})
        tokens = _range({found.get("tokens") for found in asked} - {None})
        tasks = {found["task"]: found for found in asked if found.get("task")}
        text = (
            f"Forgetting: perplexity of {tokens} tokens of {TEXT}, after tuning minus the backbone's own ({before}). "
            "Windows of text follow each other; the first quarter of each is read as a prompt, which conditions the "
            "vectors of methods that have such, and the rest is predicted"
        )
        for task, found in tasks.items():
            score = found.get("score_before")
            own = f", where the backbone has {format_score(score, 'accuracy')}" if score is not None else ""
            text += f"; {task}: {found.get('rows')} rows, asked without examples, by the likeliest label{own}"
        yield f"{text}."
    refused = {run.label: run.not_served for run in runs if run.not_served}
    if refused or any(run.served_tokens_per_second for run in runs):
        text = "Served: answers of equal length to requests that run together, in this platform's engine, on one worker"
        yield (
            text + "".join(f"; {label} is not ({reason.partition(';')[0]})" for label, reason in refused.items()) + "."
        )


def _steps_by_task(runs: Sequence[RunResult]) -> dict[str, set[int]]:
    by_task: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        by_task[run.task].add(run.steps)
    return by_task


def _by_task(runs: Sequence[RunResult], value: Callable[[RunResult], int]) -> str:
    """One range for all tasks, or one for each group of tasks that share it."""
    by_task: dict[str, set[int]] = defaultdict(set)
    for run in runs:
        by_task[run.task].add(value(run))
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
