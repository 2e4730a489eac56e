"""Comparisons: which there are, what of one is chosen, and its table, differing parameters, curves and exports.

Numbers and marks come from `pedro.comparison.tables`, so that they are those that `pedro compare` prints. Knows
nothing of Streamlit.
"""

from __future__ import annotations

import html
import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from pedro.comparison import sheets
from pedro.comparison.layout import columns_of, current, group_order, row_order
from pedro.comparison.paper import Paper, read_paper
from pedro.comparison.results import Cell, Comparison, read_comparison
from pedro.comparison.tables import Table, tables
from pedro.config import Settings

CHECKOUT = Path(__file__).parents[2]
HEAD = "comparison.json"
HTML = sheets.Style("<b>{}</b>", "{}*", "<u>{}</u>", "{}†", "{}!")
LEGEND = "**bold**: best, and proven so · *: best without a claim · underlined: second · †: at chance · !: runs failed"
CURVES = {"dev/loss": "Validation loss", "train/loss": "Training loss"}
TWIN = "nano_"  # how a small twin's name begins; the paper's own experiment is called paper_…
MILLIONS = "parameters (M)"  # a column that is no task
Wanted = Sequence[str]
"""Names that are asked for; none means all."""


@dataclass(frozen=True)
class ListedComparison:
    """A comparison that can be chosen. `stamp` changes when runs are added."""

    key: str
    folder: Path
    stamp: float


@dataclass(frozen=True)
class Choices:
    """What of a comparison can be asked for, in its own order."""

    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    backbones: tuple[str, ...]


@dataclass(frozen=True)
class Selection:
    """What is asked for: tables as `pedro compare` makes them, and the runs behind them."""

    comparison: Comparison
    tables: tuple[Table, ...]
    cells: tuple[Cell, ...]
    paper: Paper | None
    complaint: str

    @property
    def labels(self) -> list[str]:
        """The methods that are shown, in the tables' order."""
        return list(dict.fromkeys(label for table in self.tables for label in table.rows))

    @property
    def tasks(self) -> list[str]:
        """The columns that are shown."""
        return list(dict.fromkeys(task for table in self.tables for task in table.columns))


def list_comparisons(settings: Settings) -> tuple[ListedComparison, ...]:
    """Those of the checkout, then those of the home, the ones with the most runs first; nothing is read yet."""
    roots = (("results", CHECKOUT / "jobs" / "results"), ("home", settings.home / "comparisons"))
    return tuple(
        ListedComparison(f"{root}/{head.parent.name}", head.parent, _stamp(head))
        for root, folder in roots
        for head in sorted(folder.glob(f"*/{HEAD}"), key=lambda head: (-_runs(head), head))
    )


def read(listed: ListedComparison) -> Comparison:
    """All of a comparison; what is broken is named in its `problems`."""
    return read_comparison(listed.folder)


def choices(comparison: Comparison) -> Choices:
    """Tasks, methods and backbones that have runs."""
    cells, _ = current(comparison)
    labels, groups = {cell.label for cell in cells}, {cell.backbone for cell in cells}
    trained = {cell.task for cell in cells}
    return Choices(
        tasks=tuple(dict.fromkeys(at for task, ats in columns_of(comparison).items() if task in trained for at in ats)),
        labels=tuple(label for label in row_order(comparison) if label in labels),
        backbones=tuple(dict.fromkeys(name for name, _ in group_order(comparison) if name in groups)),
    )


def select(comparison: Comparison, tasks: Wanted = (), labels: Wanted = (), backbones: Wanted = ()) -> Selection:
    """Some tasks, methods and backbones of a comparison; marks and averages are among those."""
    found = tables(comparison, tasks=tasks or None, labels=labels or None, backbones=backbones or None)
    shown = {(table.backbone, table.budget, label, task) for table in found for label, task in table.cells}
    places = columns_of(comparison)
    cells = [
        cell
        for cell in current(comparison)[0]
        if any((cell.backbone, cell.budget, cell.label, at) in shown for at in places.get(cell.task, [cell.task]))
    ]
    try:
        paper, complaint = paper_of(comparison), ""
    except (ValueError, OSError, yaml.YAMLError) as error:
        paper, complaint = None, str(error)
    return Selection(comparison, tuple(found), tuple(cells), paper, complaint)


def paper_of(comparison: Comparison) -> Paper | None:
    """What the comparison carries of a paper; a small twin of a paper's experiment, what that experiment carries."""
    if comparison.head.get("paper") is not None or not comparison.name.startswith(TWIN):
        return read_paper(comparison)
    twin = CHECKOUT / "jobs" / "configs" / f"paper_{comparison.name.removeprefix(TWIN)}.yaml"
    tree = yaml.safe_load(twin.read_text(encoding="utf-8")) if twin.is_file() else {}
    paper = read_paper(replace(comparison, head={"paper": tree.get("paper")}))
    theirs = f"Theirs on {', '.join(tree['backbones'])}." if tree.get("backbones") else ""
    return paper and replace(paper, note=f"{paper.note} {theirs}".strip())


