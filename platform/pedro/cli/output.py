"""How commands print results: tables for people, JSON for programs, log lines and errors on standard error."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any

import typer

from pedro.errors import ConfigError, PedroError

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON value instead of text.")]


def emit(value: Any, as_json: bool, show: Callable[[], None]) -> None:
    """Print `value` as JSON, or let `show` print it for a person."""
    if as_json:
        typer.echo(json.dumps(value, default=str))
    else:
        show()


def printable(text: str) -> str:
    """`text` without what could steer a terminal: control characters (but line ends and tabs) as escapes."""
    return CONTROL.sub(lambda match: match[0].encode("unicode_escape", "surrogatepass").decode(), text)


def table(
    columns: Sequence[str], rows: Iterable[Sequence[Any]], *, empty: str = "nothing here yet", whole: int = 0
) -> None:
    """Print rows under column heads; `empty` if there are none. The first `whole` columns are never broken or cut."""
    from rich import box
    from rich.console import Console
    from rich.table import Column, Table

    rows = [[("" if cell is None else printable(str(cell))) for cell in row] for row in rows]
    if not rows:
        typer.echo(empty)
        return
    heads = [Column(name, no_wrap=index < whole) for index, name in enumerate(columns)]
    grid = Table(*heads, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 200, markup=False, highlight=False).print(grid)


def log(line: str) -> None:
    """A progress line on standard error, so that `--json` output stays clean."""
    typer.echo(printable(line), err=True)


def confirm(question: str, yes: bool, as_json: bool) -> None:
    """Ask before something is lost; without a person to ask, only `--yes` will do. Raises ConfigError."""
    if yes:
        return
    if as_json or not sys.stdin.isatty():
        raise ConfigError(f"{question} Nobody can be asked here: give --yes", param="--yes")
    typer.confirm(printable(question), abort=True, err=True)


def fail(error: PedroError, as_json: bool = False) -> None:
    """Show the error and exit with status 1."""
    if as_json:
        typer.echo(json.dumps(error.body()))
    typer.echo(printable(f"error: {error.message}"), err=True)
    sys.exit(1)


def percent(value: Any) -> str:
    """`0.931` as `93.1 %`; a dash for a missing value."""
    return "-" if value is None else f"{100 * float(value):.1f} %"


def accuracy(metrics: Mapping[str, Any], of: str = "") -> str:
    """The accuracy among a version's metrics, of its answers or of pairs of them; `of` is a prefix of the name."""
    pairs = metrics.get(f"{of}preference_accuracy")
    return percent(metrics.get(f"{of}accuracy")) if pairs is None else f"{percent(pairs)} of pairs"
