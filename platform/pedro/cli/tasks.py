"""`pedro tasks`: the benchmark tasks, and their rows as training files."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log, table

if TYPE_CHECKING:
    from pedro.data.tasks import Task, TaskRow

SPLITS = ("train", "validation", "test")


def tasks(
    name: Annotated[str | None, typer.Argument(help="A task, to show or write its rows.")] = None,
    data: Annotated[
        str | None,
        typer.Option(envvar="PEDRO_TASK_DATA", help='The directory with the tasks\' folders, or "hub" to stream.'),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="Print the first N rows of --split.")] = 0,
    split: Annotated[str, typer.Option(help="Which rows to show.")] = "test",
    wording: Annotated[str, typer.Option(help="The wording of prompts: template, bare, ...")] = "template",
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each prompt.")] = 0,
    write: Annotated[Path | None, typer.Option(help="Write each split as JSONL into this directory.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Write a fair sample of N rows per split.")] = None,
    as_json: AsJson = False,
) -> None:
    """List the benchmark tasks: metric, rows per split, licence, source.

    Rows are counted in --data; without it they are those that the source publishes or the package carries.

    Examples: pedro tasks; pedro tasks gsm8k --data benchmarks --show 2;
    pedro tasks sst2 --data hub --wording bare --write sst2
    """
    from pedro.data.tasks import TASKS, get_task

    if name is None:
        _refuse_without_a_name(show, write)
        _list([_record(task, data) for task in TASKS.values()], as_json)
        return
    task = get_task(name, wording, shots)
    if write is not None:
        _write(task, data, write, limit, as_json)
    elif show:
        _show([row for row, _ in zip(task.rows(split, data), range(show), strict=False)], as_json)
    else:
        _list([_record(task, data)], as_json)


def _refuse_without_a_name(show: int, write: Path | None) -> None:
    if show or write is not None:
        raise typer.BadParameter("name a task: `pedro tasks NAME --show 2`", param_hint="NAME")


def _record(task: Task, data: str | None) -> dict[str, Any]:
    from pedro.errors import DataError

    source = task.source
    rows = dict(task.hub.rows) if task.hub else {}
    if task.packaged is not None and data is None:
        rows, source = _count(task, None), f"packaged, from {task.source}"
    elif data not in (None, "hub"):
        try:
            rows, source = _count(task, data), task.open(data).name
        except DataError as error:
            rows, source = {}, f"not in {data}"
            log(f"{error.message}")
    return {
        "name": task.name,
        "title": task.title,
        "metric": task.metric,
        "rows": rows,
        "wordings": task.wording_names,
        "licence": task.licence,
        "hub": task.hub.path if task.hub else None,
        "source": source,
    }


def _count(task: Task, data: str | None) -> dict[str, int]:
    return {split: sum(1 for _ in task.rows(split, data)) for split in task.splits(data)}


def _list(records: list[dict[str, Any]], as_json: bool) -> None:
    rows = [
        (
            record["name"],
            record["title"],
            record["metric"],
            *(f"{record['rows'][split]:,}" if split in record["rows"] else "-" for split in SPLITS),
            record["licence"],
            record["hub"] or "-",
            record["source"],
        )
        for record in records
    ]
    emit(records, as_json, lambda: table(("name", "task", "metric", *SPLITS, "licence", "hub", "from"), rows))


def _show(rows: list[TaskRow], as_json: bool) -> None:
    def text() -> None:
        for row in rows:
            typer.echo(typer.style(f"-- {row.id}", dim=True))
            typer.echo("\n".join(turn["content"] for turn in row.messages))
            typer.echo(typer.style(row.completion, bold=True))
            if row.references and row.references != (row.completion,):
                typer.echo(f"right: {' | '.join(dict.fromkeys(row.references))}")

    emit([asdict(row) for row in rows], as_json, text)


def _write(task: Task, data: str | None, folder: Path, limit: int | None, as_json: bool) -> None:
    from pedro.errors import DataError

    files = {split: folder / f"{split}.jsonl" for split in task.splits(data)}
    for file in files.values():
        if file.exists():
            raise DataError(f"write: {file} is there already; remove it or name another directory", param="write")
    counts = {split: task.write(split, file, data, limit) for split, file in files.items()}
    lines = [f"{folder / split}.jsonl: {count:,} rows" for split, count in counts.items()]
    emit({"task": task.name, "directory": str(folder), "rows": counts}, as_json, lambda: typer.echo("\n".join(lines)))
