"""What the demo tells of its result: the table, answers side by side, the hot swap, what to try next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pedro.demo.questions import Questions
from pedro.refs import ModelRef

if TYPE_CHECKING:
    from pedro.demo.stories import StoryPart
    from pedro.demo.tenant_client import Swap
    from pedro.registry import Version
    from pedro.serving.deploy import Served

Log = Callable[[str], None]
WAYS = {"zero_shot": "backbone, told what to do", "few_shot": "and with examples", "adapter": "adapter"}


def swap_report(old: Version, new: Version, seen: Swap) -> dict[str, Any]:
    """What the load saw, by version."""
    answered = {version.version: 0 for version in (old, new)}
    for fingerprint, count in seen.answers.items():
        answered[ModelRef.parse(fingerprint).number] += count
    return {
        "model": old.name,
        "old_version": old.version,
        "new_version": new.version,
        "requests": seen.requests,
        "in_flight": seen.in_flight,
        "failed": seen.failed,
        "mixed": seen.mixed,
        "answered_by_old": answered[old.version],
        "answered_by_new": answered[new.version],
        "seconds_to_first_new": seen.seconds_to_first_new,
    }


def problems(result: dict[str, Any], margin: float) -> list[str]:
    """What the demo promises and this run did not show."""
    found = []
    for row in result["tenants"]:
        rivals = {"bare backbone": row["zero_shot"], "backbone with examples": row["few_shot"]}
        rivals["most frequent answer"] = row["majority"]
        rival, value = max(((name, value or 0.0) for name, value in rivals.items()), key=lambda pair: pair[1])
        if row["score"] < value + margin:
            found.append(f"{_name(row)} is only {row['score'] - value:+.3f} over the {rival}")
    swap = result["swap"]
    if swap["failed"] or swap["mixed"] or not swap["answered_by_new"]:
        found.append(f"hot swap: {swap['failed']} failed, {swap['mixed']} mixed, {swap['answered_by_new']} by the new")
    return found


def show(result: dict[str, Any], log: Log) -> None:
    """Tell the whole result."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("adapter", no_wrap=True)
    for head in ("rows", "steps", "trained", "test rows", "majority", "zero-shot", "few-shot", "adapter's"):
        grid.add_column(head, justify="right", no_wrap=True)
    for head in ("metric", "version"):
        grid.add_column(head, no_wrap=True)
    for row in result["tenants"]:
        scores = (row[key] for key in ("majority", "zero_shot", "few_shot", "score"))
        grid.add_row(
            _name(row),
            *(f"{row[key]:,}" for key in ("rows", "steps", "trainable_parameters", "test_rows")),
            *("-" if score is None else f"{score:.3f}" for score in scores),
            row["metric"],
            f"v{row['version']} {' '.join(row['aliases'])}",
        )
    console = Console(width=160, highlight=False)
    with console.capture() as drawn:
        console.print(grid)
    log(drawn.get())
    for row in result["tenants"]:
        log(side_by_side(row) + "\n")
    swap = result["swap"]
    counts = "{requests} requests, {failed} failed, {mixed} mixed"
    answered = "{answered_by_old} by the old, {answered_by_new} by the new"
    log(
        "hot swap of {model}: v{old_version} → v{new_version} with {in_flight} requests in flight".format(**swap)
        + f"; {counts.format(**swap)}; {answered.format(**swap)}, first after {swap['seconds_to_first_new']} s; "
        + "accuracy {old_accuracy:.3f} → {new_accuracy:.3f}".format(**swap)
    )
    log("the whole demo took {seconds:.0f} s; all was trained after {training_seconds:.0f} s".format(**result))


def side_by_side(row: dict[str, Any]) -> str:
    """A tenant's first held-out row with every answer to it."""
    first = row["answers"][0]
    lines = {"asked": first["asked"], "wanted": first["wanted"]}
    lines |= {label: first[way] for way, label in WAYS.items() if way in first}
    shown = [f"  {label:<26} {' '.join(text.split())}" for label, text in lines.items()]
    return "\n".join([_name(row), *shown])


def _name(row: dict[str, Any]) -> str:
    return ModelRef(row["tenant"], row["adapter"]).name


def farewell(part: StoryPart, served: Served, secret: str, keep: bool, log: Log) -> None:
    """How to go on."""
    asked = list(Questions(part.tenant, 1).asked[0].messages)
    body = json.dumps({"model": part.name, "messages": asked, "max_tokens": 8})
    url, key = (served.url, secret) if keep else ("http://127.0.0.1:8000", "$KEY")
    command = (
        f"curl {url}/v1/chat/completions -H @- -H 'Content-Type: application/json' "
        f'-d {shlex.quote(body)} <<< "Authorization: Bearer {key}"'
    )
    if keep:
        log(f"\nit runs on; `pedro down` ends it. Try:\n  {command}")
    else:
        log(
            "\nended. `make dashboard` shows the adapters, "
            f'`make serve ARGS="--backbone {served.backbone}"` serves them again; then, with '
            f"KEY=$(.venv/bin/pedro keys create {part.tenant.name}):\n  {command}"
        )
