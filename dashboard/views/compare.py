"""Compare: methods × tasks × backbones with intervals, differing parameters, Pareto fronts, budgets, curves."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import altair as alt
import pandas as pd
import streamlit as st

import connection
from components import curves as curve_chart
from components import shared_url
from components.costs import costs
from components.run_rows import rows_behind
from components.verdict import verdict
from drawing import background_css, colours, dashes, show_chart
from pedro.comparison.verdict import by_information
from sources import compare as data
from sources import mlflow_runs

if TYPE_CHECKING:
    from pedro.comparison.result_model import Comparison, RunResult, Table
    from pedro.config import Settings
    from sources.compare import FilteredComparison

REFRESH_S = 60
Names = tuple[str, ...]
MOST_LINES = 12
STYLE = """<style>
.pedro-table {overflow-x: auto; max-width: 100%%;}
.pedro-table table {border-collapse: collapse; width: 100%%; font-variant-numeric: tabular-nums; font-size: 0.9rem;}
.pedro-table caption {text-align: left; font-weight: 600; padding: 0.25rem 0 0.5rem;}
.pedro-table th, .pedro-table td {padding: 0.3rem 0.4rem; text-align: right;
  border-bottom: 1px solid rgba(128, 132, 149, 0.3);}
.pedro-table td {white-space: nowrap;}
.pedro-table th {font-weight: 500; vertical-align: bottom; overflow-wrap: anywhere;}
.pedro-table th:first-child {text-align: left; vertical-align: middle; position: sticky; left: 0; background: %s;
  min-width: 5.5rem;}
