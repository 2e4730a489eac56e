"""Tables as text: for a terminal, Markdown, LaTeX and CSV. Decides nothing: numbers and marks come from `tables.py`.

A rendered table is one of strings. A cell has one or two of them: the number, and its interval, which stands behind
the number or below it.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pedro.comparison.costs import MEASURED, METRICS, SERVED
from pedro.comparison.result_model import (
    AVERAGE,
    BEST,
    SECOND,
    Cost,
    Difference,
    Paper,
    Table,
    TableEntry,
    format_score,
)
from pedro.csv_cells import plain_cell

if TYPE_CHECKING:
    from pedro.comparison.imported import ImportedRun

NOTHING = ("-", "")
HEADS = ("method", "parameters")
IMPORTED_TITLE = "As PEFT's method_comparison reports them: other data, hyperparameters and seeds, no intervals"
MARKDOWN_SIGNS = re.compile(r"[\\`*<|]|\[(?=[^\]]*\]\()")  # as for "[", only where a link would begin
ESCAPES = re.compile("\033\\[[0-9]*m")
LATEX = {
    **{sign: f"\\{sign}" for sign in "%&#_${}"},
    **{"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"},
    **{"³": "$^3$", "†": r"$\dagger$", "×": r"$\times$", "Θ": r"$\Theta$", "Ω": r"$\Omega$", "·": r"$\cdot$"},
    **{"–": "--", "→": r"$\to$", "*": "$*$", "<": "$<$", ">": "$>$", "|": "$|$"},
}
CSV_COLUMNS = (
    *("backbone", "budget", "label", "method", "task", "metric", "value", "low", "high", "seeds", "failed"),
    *("values", "parameters", "lr", "mark", "proven", "at_chance", "majority", "rows"),
    *("baseline", "gain", "gain_low", "gain_high", "gain_proven", "paper", *MEASURED),
)


@dataclass(frozen=True)
class Style:
    """How the marks look: each a pattern around a number."""

    proven: str
    best: str
    second: str
    chance: str
    broken: str


PLAIN = Style("**{}**", "{}*", "_{}_", "{}†", "{}!")
ANSI = Style("\033[1m{}\033[0m", "{}*", "\033[4m{}\033[0m", "{}†", "{}!")
MARKDOWN = Style("**{}**", r"{}\*", "<u>{}</u>", "{}†", "{}!")
TEX = Style(r"\textbf{{{}}}", "{}$^*$", r"\underline{{{}}}", r"{}$^\dagger$", "{}$^!$")

Text = tuple[str, str]
"""A number, and its interval or nothing."""


@dataclass(frozen=True)
class RenderedTable:
    """A title, the columns' names, and rows of cells."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Text, ...], ...]


def render_scores(table: Table, style: Style) -> RenderedTable:
    """Medians with intervals and marks."""
    rows = [
        (
            (label, ""),
            (_sizes(table, label), ""),
            *(_score(table.entries.get((label, at)), style) for at in table.columns),
        )
        for label in table.rows
    ]
    return RenderedTable(table.title, (*HEADS, *table.columns), tuple(rows))


def render_differences(table: Table, style: Style) -> RenderedTable | None:
    """Every method minus the baseline; None where the baseline is not in the table."""
    others = [label for label in table.rows if label != table.baseline]
    if table.baseline not in table.rows or not others:
        return None
    rows = [((label, ""), *(_gain(table.entries.get((label, at)), style) for at in table.columns)) for label in others]
    title = f"{table.title}: difference to {table.baseline} in points, bold where its interval excludes zero"
    return RenderedTable(title, ("method", *table.columns), tuple(rows))


def render_costs(table: Table) -> RenderedTable:
    """What was measured beside scores, least and most over runs; for a table that has any."""
    names = [name for name in MEASURED if any(at[1] == name for at in table.costs)]
    labels = [label for label in table.rows if any(at[0] == label for at in table.costs)]
    rows = [((label, ""), *(_cost(table.costs.get((label, name)), name) for name in names)) for label in labels]
    title = f"{table.title}: served and forgotten; median over runs, least and most"
    return RenderedTable(title, ("method", *(METRICS[name].title for name in names)), tuple(rows))


