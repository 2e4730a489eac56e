"""A comparison for people and programs: what `pedro compare` prints, and the files beside its runs.

Knows nothing of how runs are made; writes nothing but what can be made again from comparison.json and cells/.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pedro.comparison import sheets
from pedro.comparison.layout import current
from pedro.comparison.paper import Paper, read_paper
from pedro.comparison.results import SCHEMA, Comparison
from pedro.comparison.sheets import Sheet, Style
from pedro.comparison.tables import Difference, Entry, Table, tables
from pedro.errors import ConfigError

WIDTH, FILE_WIDTH = 160, 200
SIGNS = "**proven best**   best without a claim*   _second_   † at chance   ! some runs failed"
ANSI_SIGNS = SIGNS.replace("**proven best**", sheets.ANSI.proven.format("proven best")).replace(
    "_second_", sheets.ANSI.second.format("second")
)
PROVEN = "In bold where the 95 % interval, on the same rows, excludes zero."
LATEX_HEAD = "% needs \\usepackage{booktabs,graphicx}"


def print_report(comparison: Comparison, *, width: int = WIDTH, ansi: bool = False) -> str:
    """The tables, what they rest on and, where the spec carries it, what the paper reports, as plain text.

    With `ansi`, bold and underlined by a terminal's escape sequences in place of signs.
    """
    return _printed(comparison, tables(comparison), width, ansi)


def write_report(comparison: Comparison) -> None:
    """Write tables (text, Markdown, CSV, LaTeX), figures and summary.json into the comparison's folder.

    Raises ConfigError if there is no comparison in it.
    """
    if not comparison.head:
        why = "; ".join(comparison.problems)
        raise ConfigError(f"{comparison.folder} holds no comparison: {why}; name the folder of one, or run it first")
    from pedro.comparison.figures import draw_activations, draw_budgets, draw_groups, draw_table, grouped

    folder, found = comparison.folder, tables(comparison)
    _write(folder / "table.txt", _printed(comparison, found, FILE_WIDTH, ansi=False))
    _write(folder / "summary.json", json.dumps(_summary(comparison, found), indent=1, ensure_ascii=False))
    if not found:
        return
    _write(folder / "table.md", _markdown(comparison, found))
    _write(folder / "table.tex", _latex(comparison, found))
    _write(folder / "table.csv", sheets.as_csv(found, _paper(comparison)[0]))
    import matplotlib

    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in a label is a dollar
        draw_table(found, folder / "table.png")
        if len({table.budget for table in found}) > 1:
            draw_budgets(found, folder / "budget.png")
        if grouped(comparison):
            draw_groups(comparison, folder / "groups.png")
        if any(cell.activations for cell in current(comparison)[0]):
            draw_activations(comparison, folder / "activations.png")


def _printed(comparison: Comparison, found: Sequence[Table], width: int, ansi: bool) -> str:
    paper, complaint = _paper(comparison)
    style, signs = (sheets.ANSI, ANSI_SIGNS) if ansi else (sheets.PLAIN, SIGNS)
    parts = [_headline(comparison)]
    own, shared = _notes(found, complaint)
    for table, notes in zip(found, own, strict=True):
        parts += [_titled(sheet, width) for sheet in _sheets(table, style)]
        parts.append(_wrapped(notes, width))
    if found:
        parts.append(f"{signs}\n{_wrapped(shared, width)}")
    else:
        parts.append("\n".join(["No run has finished yet.", *comparison.problems]))
    if paper:
        parts.append("\n".join(filter(None, [_titled(sheets.reported(paper), width), paper.note])))
    return "\n\n".join(filter(None, parts))


def _summary(comparison: Comparison, found: Sequence[Table]) -> dict[str, Any]:
    """The comparison for programs: every number of the tables, the notes, and where they come from."""
    cells, others = current(comparison)
    paper, complaint = _paper(comparison)
    finished = sum(cell.finished for cell in cells)
    return {
        "schema": SCHEMA,
        "name": comparison.name,
        "title": comparison.title,
        "equal": comparison.equal,
        "baseline": comparison.baseline,
        "runs": {"finished": finished, "failed": len(cells) - finished, "left_out": others},
        "seconds": comparison.head.get("seconds"),
        "tables": [_as_dict(table) for table in found],
        "notes": _notes(found, complaint)[1],
        "paper": comparison.head.get("paper") if paper else None,
        "problems": list(comparison.problems),
        "provenance": comparison.head.get("provenance"),
    }


def _sheets(table: Table, style: Style) -> list[Sheet]:
    return [sheet for sheet in (sheets.scores(table, style), sheets.differences(table, style)) if sheet]


def _titled(sheet: Sheet, width: int) -> str:
    return f"{sheet.title}\n{sheets.as_text(sheet, width)}"


def _headline(comparison: Comparison) -> str:
    cells, _ = current(comparison)
    failed = sum(not cell.finished for cell in cells)
    parts = [f"{comparison.name}: {len(cells)} runs" + (f", {failed} failed" if failed else "")]
    if seconds := comparison.head.get("seconds"):
        parts.append(f"{float(seconds) / 60:.0f} minutes")
    if commit := (comparison.head.get("provenance") or {}).get("commit"):
        parts.append(f"commit {commit[:12]}{'+' * commit.endswith('+')}")
    return " · ".join(parts)


def _notes(found: Sequence[Table], complaint: str) -> tuple[list[list[str]], list[str]]:
    """The notes of each table that others do not have, and those of all of them."""
    shared = [note for note in (found[0].notes if found else ()) if all(note in table.notes for table in found)]
    own = [[note for note in table.notes if note not in shared] for table in found]
    return own, shared + ([complaint] if complaint else [])


def _wrapped(notes: Iterable[str], width: int) -> str:
    return "\n".join(textwrap.fill(f"- {note}", width, subsequent_indent="  ") for note in notes)


def _listed(notes: Iterable[str]) -> str:
    return "\n".join(f"- {note}" for note in notes)


def _paper(comparison: Comparison) -> tuple[Paper | None, str]:
    """The paper's numbers, or why they cannot be shown: hours of runs do not fail for a word in the spec."""
    try:
        return read_paper(comparison), ""
    except ValueError as error:
        return None, f"The paper's numbers are not shown: {error}."


