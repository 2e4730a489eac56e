"""Lists comparisons, filters one, and prepares its table, differing parameters, curves and exports.

Numbers and marks come from `pedro.comparison`, so they are those that `pedro compare` prints.
"""

from __future__ import annotations

import html
import json
import math
import re
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import yaml

from pedro.comparison import renderers
from pedro.comparison.result_model import JUDGE, Comparison, Paper, RunResult, Table, format_score, parse_paper
from pedro.comparison.run_files import METADATA, count_runs, last_change, read_comparison
from pedro.comparison.tables import build_tables, select
from pedro.comparison.verdict import by_information
from pedro.data.tasks import TASKS
from sources.view import tenant_seen

if TYPE_CHECKING:
    from pedro.config import Settings

CHECKOUT = Path(__file__).parents[2]
HTML = renderers.Style("<b>{}</b>", "{}*", "<u>{}</u>", "{}†", "{}!")
LEGEND = (
    "**bold**: best, and significantly better than every other · *: highest, but not significantly · underlined: "
    "second · †: no better than chance · !: runs failed"
)
CURVES = {"dev/loss": "Validation loss", "train/loss": "Training loss"}
TWIN = "nano_"  # how a small twin's name begins; the paper's own experiment is called paper_…
MILLIONS = "parameters (M)"  # a column that is no task
Names = Sequence[str]
"""Names that are asked for; none means all."""


@dataclass(frozen=True)
class ListedComparison:
    """A comparison that can be chosen. `stamp` changes when runs are added."""

    key: str
    folder: Path
    stamp: float
    title: str = ""


@dataclass(frozen=True)
class Choices:
    """What of a comparison can be asked for, in its own order."""

    tasks: tuple[str, ...]
    labels: tuple[str, ...]
    backbones: tuple[str, ...]


@dataclass(frozen=True)
class FilteredComparison:
    """What is asked for: tables as `pedro compare` makes them, and the runs behind them."""

    comparison: Comparison
    tables: tuple[Table, ...]
    runs: tuple[RunResult, ...]
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

    @property
    def titles(self) -> dict[str, str]:
        """Tasks' names for people, as far as they are known."""
        known = {name: task.title for name, task in TASKS.items()}
        return known | {run.task: run.title for run in self.runs if run.title}


def list_comparisons(settings: Settings) -> tuple[ListedComparison, ...]:
    """Those of the checkout, then those of the home, the ones with the most runs first; only titles are read yet."""
    if tenant_seen(settings) is not None:  # comparisons are operators' own
        return ()
    roots = (("results", CHECKOUT / "jobs" / "results"), ("home", settings.home / "comparisons"))
    return tuple(
        ListedComparison(f"{root}/{path.name}", path, last_change(path), _title(path))
        for root, folder in roots
        for path in sorted((file.parent for file in folder.glob(f"*/{METADATA}")), key=lambda f: (-count_runs(f), f))
    )


def titles_of(listed: Iterable[ListedComparison]) -> dict[str, str]:
    """What each is called, by key: two of one title are told apart by the key."""
    listed = list(listed)
    titles = [each.title for each in listed]
    return {
        each.key: each.title if each.title and titles.count(each.title) == 1 else f"{each.title} ({each.key})".strip()
        for each in listed
    }


def _title(folder: Path) -> str:
    try:
        return str(json.loads((folder / METADATA).read_text(encoding="utf-8"))["title"])
    except (OSError, ValueError, TypeError, KeyError):  # it is read again when it is chosen, and then said
        return ""


def read_listed(listed: ListedComparison) -> Comparison:
    """All of a comparison; what is broken is named in its `problems`."""
    return read_comparison(listed.folder)


def choices(comparison: Comparison) -> Choices:
    """Tasks, methods and backbones that have runs."""
    chosen = select(comparison)
    labels, backbones = {run.label for run in chosen.runs}, {run.backbone for run in chosen.runs}
    trained = {run.task for run in chosen.runs}
    return Choices(
        tasks=tuple(dict.fromkeys(at for task, ats in chosen.columns.items() if task in trained for at in ats)),
        labels=tuple(label for label in chosen.labels if label in labels),
        backbones=tuple(dict.fromkeys(name for name, _ in chosen.table_keys if name in backbones)),
    )


