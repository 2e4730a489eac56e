"""A comparison for people and programs: what `pedro compare` prints, and the files beside its runs.

Writes nothing but what can be made again from comparison.json and the runs.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.comparison import renderers
from pedro.comparison.result_model import (
    SCHEMA,
    Comparison,
    Difference,
    Paper,
    Selection,
    Table,
    TableEntry,
    parse_paper,
)
from pedro.comparison.tables import build_tables, select
from pedro.errors import ConfigError

if TYPE_CHECKING:
    from pedro.comparison.renderers import RenderedTable, Style

WIDTH, FILE_WIDTH = 160, 200
SIGNS = "**proven best**   highest, not proven*   _second_   † at chance   ! some runs failed"
ANSI_SIGNS = SIGNS.replace("**proven best**", renderers.ANSI.proven.format("proven best")).replace(
    "_second_", renderers.ANSI.second.format("second")
)
PROVEN = "In bold where the 95 % interval, on the same rows, excludes zero."
LATEX_HEAD = "% needs \\usepackage{booktabs,graphicx}"


@dataclass(frozen=True)
class ComparisonReport:
    """A comparison, which of its runs are shown, and the tables made of them once."""

    comparison: Comparison
    selection: Selection
    tables: tuple[Table, ...]
    paper: Paper | None
    complaint: str
    """Why the paper's numbers cannot be shown; empty where nothing is wrong."""


def make_report(comparison: Comparison) -> ComparisonReport:
    """Select the runs and compute the tables."""
    selection = select(comparison)
    try:
        paper, complaint = parse_paper(comparison.metadata.get("paper")), ""
    except ValueError as error:  # hours of runs do not fail for a word in the spec
        paper, complaint = None, f"The paper's numbers are not shown: {error}."
    return ComparisonReport(comparison, selection, tuple(build_tables(selection)), paper, complaint)


def print_report(report: ComparisonReport, *, width: int = WIDTH, ansi: bool = False) -> str:
    """The tables, what they rest on and, where the spec carries it, what the paper reports, as plain text.

    With `ansi`, bold and underlined by a terminal's escape sequences in place of signs.
    """
    style, signs = (renderers.ANSI, ANSI_SIGNS) if ansi else (renderers.PLAIN, SIGNS)
    parts = [_headline(report)]
    own, shared = _notes(report)
    for table, notes in zip(report.tables, own, strict=True):
        parts += [renderers.as_text(rendered, width) for rendered in _rendered(table, style)]
        parts.append(_wrapped(notes, width))
    if report.tables:
        parts.append(f"{signs}\n{_wrapped(shared, width)}")
    else:
        parts.append("\n".join(["No run has finished yet.", *report.comparison.problems]))
    if report.paper:
        paper = renderers.as_text(renderers.render_paper(report.paper), width)
        parts.append("\n".join(filter(None, [paper, report.paper.note])))
    if theirs := report.comparison.imported:
        parts.append(renderers.as_text(renderers.render_imported(theirs), width))
    return "\n\n".join(filter(None, parts))


def write_report(report: ComparisonReport) -> None:
    """Write tables (text, Markdown, CSV, LaTeX), figures and summary.json into the comparison's folder.

    Raises ConfigError if there is no comparison in it.
    """
    comparison, tables = report.comparison, report.tables
    if not comparison.metadata:
        why = "; ".join(comparison.problems)
        raise ConfigError(f"{comparison.folder} holds no comparison: {why}; name the folder of one, or run it first")
    from pedro.comparison.figures import draw_figures

    folder = comparison.folder
    _write(folder / "table.txt", print_report(report, width=FILE_WIDTH))
    _write(folder / "summary.json", json.dumps(summarize(report), indent=1, ensure_ascii=False))
    if not tables:
        return
    _write(folder / "table.md", as_markdown(report))
    _write(folder / "table.tex", _latex(report))
    _write(folder / "table.csv", renderers.as_csv(tables, report.paper))
    draw_figures(tables, report.selection, folder)


def draw_front(report: ComparisonReport, x: str, y: str) -> tuple[Path, list[str]]:
    """Draw the Pareto front of two columns into the comparison's folder: the figure, and the methods on the front.

    Raises ConfigError for columns that there are not.
    """
    from pedro.comparison.figures import draw_pareto

    path = report.comparison.folder / f"pareto_{x}_{y}.png"
    return path, draw_pareto(report.tables, report.selection.runs, x, y, path)


def summarize(report: ComparisonReport) -> dict[str, Any]:
    """The comparison for programs: every number of the tables, the notes, and where they come from."""
    comparison, runs = report.comparison, report.selection.runs
    finished = sum(run.finished for run in runs)
    return {
        "schema": SCHEMA,
        "name": comparison.name,
        "title": comparison.title,
        "equal": comparison.equal,
        "baseline": comparison.baseline,
        "runs": {"finished": finished, "failed": len(runs) - finished, "left_out": report.selection.left_out},
        "worker_seconds": round(_worker_seconds(comparison), 1),
        "tables": [_as_dict(table) for table in report.tables],
        "notes": _notes(report)[1],
        "paper": comparison.metadata.get("paper") if report.paper else None,
        "imported": [run.to_dict() for run in comparison.imported],
        "problems": list(comparison.problems),
        "provenance": comparison.metadata.get("provenance"),
    }