def _markdown(comparison: Comparison, found: Sequence[Table]) -> str:
    paper, complaint = _paper(comparison)
    parts = [f"# {sheets.literal(comparison.title)}", _headline(comparison)]
    own, shared = _notes(found, complaint)
    for table, notes in zip(found, own, strict=True):
        for sheet in _sheets(table, sheets.MARKDOWN):
            parts += [f"**{sheets.literal(sheet.title)}**", sheets.as_markdown(sheet)]
        parts.append(_listed(map(sheets.literal, notes)))
    parts.append(_listed(map(sheets.literal, shared)))
    if paper:
        sheet = sheets.reported(paper)
        parts += [f"**{sheets.literal(sheet.title)}**", sheets.as_markdown(sheet), sheets.literal(paper.note)]
    return "\n\n".join(filter(None, parts))


def _latex(comparison: Comparison, found: Sequence[Table]) -> str:
    paper, complaint = _paper(comparison)
    parts = [LATEX_HEAD]
    for table in found:
        notes = [*table.notes, *([complaint] if complaint else [])]
        for place, sheet in enumerate(_sheets(table, sheets.TEX)):
            parts.append(sheets.as_latex(sheet, notes if not place else [PROVEN]))
    if paper:
        parts.append(sheets.as_latex(sheets.reported(paper), [paper.note] if paper.note else []))
    return "\n\n".join(parts)


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
                "entries": {at: _entry(e) for at in table.columns if (e := table.cells.get((label, at)))},
            }
            for label in table.rows
        ],
        "notes": list(table.notes),
    }


def _entry(entry: Entry) -> dict[str, Any]:
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