def render_paper(paper: Paper) -> RenderedTable:
    """What the paper prints, as it prints it."""
    rows = []
    for label in paper.rows:
        values = [paper.value(label, column) for column in paper.columns]
        rows.append(((label, ""), *(NOTHING if value is None else (f"{value}", "") for value in values)))
    return RenderedTable(paper.title, ("method", *paper.columns), tuple(rows))


def render_imported(runs: Sequence[ImportedRun]) -> RenderedTable:
    """Results of PEFT's method_comparison as they report them."""
    head = ("theirs", "parameters", "lr", "steps", "test accuracy", "forgetting (nats)", "training (s)", "saved (kB)")
    rows = [
        tuple(
            (text, "")
            for text in (
                *(run.label, f"{run.parameters:,}", f"{run.lr:g}", f"{run.steps:,}", f"{100 * run.accuracy:.1f}"),
                "-" if run.forgetting is None else f"{run.forgetting:+.3f}",
                *(f"{run.seconds:,.0f}", f"{run.file_size / 1000:,.1f}", f"{run.memory / 2**20:,.0f}"),
            )
        )
        for run in runs
    ]
    return RenderedTable(IMPORTED_TITLE, (*head, "memory (MiB)"), tuple(rows))


def as_text(table: RenderedTable, width: int) -> str:
    """The title above columns of equal width; intervals stand below numbers where `width` is too small for both."""
    beside = [[[" ".join(filter(None, cell))] for cell in row] for row in table.rows]
    below = [[list(cell) for cell in row] for row in table.rows]
    head = [[name] for name in table.head]
    text = _aligned([head, *beside])
    if max(map(_visible, text)) > width and any(cell[1] for row in table.rows for cell in row):
        text = _aligned([head, *below])
    return "\n".join([table.title, *(line.rstrip() for line in text)])


def as_markdown(table: RenderedTable) -> str:
    """The title above a table of GitHub's Markdown."""
    rows = [[literal(row[0][0]), *(" ".join(filter(None, cell)) for cell in row[1:])] for row in table.rows]
    line = ["---", *["---:"] * (len(table.head) - 1)]
    lines = "\n".join(f"| {' | '.join(row)} |" for row in ([literal(name) for name in table.head], line, *rows))
    return f"**{literal(table.title)}**\n\n{lines}"


def as_latex(table: RenderedTable, notes: Sequence[str]) -> str:
    """A table environment for booktabs and graphicx, with the title and the notes as its caption."""
    caption = " ".join(escaped(text) for text in (f"{table.title}.", *notes))
    head = " & ".join(escaped(name) for name in table.head)
    rows = [" & ".join(_latex_cell(cell, first=not column) for column, cell in enumerate(row)) for row in table.rows]
    return "\n".join(
        [
            r"\begin{table*}",
            r"\centering\small",
            r"\resizebox{\linewidth}{!}{%",
            rf"\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
            r"\toprule",
            rf"{head} \\",
            r"\midrule",
            *(rf"{row} \\" for row in rows),
            r"\bottomrule",
            r"\end{tabular}}",
            rf"\caption{{{caption}}}",
            r"\end{table*}",
        ]
    )