def table_html(table: Table) -> str:
    """A table for a page: number and marks, the interval below it; wide ones scroll, by keyboard too."""
    sheet = sheets.scores(table, HTML)
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in sheet.head)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row[0][0])}</th>'
        + "".join(f"<td>{value}{f'<small>{span}</small>' if span else ''}</td>" for value, span in row[1:])
        + "</tr>"
        for row in sheet.rows
    )
    title = html.escape(sheet.title)
    return (
        f'<div class="pedro-table" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def paper_rows(selection: Selection) -> list[dict[str, Any]]:
    """The paper's numbers beside ours, as they are printed: a row for each method that either has."""
    paper = selection.paper
    if paper is None:
        return []
    columns = [column for column in paper.columns if column in selection.tasks] or list(paper.columns)
    rows = []
    for label in dict.fromkeys([*selection.labels, *paper.rows]):
        row: dict[str, Any] = {"method": label}
        for column in columns:
            row[f"{column}, ours"] = _ours(selection, label, column)
            row[f"{column}, paper"] = paper.value(label, column)
        rows.append(row)
    return rows


def differing(cells: Iterable[Cell]) -> list[dict[str, Any]]:
    """A row for each method with only those parameters that are not the same for all; the seed is none of them."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for cell in cells:
        row = seen.setdefault(cell.label, {})
        for key, value in _parameters(cell).items():
            row.setdefault(key, {})[_word(value)] = None
    keys = dict.fromkeys(key for row in seen.values() for key in row)
    kept = [key for key in keys if len({tuple(sorted(row.get(key, {"-": None}))) for row in seen.values()}) > 1]
    return [
        {"method": label, **{key: ", ".join(row.get(key, {"-": None})) for key in kept}} for label, row in seen.items()
    ]


def most_validated(cells: Iterable[Cell]) -> str:
    """The task whose curves of validation have the most points."""
    return max(cells, key=lambda cell: len(cell.curves.get("dev/loss", ()))).task


def curve_rows(cells: Iterable[Cell], task: str, curve: str) -> list[dict[str, Any]]:
    """One row a method and step: the median over seeds, and the seeds' least and most."""
    found: dict[tuple[str, int], list[float]] = {}
    for cell in cells:
        if cell.task == task:
            for step, value in cell.curves.get(curve, ()):
                if math.isfinite(value):
                    found.setdefault((_named(cell), int(step)), []).append(value)
    return [
        {"method": name, "step": step, "value": median(values), "low": min(values), "high": max(values)}
        for (name, step), values in found.items()
    ]


def best_values(cells: Iterable[Cell], task: str, curve: str) -> list[dict[str, Any]]:
    """One row a method: the best value of its runs (the median over seeds) and the last, which may be worse."""
    found: dict[str, list[tuple[float, int, float]]] = {}
    for cell in cells:
        points = [point for point in cell.curves.get(curve, ()) if math.isfinite(point[1])]
        if cell.task == task and points:
            step, best = min(points, key=lambda point: point[1])
            found.setdefault(_named(cell), []).append((best, int(step), points[-1][1]))
    rows = [
        {
            "method": name,
            "best": median([best for best, _, _ in runs]),
            "step": int(median([step for _, step, _ in runs])),
            "last": median([last for _, _, last in runs]),
            "seeds": len(runs),
        }
        for name, runs in found.items()
    ]
    return sorted(rows, key=lambda row: row["best"])


def budget_rows(selection: Selection, task: str) -> list[dict[str, Any]]:
    """Score against trained parameters, a row for each method and budget; nothing where there is one budget only."""
    if len({table.budget for table in selection.tables}) < 2:
        return []
    return [
        {
            "method": label,
            "backbone": table.backbone,
            "parameters": entry.parameters,
            "score": entry.value,
            "low": entry.low,
            "high": entry.high,
        }
        for table in selection.tables
        for label in table.rows
        if (entry := table.cells.get((label, task))) is not None and entry.value is not None and entry.parameters
    ]


def as_csv(selection: Selection) -> str:
    """What is shown, numbers unrounded."""
    return sheets.as_csv(selection.tables, selection.paper)


def as_latex(selection: Selection) -> str:
    """What is shown as table environments."""
    parts = ["% needs \\usepackage{booktabs,graphicx}"]
    parts += [sheets.as_latex(sheets.scores(table, sheets.TEX), table.notes) for table in selection.tables]
    return "\n\n".join(parts) + "\n"


def as_png(selection: Selection) -> bytes:
    """What is shown as a figure: every method with its interval."""
    from pedro.comparison.figures import draw_table

    return _figure(lambda path: draw_table(selection.tables, path))


def budgets_as_png(selection: Selection) -> bytes:
    """Score against trained parameters as a figure."""
    from pedro.comparison.figures import draw_budgets

    return _figure(lambda path: draw_budgets(selection.tables, path))


def _figure(draw: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return path.read_bytes()


def _runs(head: Path) -> int:
    return sum(1 for _ in (head.parent / "cells").glob("*.json"))


def _stamp(head: Path) -> float:
    """The newest of what changes when a run is added."""
    cells = head.parent / "cells"
    return max((path.stat().st_mtime for path in (head, cells) if path.exists()), default=0.0)


def _ours(selection: Selection, label: str, column: str) -> float | None:
    """The number of ours that belongs beside the paper's, as it is printed."""
    found = [table.cells.get((label, at)) for table in selection.tables for at in table.columns]
    if column == MILLIONS:
        return next((entry.parameters / 1e6 for entry in found if entry is not None and entry.parameters), None)
    mine = next((entry for entry in found if entry is not None and entry.task == column), None)
    return None if mine is None or mine.value is None else float(sheets.number(mine.value, mine.metric))


def _parameters(cell: Cell) -> dict[str, Any]:
    """What a run was asked for, flat; what is the outcome of it (counts) and its seed are left out."""
    training = {key: value for key, value in cell.training.items() if key not in ("seed", "lr")}
    return {"kind": cell.method, **cell.options, "lr": cell.lr, **{f"training.{k}": v for k, v in training.items()}}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(cell: Cell) -> str:
    return cell.label if cell.budget is None else f"{cell.label} at {cell.budget:,}"