def filter_comparison(
    comparison: Comparison, tasks: Names = (), labels: Names = (), backbones: Names = ()
) -> FilteredComparison:
    """Some tasks, methods and backbones of a comparison; marks and averages are among those."""
    chosen = select(comparison)
    tables = build_tables(chosen, tasks=tasks or None, labels=labels or None, backbones=backbones or None)
    shown = {(table.backbone, table.budget, label, task) for table in tables for label, task in table.entries}
    runs = [
        run
        for run in chosen.runs
        if any((run.backbone, run.budget, run.label, at) in shown for at in chosen.columns.get(run.task, [run.task]))
    ]
    try:
        paper, complaint = paper_of(comparison), ""
    except (ValueError, OSError, yaml.YAMLError) as error:
        paper, complaint = None, str(error)
    return FilteredComparison(comparison, tuple(tables), tuple(runs), paper, complaint)


def paper_of(comparison: Comparison) -> Paper | None:
    """What the comparison carries of a paper; a small twin of a paper's experiment, what that experiment carries."""
    if comparison.metadata.get("paper") is not None or not comparison.name.startswith(TWIN):
        return parse_paper(comparison.metadata.get("paper"))
    twin = CHECKOUT / "jobs" / "configs" / f"paper_{comparison.name.removeprefix(TWIN)}.yaml"
    spec = yaml.safe_load(twin.read_text(encoding="utf-8")) if twin.is_file() else {}
    paper = parse_paper(spec.get("paper"))
    theirs = f"Theirs on {', '.join(spec['backbones'])}." if spec.get("backbones") else ""
    return paper and replace(paper, note=f"{paper.note} {theirs}".strip())


def table_html(table: Table) -> str:
    """A table for a page: number and marks, the interval below it; wide ones scroll, by keyboard too."""
    return _html(renderers.render_scores(table, HTML))


def beside_html(selection: FilteredComparison) -> str:
    """What was measured beside scores, and what others report, as tables for a page; empty where there is neither."""
    costs = [renderers.render_costs(table) for table in selection.tables if table.costs]
    theirs = [renderers.render_imported(selection.comparison.imported)] if selection.comparison.imported else []
    return "".join(map(_html, [*costs, *theirs]))