.pedro-table td small {display: block; opacity: 0.7; font-size: 0.7rem;}
.pedro-table u {text-underline-offset: 3px;}
@media (max-width: 640px) {.pedro-table th {overflow-wrap: normal;}}
</style>"""

list_all = st.cache_resource(ttl=5, show_spinner=False)(data.list_comparisons)
read_models = st.cache_data(ttl=REFRESH_S, show_spinner="Reading the experiments …")(mlflow_runs.read_models)
read_runs = st.cache_resource(ttl=REFRESH_S, show_spinner="Reading the runs …", max_entries=20)(mlflow_runs.read_runs)
read_one = st.cache_resource(show_spinner="Reading the runs …", max_entries=10)(data.read_listed)


@st.cache_resource(ttl=600, show_spinner="Computing the intervals …", max_entries=50)
def select(
    _comparison: Comparison,
    stamp: str,  # noqa: ARG001 - part of the key
    tasks: Names,
    labels: Names,
    backbones: Names,
) -> FilteredComparison:
    """The bootstrap takes a moment, and its outcome changes with the runs and the filters alone."""
    return data.filter_comparison(_comparison, tasks, labels, backbones)


@st.cache_resource(ttl=REFRESH_S, show_spinner="Reading the curves …", max_entries=50)
def with_curves(settings: Settings, _runs: tuple[RunResult, ...], stamp: str, task: str) -> list[RunResult]:  # noqa: ARG001 - part of the key
    return mlflow_runs.with_curves(settings, _runs, task)


def page() -> None:
    settings = connection.settings()
    st.title("Compare", anchor=False)
    comparison, stamp = chosen(settings)
    if comparison is None:
        return
    problems(comparison)
    selection = filtered(comparison, stamp)
    if not selection.tables:
        st.caption("No finished run fits. Choose other tasks or methods, or wait for the first one.")
        return
    main = verdict(selection)
    table(selection)
    downloads(selection)
    rows_behind(selection, by_information(main))
    beside_the_paper(selection)
    costs(selection)
    budgets(selection)
    curves(settings, selection, stamp, main)
    parameters(selection)


def chosen(settings: Settings) -> tuple[Comparison | None, str]:
    """The selected comparison, and a stamp that changes with its runs."""
    comparisons = {listed.key: listed for listed in list_all(settings)}
    options = [*comparisons, *([mlflow_runs.NAME] if mlflow_runs.may_have_any(settings) else [])]
    if not options:
        nothing()
        return None, ""
    key = shared_url.choose(
        "Comparison",
        options,
        "comparison",
        titles=data.titles_of(comparisons.values()) | {mlflow_runs.NAME: mlflow_runs.TITLE},
        what="Comparison",
        placeholder="Choose a comparison",
    )
    if key is None:
        return None, ""
    if key in comparisons:
        listed = comparisons[key]
        return read_one(listed), f"{key} {listed.stamp}"
    models, problem = read_models(settings)
    if problem:
        st.warning(f"The registry cannot be read.\n\n```\n{problem}\n```", icon=":material/database_off:")
    if not models:
        if not problem:
            nothing()
        return None, ""
    shared_url.check("models", models, "Adapter", "No runs of it are in this registry.")
    wanted = st.multiselect(
        "Adapters", models, default=models[:3], key="models", bind="query-params", max_selections=25
    )
    comparison, problem = read_runs(settings, tuple(wanted))
    if problem:
        st.warning(f"The runs cannot be read.\n\n```\n{problem}\n```", icon=":material/database_off:")
    return comparison, f"{mlflow_runs.NAME} {[run.id for run in comparison.runs]}"


def nothing() -> None:
    st.info(
        "Nothing to compare yet. `pedro compare jobs/configs/nano_table1.yaml` runs a grid of methods; jobs of "
        "`pedro submit` can be compared as well.",
        icon=":material/compare_arrows:",
    )


def problems(comparison: Comparison) -> None:
    if comparison.problems:
        listed = "\n".join(comparison.problems)
        st.warning(
            f"These files of `{comparison.folder}` cannot be read and are left out:\n\n```\n{listed}\n```",
            icon=":material/broken_image:",
        )


def filtered(comparison: Comparison, stamp: str) -> FilteredComparison:
    """What the filters leave; they are kept in the URL."""
    open_to = data.choices(comparison)
    several = len(open_to.backbones) > 1
    for key, names, what in (
        ("tasks", open_to.tasks, "Task"),
        ("methods", open_to.labels, "Method"),
        ("backbones", open_to.backbones, "Backbone"),
    ):
        shared_url.check(key, names, what, "No finished run of this comparison has it; the filter leaves it out.")
    columns = st.columns(3 if several else 2)
    tasks = columns[0].multiselect("Tasks", open_to.tasks, key="tasks", bind="query-params", placeholder="all tasks")
    labels = columns[1].multiselect(
        "Methods", open_to.labels, key="methods", bind="query-params", placeholder="all methods"
    )
    backbones = (
        columns[2].multiselect("Backbones", open_to.backbones, key="backbones", bind="query-params", placeholder="all")
        if several
        else []
    )
    return select(comparison, stamp, tuple(tasks), tuple(labels), tuple(backbones))


def table(selection: FilteredComparison) -> None:
    printed, sortable = st.tabs(["As printed", "Sortable"])
    with printed:
        style = STYLE % background_css()  # of the first column, which stays while the others scroll
        st.html(style + "".join(data.table_html(table) for table in selection.tables))
    with sortable:
        frame = pd.DataFrame(data.sortable_rows(selection))
        whole = {"parameters": st.column_config.NumberColumn(format="localized")}
        scores = {
            name: st.column_config.NumberColumn(format="%.1f") for name in frame.columns if name in selection.tasks
        }
        st.dataframe(
            frame.dropna(axis="columns", how="all"), hide_index=True, width="stretch", column_config=whole | scores
        )
    if beside := data.beside_html(selection):
        st.html(beside)
    heads = {table.notes[0] for table in selection.tables if table.notes}  # which budget is equal
    st.caption("  \n".join([data.LEGEND, *(map(data.literal, heads) if len(heads) == 1 else ())]))
    notes = dict.fromkeys(note for table in selection.tables for note in table.notes)
    with st.expander("About these numbers", icon=":material/info:"):
        st.markdown("\n".join(f"- {data.literal(note)}" for note in notes))


def downloads(selection: FilteredComparison) -> None:
    """Exactly what is shown, as files; figures are drawn when they are asked for."""
    name = selection.comparison.name
    columns = st.columns(4)
    for column, label, make, ending, kind in (
        (columns[0], "CSV", data.as_csv, "csv", "text/csv"),
        (columns[1], "LaTeX", data.as_latex, "tex", "text/x-tex"),
        (columns[2], "PNG", data.as_png, "png", "image/png"),
        (columns[3], "PNG of budgets", data.budgets_as_png, "budget.png", "image/png"),
    ):
        if make is data.budgets_as_png and not data.budget_rows(selection, selection.tasks[0]):
            continue
        column.download_button(
            label,
            partial(make, selection),
            f"{name}.{ending}",
            kind,
            icon=":material/download:",
            on_click="ignore",
            width="stretch",
        )


def beside_the_paper(selection: FilteredComparison) -> None:
    if selection.complaint:
        st.caption(f":orange[:material/warning:] The paper's numbers cannot be shown: {selection.complaint}")
    rows = data.paper_rows(selection)
    if not rows or selection.paper is None:
        return
    st.subheader("Beside the paper", anchor=False)
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch", placeholder="–")
    st.caption(f"{selection.paper.title}. {selection.paper.note}")


def budgets(selection: FilteredComparison) -> None:
    if not data.budget_rows(selection, selection.tasks[0]):
        return
    st.subheader("Score against parameters", anchor=False)
    task = st.selectbox("Task", selection.tasks, index=len(selection.tasks) - 1, key="budget_task", bind="query-params")
    frame = pd.DataFrame(data.budget_rows(selection, task or selection.tasks[-1]))
    if frame.empty:
        st.caption("No method has a score for this task.")
        return
    methods = list(dict.fromkeys(frame["method"]))
    base = alt.Chart(frame).encode(
        x=alt.X(
            "parameters:Q",
            title="trained parameters",
            scale=alt.Scale(type="log", nice=False, padding=30),
            axis=alt.Axis(format="~s"),
        ),
        color=colours("method", methods),
        tooltip=[
            *map(alt.Tooltip, ("method:N", "backbone:N")),
            alt.Tooltip("parameters:Q", format=","),
            *(alt.Tooltip(f"{name}:Q", format=".1%") for name in ("score", "low", "high")),
        ],
    )
    y = alt.Y("score:Q", title="score", scale=alt.Scale(zero=False), axis=alt.Axis(format=".0%"))
    lines = base.mark_line(strokeWidth=2.2, point=alt.OverlayMarkDef(size=45)).encode(
        y=y, strokeDash=dashes("method", methods), detail=alt.Detail("backbone:N")
    )
    spans = base.mark_rule(strokeWidth=1.2, opacity=0.6).encode(
        y=alt.Y("low:Q"), y2=alt.Y2("high:Q"), detail=alt.Detail("backbone:N")
    )
    show_chart((spans + lines).properties(height=380))
    st.caption("Medians over seeds with their 95 % intervals; the number of parameters on a logarithmic axis.")


def curves(settings: Settings, selection: FilteredComparison, stamp: str, main: Table) -> None:
    st.subheader("Learning curves", anchor=False)
    trained = list(dict.fromkeys(run.task for run in selection.runs))
    if not trained:
        st.caption("No run has a curve.")
        return
    left, middle, right, switch = st.columns([3, 3, 3, 2], vertical_alignment="bottom")
    first = data.first_curve(selection.runs, main)
    task = left.selectbox("Trained on", trained, trained.index(first), key="curve_task", bind="query-params") or first
    curve = middle.segmented_control(
        "Curve",
        list(data.CURVES),
        default="dev/loss",
        required=True,
        format_func=data.CURVES.__getitem__,
        key="curve",
        bind="query-params",
    )
    smoothing = right.slider("Smoothing", 0.0, 0.95, 0.6 if curve == "train/loss" else 0.0, 0.05, key=f"smooth_{curve}")
    log = switch.toggle("Log axis", True)
    runs = selection.runs
    if stamp.startswith(mlflow_runs.NAME):
        runs = tuple(with_curves(settings, runs, stamp, task))
    frame = pd.DataFrame(data.curve_rows(runs, task, curve))
    if frame.empty:
        st.caption("These runs logged no such curve.")
        return
    best = data.best_values(runs, task, curve)
    methods = [row["method"] for row in best][:MOST_LINES]
    frame = frame[frame["method"].isin(methods)]
    left, right = st.columns([5, 4], gap="medium")
    with left:
        curve_chart.draw(frame, methods, log=log, smoothing=smoothing)
        st.caption(
            "Medians over seeds; the shading is the range over seeds. Click a legend entry to single it out, "
            "shift-click to add another, double-click to show all."
        )
    right.dataframe(
        pd.DataFrame(best),
        hide_index=True,
        width="stretch",
        column_config={
            "method": st.column_config.TextColumn("Method"),
            "best": st.column_config.NumberColumn("Best", format="%.4f", width=70),
            "step": st.column_config.NumberColumn("At step", format="localized", width=60),
            "last": st.column_config.NumberColumn("Last", format="%.4f", width=70),
            "seeds": st.column_config.NumberColumn("Seeds", width=50),
        },
    )
    if len(best) > MOST_LINES:
        right.caption(f"Drawn are the best {MOST_LINES} of {len(best)}.")


def parameters(selection: FilteredComparison) -> None:
    st.subheader("Parameters that differ", anchor=False)
    rows = data.differing(selection.runs)
    if len(rows) < 2 or len(rows[0]) < 2:
        st.caption("No parameter differs, other than the seed.")
        return
    st.dataframe(pd.DataFrame(rows), hide_index=True, width="stretch")
    st.caption("Parameters that are equal for all methods shown are left out. Several values mean that runs differ.")


if __name__ == "__main__":
    page()
