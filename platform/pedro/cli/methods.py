"""`pedro methods`: what can be trained, and how the result can be used."""

from __future__ import annotations

import shutil
import sys

import typer

from pedro.cli.output import AsJson, emit, log, table

COLUMNS = (
    "name",
    "method",
    "trained on LLaMA-2 7B",
    "mixed batches",
    "mergeable",
    "identity at init",
    "changes",
    "from",
)
WIDE = 140  # columns of a terminal that hold the whole table; a narrower one gets the rows' first six
ANSWERS = {True: "yes", False: "no", None: "depends"}


def methods(
    counts: bool = typer.Option(
        True, help="Count trained parameters with the settings of the paper's table 1, on LLaMA-2 7B."
    ),
    as_json: AsJson = False,
) -> None:
    """List the methods: trained parameters, whether they can be served in mixed batches and merged, and their source.

    Any of them goes into a spec as `method: {name: red}`, with its options beside the name; any method of PEFT as
    `method: {peft_type: VERA, r: 64}`.

    Examples: pedro methods; pedro methods --json; pedro methods --no-counts
    """
    from pedro.backbone import quiet
    from pedro.methods.capabilities import capabilities

    quiet()
    entries = capabilities(counts)
    rows = [
        (
            entry["name"],
            entry["title"],
            _millions(entry["trained_parameters"]),
            ANSWERS[entry["mixed_batches"]],
            ANSWERS[entry["mergeable"]],
            ANSWERS[entry["identity_at_init"]],
            entry["equation"],
            entry["source"],
        )
        for entry in entries
    ]
    narrow = sys.stdout.isatty() and shutil.get_terminal_size().columns < WIDE
    shown = len(COLUMNS) - 2 if narrow else len(COLUMNS)

    def show() -> None:
        table(COLUMNS[:shown], [row[:shown] for row in rows], whole=1)
        if narrow:
            log(f"what each changes, and its paper: in {WIDE} columns, with --json, or by `pedro methods | cat`")

    emit(entries, as_json, show)


def _millions(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.2f} M"