def _html(rendered: renderers.RenderedTable) -> str:
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rendered.head)
    rows = "".join(
        f'<tr><th scope="row">{html.escape(row[0][0])}</th>'
        + "".join(f"<td>{value}{f'<small>{span}</small>' if span else ''}</td>" for value, span in row[1:])
        + "</tr>"
        for row in rendered.rows
    )
    title = html.escape(rendered.title)
    return (
        f'<div class="pedro-table" tabindex="0" role="region" aria-label="{title}"><table><caption>{title}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def literal(text: str) -> str:
    """Text that Markdown shows as it stands."""
    return re.sub(r"([\\`*_$~\[\]<>])", r"\\\1", text)


def table_name(table: Table) -> str:
    """What tells a table from the others of its comparison."""
    return table.backbone if table.budget is None else f"{table.backbone} · {table.budget:,} parameters"


def sortable_rows(selection: FilteredComparison) -> list[dict[str, Any]]:
    """A row a method of each table: numbers, unlike the text of a printed table; scores in percent."""
    rows = []
    for table in selection.tables:
        for label in table.rows:
            row: dict[str, Any] = {"method": label}
            if len(selection.tables) > 1:
                row["backbone"] = table_name(table)
            row["parameters"] = table.parameters[label][1] or None
            for task in table.columns:
                entry = table.entries.get((label, task))
                value = entry.value if entry is not None else None
                scale = 1.0 if entry is not None and entry.metric == JUDGE else 100.0
                row[task] = None if value is None else scale * value
            rows.append(row)
    return rows


def paper_rows(selection: FilteredComparison) -> list[dict[str, Any]]:
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


def differing(runs: Iterable[RunResult]) -> list[dict[str, Any]]:
    """A row for each method with only those parameters that are not the same for all; the seed is none of them."""
    seen: dict[str, dict[str, dict[str, None]]] = {}
    for run in runs:
        row = seen.setdefault(run.label, {})
        for key, value in _parameters(run).items():
            row.setdefault(key, {})[_word(value)] = None
    keys = dict.fromkeys(key for row in seen.values() for key in row)
    kept = [key for key in keys if len({tuple(sorted(row.get(key, {"-": None}))) for row in seen.values()}) > 1]
    return [
        {"method": label, **{key: ", ".join(row.get(key, {"-": None})) for key in kept}} for label, row in seen.items()
    ]


def first_curve(runs: Sequence[RunResult], table: Table) -> str:
    """The task to draw at first: of those that have curves, the one on which methods differ most."""
    drawn = {run.task for run in runs if run.curves.get("dev/loss")} or {run.task for run in runs}
    return next((task for task in by_information(table) if task in drawn), min(drawn))


def curve_rows(runs: Iterable[RunResult], task: str, curve: str) -> list[dict[str, Any]]:
    """One row a method and step: the median over seeds, and the seeds' least and most."""
    points: dict[tuple[str, int], list[float]] = {}
    for run in runs:
        if run.task == task:
            for step, value in run.curves.get(curve, ()):
                if math.isfinite(value):
                    points.setdefault((_named(run), int(step)), []).append(value)
    return [
        {"method": name, "step": step, "value": median(values), "low": min(values), "high": max(values)}
        for (name, step), values in points.items()
    ]


def best_values(runs: Iterable[RunResult], task: str, curve: str) -> list[dict[str, Any]]:
    """One row a method: the best value of its runs (the median over seeds) and the last, which may be worse."""
    bests: dict[str, list[tuple[float, int, float]]] = {}
    for run in runs:
        points = [point for point in run.curves.get(curve, ()) if math.isfinite(point[1])]
        if run.task == task and points:
            step, best = min(points, key=lambda point: point[1])
            bests.setdefault(_named(run), []).append((best, int(step), points[-1][1]))
    rows = [
        {
            "method": name,
            "best": median([best for best, _, _ in seeds]),
            "step": int(median([step for _, step, _ in seeds])),
            "last": median([last for _, _, last in seeds]),
            "seeds": len(seeds),
        }
        for name, seeds in bests.items()
    ]
    return sorted(rows, key=lambda row: row["best"])


def budget_rows(selection: FilteredComparison, task: str) -> list[dict[str, Any]]:
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
        if (entry := table.entries.get((label, task))) is not None and entry.value is not None and entry.parameters
    ]


def as_csv(selection: FilteredComparison) -> str:
    """What is shown, numbers unrounded."""
    return renderers.as_csv(selection.tables, selection.paper)


def as_latex(selection: FilteredComparison) -> str:
    """What is shown as table environments."""
    parts = ["% needs \\usepackage{booktabs,graphicx}"]
    parts += [
        renderers.as_latex(renderers.render_scores(table, renderers.TEX), table.notes) for table in selection.tables
    ]
    return "\n\n".join(parts) + "\n"


def as_png(selection: FilteredComparison) -> bytes:
    """What is shown as a figure: every method with its interval."""
    from pedro.comparison.figures import draw_table

    return _figure(lambda path: draw_table(selection.tables, path))


def budgets_as_png(selection: FilteredComparison) -> bytes:
    """Score against trained parameters as a figure."""
    from pedro.comparison.figures import draw_budgets

    return _figure(lambda path: draw_budgets(selection.tables, path))


def _figure(draw: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "figure.png"
        draw(path)
        return path.read_bytes()


def _ours(selection: FilteredComparison, label: str, column: str) -> float | None:
    """The number of ours that belongs beside the paper's, as it is printed."""
    entries = [table.entries.get((label, at)) for table in selection.tables for at in table.columns]
    if column == MILLIONS:
        return next((entry.parameters / 1e6 for entry in entries if entry is not None and entry.parameters), None)
    mine = next((entry for entry in entries if entry is not None and entry.task == column), None)
    return None if mine is None or mine.value is None else float(format_score(mine.value, mine.metric))


def _parameters(run: RunResult) -> dict[str, Any]:
    """What a run was asked for, flat; what is the outcome of it (counts) and its seed are left out."""
    training = {key: value for key, value in run.training.items() if key not in ("seed", "lr")}
    return {"kind": run.method, **run.options, "lr": run.lr, **{f"training.{k}": v for k, v in training.items()}}


def _word(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _named(run: RunResult) -> str:
    return run.label if run.budget is None else f"{run.label} at {run.budget:,}"