def as_markdown(report: ComparisonReport) -> str:
    """table.md."""
    parts = [f"# {renderers.literal(report.comparison.title)}", _headline(report)]
    own, shared = _notes(report)
    for table, notes in zip(report.tables, own, strict=True):
        for rendered in _rendered(table, renderers.MARKDOWN):
            parts.append(renderers.as_markdown(rendered))
        parts.append(_listed(map(renderers.literal, notes)))
    parts.append(_listed(map(renderers.literal, shared)))
    if report.paper:
        parts += [renderers.as_markdown(renderers.render_paper(report.paper)), renderers.literal(report.paper.note)]
    if theirs := report.comparison.imported:
        parts.append(renderers.as_markdown(renderers.render_imported(theirs)))
    return "\n\n".join(filter(None, parts))


def _latex(report: ComparisonReport) -> str:
    paper = report.paper
    parts = [LATEX_HEAD]
    for table in report.tables:
        notes = [*table.notes, *([report.complaint] if report.complaint else [])]
        for part, rendered in enumerate(_rendered(table, renderers.TEX)):
            parts.append(renderers.as_latex(rendered, notes if not part else [PROVEN]))
    if paper:
        parts.append(renderers.as_latex(renderers.render_paper(paper), [paper.note] if paper.note else []))
    if theirs := report.comparison.imported:
        parts.append(renderers.as_latex(renderers.render_imported(theirs), []))
    return "\n\n".join(parts)


def _rendered(table: Table, style: Style) -> list[RenderedTable]:
    rendered = [renderers.render_scores(table, style), renderers.render_differences(table, style)]
    if table.costs:
        rendered.append(renderers.render_costs(table))
    return [one for one in rendered if one]


def _headline(report: ComparisonReport) -> str:
    metadata, runs = report.comparison.metadata, report.selection.runs
    failed = sum(not run.finished for run in runs)
    made = len(report.comparison.runs)
    shown = f", {len(runs)} of them in the tables" if made > len(runs) else ""
    parts = [f"{report.comparison.name}: {made} runs{shown}" + (f", {failed} failed" if failed else "")]
    if seconds := _worker_seconds(report.comparison):
        parts.append(f"{seconds / 60:,.0f} worker-minutes")
    if commit := (metadata.get("provenance") or {}).get("commit"):
        parts.append(f"commit {commit[:12]}{'+' * commit.endswith('+')}")
    return " · ".join(parts)


def _worker_seconds(comparison: Comparison) -> float:
    """What workers spent on training and scoring in all runs that finished, those too that no table shows."""
    return sum(run.seconds + run.scoring_seconds for run in comparison.runs)


def _notes(report: ComparisonReport) -> tuple[list[list[str]], list[str]]:
    """The notes of each table that others do not have, and those of all of them."""
    tables = report.tables
    shared = [note for note in (tables[0].notes if tables else ()) if all(note in table.notes for table in tables)]
    own = [[note for note in table.notes if note not in shared] for table in tables]
    return own, shared + ([report.complaint] if report.complaint else [])


def _wrapped(notes: Iterable[str], width: int) -> str:
    return "\n".join(textwrap.fill(f"- {note}", width, subsequent_indent="  ") for note in notes)


def _listed(notes: Iterable[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _as_dict(table: Table) -> dict[str, Any]:
    return {
        "title": table.title,
        "backbone": table.backbone,
        "budget": table.budget,
        "columns": list(table.columns),
        "rows": [
            {
                "label": label,
                "parameters": list(table.parameters[label]),
                "costs": {name: dict(vars(cost)) for (of, name), cost in table.costs.items() if of == label},
                "entries": {at: _entry(e) for at in table.columns if (e := table.entries.get((label, at)))},
            }
            for label in table.rows
        ],
        "notes": list(table.notes),
    }


def _entry(entry: TableEntry) -> dict[str, Any]:
    plain = ("value", "low", "high", "metric", "seeds", "failed", "reason", "mark", "proven", "at_chance", "majority")
    gain: Difference | None = entry.gain
    return {
        **{name: getattr(entry, name) for name in plain},
        "rows": entry.rows,
        "left_out": entry.left_out,
        "values": dict(entry.values),
        "lr": dict(entry.lrs),
        "gain": None if gain is None else dict(vars(gain)),
    }


def _write(path: Path, text: str) -> None:
    """Whole or not at all, and only where something changed."""
    scratch = path.with_name(f".{path.name}.new")
    scratch.write_text(text.rstrip("\n") + "\n", encoding="utf-8")
    scratch.replace(path)
