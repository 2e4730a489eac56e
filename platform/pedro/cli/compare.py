"""`pedro compare`: methods side by side on the same rows, over several seeds, with intervals."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pedro.cli.output import AsJson, emit, log, table

if TYPE_CHECKING:
    from pedro.comparison.pipeline import PreparedComparison
    from pedro.comparison.spec import ComparisonSpec, EfficiencySpec


def compare(
    spec: Annotated[Path, typer.Argument(help="A YAML file: tasks, methods, seeds, training, tune, budgets …")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="Settings to change, for instance training.max_steps=50")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for the results [PEDRO_HOME/comparisons/NAME].")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Start nothing; check everything and list the runs.")
    ] = False,
    report: Annotated[
        bool, typer.Option("--report", help="Start nothing; write tables and figures of the existing runs.")
    ] = False,
    pack: Annotated[
        bool,
        typer.Option(
            "--pack", help="Start nothing; merge the runs' files into one runs.jsonl to commit, then as --report."
        ),
    ] = False,
    pareto: Annotated[
        list[str] | None,
        typer.Option(
            "--pareto",
            metavar="X,Y",
            help="Plot the Pareto front of two columns, for instance parameters,score; repeatable.",
        ),
    ] = None,
    export_peft: Annotated[
        Path | None,
        typer.Option(
            "--export-peft",
            help="As --report; also write the runs to this folder in the format of PEFT's method_comparison.",
        ),
    ] = None,
    import_peft: Annotated[
        list[Path] | None,
        typer.Option(
            "--import-peft",
            help="As --report; also show results of PEFT's method_comparison (a file or a folder; repeatable).",
        ),
    ] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    allow_dirty: Annotated[
        bool,
        typer.Option(
            "--allow-dirty",
            help="Write to jobs/results with uncommitted code; the runs are marked by a + after the commit.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train and score methods × tasks × backbones × budgets × seeds, and print the table a paper would show.

    Every finished run has its own file; after an interruption or a change, the same command does only what is missing.
    Tables (text, Markdown, CSV, LaTeX) and figures (PNG) go beside the runs. To commit a comparison, --pack it.
    Tasks that the package does not carry are read below PEDRO_TASK_DATA or `data:` of the spec (a directory, or hub).

    Examples: `pedro compare jobs/configs/nano_table1.yaml`,
    `pedro compare jobs/configs/nano_table1.yaml --out jobs/results/nano_table1 --report`,
    `pedro compare jobs/configs/paper_table1.yaml --dry-run`
    """
    from pedro.comparison.spec import EfficiencySpec, load_comparison_spec
    from pedro.config import Settings

    wanted = load_comparison_spec(spec, overrides or [])
    reports = report or pack or export_peft is not None or bool(import_peft)
    if isinstance(wanted, EfficiencySpec):
        if reports or pareto or retry_failed:
            raise typer.BadParameter("an efficiency spec has no runs to report or to try again; run it as it is")
        _efficiency(wanted, out, dry_run, allow_dirty, as_json)
        return
    from pedro.comparison.report import draw_front, make_report, print_report, summarize, write_report
    from pedro.comparison.run_files import PACKED, folder_of, held, pack_runs, read_named

    settings = Settings.from_env()
    folder = folder_of(wanted.name, settings.home, out)
    fronts = _fronts(pareto, wanted) if pareto else []
    if reports:
        if pack:
            read_named(folder, wanted.name)
            with held(folder):
                log(f"{pack_runs(folder)} runs packed into {folder / PACKED}")
        if import_peft:
            from pedro.comparison.peft_results import import_results

            log(f"{import_results(read_named(folder, wanted.name), import_peft)} results of PEFT's imported")
        made = make_report(read_named(folder, wanted.name))
        write_report(made)
        if export_peft:
            from pedro.comparison.peft_results import export_results

            log(f"{len(export_results(made.selection, export_peft))} results written to {export_peft}")
    else:
        from pedro.comparison.pipeline import compare as run
        from pedro.comparison.pipeline import prepare

        prepared = prepare(wanted, settings, folder, retry_failed, log)
        if dry_run:
            _show_plan(wanted, prepared, folder, as_json)
            return
        from pedro.cluster import connect
        from pedro.provenance import check_unchanged, code_state

        check_unchanged(code_state(), folder, allow_dirty)
        with held(folder):
            connect(settings, log, attach=True)
            made = run(wanted, settings, folder, prepared, log)
    for x, y in fronts:
        figure, unbeaten = draw_front(made, x, y)
        log(f"{figure}: no other beats {', '.join(unbeaten)}")
    for problem in made.comparison.problems:
        log(f"left out: {problem}")
    person = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if person else 160

    def show() -> None:
        typer.echo(f"{print_report(made, width=width, ansi=person)}\n\ntables, figures and runs: {folder}")

    emit(summarize(made), as_json, show)


def _fronts(words: list[str], spec: ComparisonSpec) -> list[tuple[str, str]]:
    """The pairs of columns of --pareto, checked before anything starts."""
    from pedro.comparison.costs import METRICS

    known = [*METRICS, *(other.task for task in spec.tasks for other in task.evaluations)]
    pairs = [tuple(word.split(",")) for word in words]
    for word, pair in zip(words, pairs, strict=True):
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(known):
            raise typer.BadParameter(f"--pareto: expected two of {', '.join(known)} with a comma between, got {word!r}")
    return [(pair[0], pair[1]) for pair in pairs]


def _show_plan(spec: ComparisonSpec, prepared: PreparedComparison, folder: Path, as_json: bool) -> None:
    """The runs, and how many of them are done."""
    from pedro.comparison.run_planner import count_parameters_of

    planner = prepared.planner
    rows = []
    for group in planner.groups:
        options, trained = dict(group.options), "-"
        if not group.untrained:
            trained = f"{count_parameters_of(group.method, json.dumps(options, sort_keys=True), group.backbone):,}"
        rows.append([group.label, group.task, group.backbone, group.budget or "-", trained])
    done = planner.count_done(prepared.kept)
    shown: dict[str, Any] = {
        "name": spec.name,
        "runs": planner.count(),
        "done": done,
        "directory": str(folder),
        "spec": spec.to_dict(),
    }

    def show() -> None:
        table(["method", "task", "backbone", "budget", "trained parameters"], rows)
        searched = f", learning rate from {', '.join(f'{lr:g}' for lr in spec.tune.lr)}" if spec.tune else ""
        searched += f" and up to {spec.tune.extend} values beyond" if spec.tune and spec.tune.extend else ""
        least = "at least " if spec.tune and spec.tune.extend else ""
        typer.echo(f"{spec.name}: {least}{planner.count()} runs, {done} done; seeds {list(spec.seeds)}{searched}")

    emit(shown, as_json, show)


def _efficiency(spec: EfficiencySpec, out: Path | None, dry_run: bool, allow_dirty: bool, as_json: bool) -> None:
    """Table 3 is a benchmark of the engine."""
    from pedro.comparison.efficiency import check_efficiency, run_efficiency

    if dry_run:
        check_efficiency(spec)
        line = f"{spec.name}: tokens per second of {', '.join(spec.models)} on {spec.device}"
        emit(spec.model_dump(mode="json"), as_json, lambda: typer.echo(line))
        return
    result, text, path = run_efficiency(spec, out, allow_dirty)
    emit(result, as_json, lambda: typer.echo(f"{text}\n\nsaved to {path}"))