def as_csv(tables: Sequence[Table], paper: Paper | None) -> str:
    """A line for each method and task of each table, numbers unrounded (fractions, not percent)."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for label in table.rows:
            for task in table.columns:
                if entry := table.entries.get((label, task)):
                    writer.writerow(_csv_row(entry, table, paper))
    return stream.getvalue()


def escaped(text: str) -> str:
    """Text that LaTeX prints as it stands."""
    return "".join(LATEX.get(sign, sign) for sign in text)


def literal(text: str) -> str:
    """Text that Markdown prints as it stands."""
    return MARKDOWN_SIGNS.sub(r"\\\g<0>", text)


def _score(entry: TableEntry | None, style: Style) -> Text:
    if entry is None:
        return NOTHING
    if entry.value is None:
        return (f"failed {entry.failed}/{entry.failed + entry.seeds}", "")
    text = format_score(entry.value, entry.metric)
    if entry.mark == BEST:
        text = (style.proven if entry.proven else style.best).format(text)
    elif entry.mark == SECOND:
        text = style.second.format(text)
    if entry.at_chance:
        text = style.chance.format(text)
    if entry.failed:
        text = style.broken.format(text)
    if entry.low is None or entry.high is None:
        return (text, "")
    return (text, f"[{format_score(entry.low, entry.metric)}, {format_score(entry.high, entry.metric)}]")


def _gain(entry: TableEntry | None, style: Style) -> Text:
    if entry is None or entry.gain is None:
        return NOTHING
    gain: Difference = entry.gain
    value, low, high = (format_score(part, entry.metric, sign=True) for part in (gain.value, gain.low, gain.high))
    return (style.proven.format(value) if gain.proven else value, f"[{low}, {high}]")


def _cost(cost: Cost | None, name: str) -> Text:
    if cost is None or (cost.value is None and name != SERVED):
        return NOTHING
    if cost.value is None or cost.low is None or cost.high is None:
        return ("n/a", "")
    value, low, high = (_number(part, name) for part in (cost.value, cost.low, cost.high))
    return (value, "" if low == high else f"[{low}, {high}]")


def _number(value: float, name: str) -> str:
    text = format(value / METRICS[name].unit, METRICS[name].format)
    return text.lstrip("+-") if float(text.replace(",", "")) == 0 else text


def _sizes(table: Table, label: str) -> str:
    low, high = table.parameters[label]
    if not high:
        return "-"
    return f"{low:,}" if low == high else f"{low:,}–{high:,}"


def _aligned(rows: Sequence[Sequence[Sequence[str]]]) -> list[str]:
    """Rows of cells of lines as lines of text: the first column to the left, the others to the right."""
    widths = [max(_visible(line) for row in rows for line in row[at]) for at in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        for part in range(max(map(len, row))):
            texts = [cell[part] if part < len(cell) else "" for cell in row]
            lines.append("  ".join(_padded(text, widths[at], left=not at) for at, text in enumerate(texts)))
        if not number:
            lines.append("-" * (sum(widths) + 2 * (len(widths) - 1)))
    return lines


def _padded(text: str, width: int, left: bool) -> str:
    space = " " * (width - _visible(text))
    return text + space if left else space + text


def _visible(text: str) -> int:
    return len(ESCAPES.sub("", text))


def _latex_cell(cell: Text, first: bool) -> str:
    text, span = cell
    if first or text.startswith("failed"):
        return f"{{}}{escaped(text)}" if text.startswith("[") else escaped(text)  # "[" after a line's end is an option
    minus = re.sub(r"-(?=\d)", "$-$", text).replace("–", "--")
    return minus + (rf" {{\scriptsize {re.sub(r'-(?=[0-9])', '$-$', span)}}}" if span else "")


def _csv_row(entry: TableEntry, table: Table, paper: Paper | None) -> list[object]:
    gain = entry.gain
    return [
        *(plain_cell(entry.backbone), entry.budget, plain_cell(entry.label), entry.method, entry.task, entry.metric),
        *(entry.value, entry.low, entry.high, entry.seeds, entry.failed),
        _by_seed(entry.values),
        entry.parameters or None,
        _by_seed(entry.lrs),
        *(entry.mark, entry.proven, entry.at_chance, entry.majority),
        entry.rows if entry.task != AVERAGE else None,
        plain_cell(table.baseline),
        *((gain.value, gain.low, gain.high, gain.proven) if gain else ("", "", "", "")),
        paper.value(entry.label, entry.task) if paper else None,
        *((cost := table.costs.get((entry.label, name))) and cost.value for name in MEASURED),
    ]


def _by_seed(values: Sequence[tuple[int, float]]) -> str:
    """`0:0.71 1:0.72`."""
    return " ".join(f"{seed}:{value:.6g}" for seed, value in values)
