"""The tables of docs/results.md say what the committed result files say, digit for digit."""

import json
import re
from pathlib import Path

import pytest
from docs_pages import ROOT, prose, table

PAGE = ROOT / "docs" / "results.md"
RESULTS = ROOT / "jobs" / "results"
COLUMNS = [("S", 1), ("S", 8), ("S", 32), ("M", 1), ("M", 8)]
LINES = [  # of the table of speeds: engine and adapters
    *(("generate", "none"), ("ours", "pedro"), ("ours", "none"), ("ours", "lora")),
    *(("peft", "lora"), ("vllm", "none"), ("vllm", "lora"), ("roofline", "none")),
]

BITS = [("int8", "Q8_0"), ("int4", "Q4_1")]

# The table of promises: of which file's targets, with how many decimals, each of them or the least and the most.
SAID = [
    *(("serving", r"pedro / vllm($|,)", None, "each"), ("tenants", "", 2, "each"), ("longprompt", "", 1, "each")),
    *(("arrivals", "poisson", 2, "each"), ("prefix", "second turn", 2, "each"), ("prefix", "cold prompt", 2, "range")),
    *(("coldstart", "", 1, "each"), ("memory", "", 1, "each"), ("efficiency", "", 2, "each")),
    *(("swap", "until first served", 1, "each"), ("http", "throughput", 2, "each"), ("http", "p50 ms", 0, "each")),
    *(("http-one-thread", "throughput", 2, "each"), ("http-one-thread", "p50 ms", 0, "each")),
    *(("fairness", "p95", 2, "each"), ("control_plane", "p99", 3, "each"), ("registry", "throughput", 2, "each")),
    *(("contention", "decode", 2, "range"), ("soak", "^(engine|gateway|Serve's proxy): memory", 3, "each")),
    *(("fuzz", "seconds", 2, "each"), ("structured", "", 2, "each"), ("speculation", "smollm2.* none$", 2, "each")),
    *(("training", "tokens/s", 2, "each"), ("cotraining", "", 2, "each")),
]


def test_the_demos_table_is_the_demos_result():
    tenants = json.loads((RESULTS / "demo.json").read_text())["tenants"]
    for row, tenant in zip(table(PAGE, "## Demo"), tenants, strict=True):
        adapter = f"`{tenant['tenant']}.{tenant['adapter']}`"
        counts = (tenant["rows"], tenant["steps"], tenant["trainable_parameters"], tenant["test_rows"])
        values = (tenant[name] for name in ("majority", "zero_shot", "few_shot", "score"))
        scores = ("–" if value is None else f"{value:.3f}" for value in values)
        metric = tenant["metric"].replace("f1", "F1")
        assert plain(row) == [adapter, tenant["title"], *(f"{count:,}" for count in counts), metric, *scores]


def test_the_demos_sentences_say_what_was_measured():
    measured = json.loads((RESULTS / "demo.json").read_text())
    swap, page = measured["swap"], " ".join(PAGE.read_text().split())
    assert f"{measured['seconds']:.0f} s after installation and the download" in page
    assert f"{swap['requests']} requests, {swap['failed']} failed, {swap['mixed']} answered by two versions" in page
    assert f"after {swap['seconds_to_first_new']:.1f} s; accuracy {swap['old_accuracy']:.3f} → " in page
    assert not measured["commit"].endswith("+")


def test_the_readme_shows_rows_of_the_demos_table():
    full = {row[0]: row for row in table(PAGE, "## Demo")}
    for row in table(ROOT / "README.md", "| adapter | task |"):
        assert set(row) <= set(full[row[0]])


def test_the_table_of_speeds_is_what_the_benchmark_measured():
    measured = {
        (row["engine"], row["adapters"], row["model"], row["batch"]): (row["decode_tok_s"], row["tok_s"])
        for row in json.loads((RESULTS / "serving.json").read_text())["rows"]
    }
    for row, line in zip(table(PAGE, "## Engine"), LINES, strict=True):
        cells = [measured[*line, *column] for column in COLUMNS]
        assert plain(row)[1:] == [f"{decoding:,.0f} ({whole:,.0f})" for decoding, whole in cells]


def test_what_an_operator_is_told_of_prefill_stall_is_what_was_measured():
    wanted = []
    for row in json.loads((RESULTS / "stall.json").read_text())["rows"]:
        low, high = row["ratio_interval"]
        cells = [f"{row['prefill_stall']:g}", f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"]
        cells += [
            f"{row[a]:.1f}, {row[b]:.1f}" for a, b in (("token_ms", "token_p99_ms"), ("stream_ms", "stream_p99_ms"))
        ]
        wanted.append([*cells, f"{row['long_ttft_ms']:.0f}"])
    assert [plain(row) for row in table(ROOT / "docs" / "operations.md", "| `--prefill-stall` |")] == wanted


def test_the_memory_of_sharded_training_is_what_was_measured():
    measured = json.loads((RESULTS / "sharding.json").read_text())["rows"]
    for cells, row in zip(table(PAGE, "## Sharded training"), measured, strict=True):
        ratio = f" ({row['ratio']:.2f})" if "ratio" in row else ""
        sizes = [f"{row[name]:,.0f}" for name in ("peak_mb", "process_mb", "both_mb", "promised_mb")]
        sizes[0] += ratio
        sizes[3] += f" ({row['off']:+.0%})"
        assert plain(cells) == [str(row["stage"]), *sizes, f"{row['step_s']:.1f}"]


@pytest.mark.parametrize(("name", "targets", "decimals", "which"), SAID, ids=[f"{row[0]}: {row[1]}" for row in SAID])
def test_the_promises_say_what_the_benchmarks_measured(name, targets, decimals, which):
    held = json.loads((RESULTS / f"{name}.json").read_text())["targets"]
    values = [target["value"] for target in held if re.search(targets, target["name"])]
    assert values
    said = " ".join(cells[1] for cells in table(PAGE, "| promise |") if cells[2] == name)
    for value in values if which == "each" else (min(values), max(values)):
        shown = f"{value:.{(1 if value >= 1 else 2) if decimals is None else decimals}f}"
        assert re.search(rf"(?<![\d.]){re.escape(shown)}(?!\d)", said), f"{name}: {shown} is not said"


def test_the_published_figures_stand_beside_what_the_benchmark_measured():
    held = json.loads((RESULTS / "published.json").read_text())
    wanted = []
    for row in held["rows"]:
        low, high = row["interval"]
        theirs = f"{row['published']:.1f}" if "published" in row else ""
        unit = f"{row['rows']:,} tokens" if row["unit"] == "perplexity" else f"{row['rows']}"
        wanted.append([row["task"], row["asked"], unit, f"{row['score']:.1f} [{low:.1f}, {high:.1f}]", theirs])
    assert [plain(row) for row in table(PAGE, "## Published figures")] == wanted


def test_the_table_of_conversations_is_what_the_benchmark_measured():
    file, section = (
        RESULTS / "chat.json",
        PAGE.read_text().partition("### Text of real length")[2].partition("\n## ")[0],
    )
    if not file.is_file():
        assert "has not been run" in section
        return
    wanted = []
    for row in json.loads(file.read_text())["rows"]:
        who = {"generate": "`generate()`"}.get(row["engine"], f"server, {row['adapters']}")
        low, high = row["ratio_interval"]
        ratio = "" if row["engine"] == "generate" else f"{row['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        cells = [f"{row['texts']}, {row['batch']} at once", who.replace("none", "bare").replace("pedro", "PEDRO")]
        cells += [
            f"{row['tok_s']:.1f}",
            ratio,
            f"{row['ttft_ms'] / 1000:.2f}",
            f"{row['tpot_ms']:.0f}",
            row.get("equal", ""),
        ]
        wanted.append(cells)
    assert [plain(row) for row in table(PAGE, "### Text of real length")] == wanted


@pytest.mark.parametrize(
    ("section", "comparison"),
    [("### On stories260K", "nano_table1"), ("### On pedro-nano", "nano_table1_pedro_nano")],
)
def test_the_tables_of_methods_are_the_comparisons(section, comparison):
    committed = scores_of(RESULTS / comparison / "table.md")
    for name, parameters, *cells in table(PAGE, section):
        method, row = name.replace("full", "Full"), [parameters, *cells]
        held = committed[method]
        assert all(any(figure(cell) == figure(other) for other in held) for cell in row), f"{name}: {row} of {held}"


def test_what_holds_where_is_what_the_comparisons_found():
    folders = {
        ("64", "bare"): "nano_table1",
        ("192", "bare"): "nano_table1_pedro_nano",
        ("192", "template"): "nano_rivals_template",
        ("576", "template"): "smollm2_table1",
    }
    shown = set()
    for width, _, prompts, other, *cells in table(PAGE, "### What holds where"):
        shown.add((width, prompts, other))
        held = differences_of(RESULTS / folders[width, prompts] / "table.md")[other]
        for task, cell in zip(("snips", "clinc_domains", "banking77", "sst2"), cells, strict=True):
            if held.get(task, "-") == "-":
                assert cell in {"not measured yet", "–"}
            else:
                assert cell.partition("], ")[0].rstrip("]") == turned(held[task]).rstrip("]"), (
                    f"{width}, {other}, {task}"
                )
    assert len(shown) == 2 * len(folders)


@pytest.mark.parametrize(
    ("name", "section", "columns"),
    [("smollm2_table1", "### On SmolLM2-135M\n", 4), ("smollm2_rte", "### RTE on SmolLM2-135M\n", 2)],
)
def test_the_tables_on_a_language_model_are_what_their_runs_scored_and_forgot(name, section, columns):
    file = RESULTS / name / "table.md"
    rose = dict(re.findall(r"^\| ([^|]+?) \| \+([\d,.]+) \[[^|]*\|$", file.read_text(), re.M))
    forgot = {label: f"{float(change.replace(',', '')):,.0f}" for label, change in rose.items()}
    wanted = [
        [label, *("–" if cell == "-" else figure(cell) for cell in cells[:columns]), forgot.get(label, "–")]
        for label, *cells in table(file)
    ]
    assert table(PAGE, section) == wanted
    runs = [json.loads(line) for line in (RESULTS / name / "runs.jsonl").read_text().splitlines()]
    said = PAGE.read_text().partition(section)[2].partition("\n### ")[0]
    assert re.search(rf"table\.md\), {len(runs)} runs\b", said)


def test_nothing_is_learned_of_rte():
    lines = (RESULTS / "smollm2_rte" / "runs.jsonl").read_text().splitlines()
    runs = [json.loads(line) for line in lines]
    (most,) = {run["scores"][0]["majority"] for run in runs}
    assert max(run["scores"][0]["value"] for run in runs) <= most
    assert f"scores {100 * most:.1f}, no run of {len(runs)}" in PAGE.read_text()
    assert {run["steps"] for run in runs if run["stage"] == "final" and run["lr"]} == {100}
    rates = [run["lr"] for run in runs if run["lr"]]
    assert (min(rates), max(rates)) == (1e-4, 1e-2)


@pytest.mark.parametrize(
    ("name", "section", "column", "budgets"),
    [
        ("smollm2_figure3", "SmolLM2-135M", 0, ("300,000", "600,000", "1,200,000", "2,400,000")),
        ("nano_figure3_template", "pedro-nano", 1, ("14,000", "28,000", "55,000", "110,000")),
    ],
)
def test_what_each_budget_of_parameters_scores_is_what_was_measured(name, section, column, budgets):
    folder, wanted = RESULTS / name, []
    for budget in budgets:
        rows = table(folder / "table.md", f"budget {budget} parameters**")
        wanted.append([budget, *(figure(cells[column]) for _, _, *cells in rows)])
        assert [label for label, *_ in rows] == ["PEDRO", "LoRA", "(IA)³"]
    section = f"### Score against trained parameters on {section}\n"
    assert table(PAGE, section) == wanted
    runs = [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]
    final = [run for run in runs if run["stage"] == "final"]
    cap = json.loads((folder / "comparison.json").read_text())["spec"]["training"]["max_steps"]
    capped = [run for run in final if run["steps"] == cap]
    at_cap = [run for run in capped if run["best_step"] == cap]
    said = " ".join(PAGE.read_text().partition(section)[2].partition("\n### ")[0].split())
    assert f"table.md), {len(runs)} runs)" in said
    if len(capped) == len(final):
        assert f"All {len(final)} runs met the cap of {cap} steps, {len(at_cap)} of them" in said
    else:
        assert f"{len(capped)} of the {len(final)} runs met the cap" in said


def test_the_leaders_of_pefts_comparison_are_what_their_runs_scored_forgot_and_cost():
    file, section = RESULTS / "nano_rivals_template" / "table.md", "### The leaders of PEFT's comparison"
    costs = {name: cells for name, *cells in table(file, "served and forgotten")}
    wanted = []
    for name, parameters, *scores, _ in table(file):
        saved, served, perplexity, _ = costs[name]
        forgot = float(perplexity.split()[0].replace(",", ""))
        speed = served.split()[0].replace("n/a", "–")
        wanted.append([name, parameters, *map(figure, scores), f"{forgot:,.0f}", saved, speed])
    assert table(PAGE, section) == wanted
    runs = (file.parent / "runs.jsonl").read_text().splitlines()
    assert f"table.md), {len(runs)} runs)" in PAGE.read_text().partition(section)[2]


def test_why_pedro_trails_is_what_the_variants_scored_and_forgot():
    names = {"b_up 3 times faster": "`b_up_lr_ratio: 3`", "b_up 10 times faster": "`b_up_lr_ratio: 10`"}
    names |= {"W_down by width": "`init_std: width`"}
    names["W_down by width, b_up 3 times faster"] = "`init_std: width`, `b_up_lr_ratio: 3`"
    file = RESULTS / "smollm2_variants" / "table.md"
    rose = dict(re.findall(r"^\| ([^|]+?) \| \+([\d.]+) \[[^|]*\|$", file.read_text(), re.M))
    wanted = [
        [names.get(name, name), figure(cell), f"{float(rose[name]):.0f}"]
        for name, _, cell in table(file, "clinc_domains")
    ]
    assert [plain(row) for row in table(PAGE, "### Why PEDRO trails")] == wanted


def test_what_conditions_pedro_and_what_that_saves_is_what_was_measured():
    held = table(RESULTS / "smollm2_conditioning" / "table.md")
    scores = {name: [figure(cell).replace("-", "–") for cell in cells[:3]] for name, *cells in held}
    shown = {name: cells for name, *cells in table(PAGE, "### What conditions PEDRO")}
    assert shown == scores
    measured = json.loads((RESULTS / "conditioning.json").read_text())
    wanted = []
    for row in measured["rows"]:
        cells = [f"{row['cold_ms']:.0f}"]
        for name in ("next_turn", "same_system_prompt", "another_adapter"):
            low, high = row[f"{name}_ratio_interval"]
            cells.append(f"{row[f'{name}_ratio']:.2f} [{low:.2f}, {high:.2f}], {row[f'{name}_cached']}")
        wanted.append([row["adapters"], *cells])
    assert [plain(row) for row in table(PAGE, "| adapter | new prompt, ms |")] == wanted


def differences_of(file: Path) -> dict[str, dict[str, str]]:
    """Each method's difference to PEDRO by task."""
    page = prose(file)
    head = page[page.index(": difference to PEDRO") :].split("| method |")[1].splitlines()[0]
    tasks = [cell.strip() for cell in head.split("|")[:-1]]
    return {name: dict(zip(tasks, cells, strict=True)) for name, *cells in table(file, ": difference to PEDRO")}


def turned(cell: str) -> str:
    """The same difference from PEDRO's side."""
    value, low, high = (
        f"{-float(number) + 0.0:+.1f}".replace("-", "−") for number in re.findall(r"[+-]?\d+\.\d", cell)
    )
    return f"{f'**{value}**' if '**' in cell else value} [{high}, {low}]"


def scores_of(file: Path) -> dict[str, list[str]]:
    """The first table of a comparison: a method's cells."""
    return {name: cells for name, *cells in table(file)}


def figure(cell: str) -> str:
    """A cell's number, with its interval; of one that is at chance the number alone, as the page shows it."""
    text = re.sub(r"</?u>|\*|\\|†", "", cell)
    return text if "†" not in cell else text.partition(" [")[0] + " (chance)"


def test_what_failures_cost_is_what_the_benchmarks_measured():
    page, said = " ".join(PAGE.read_text().split()), []
    whole, killed = json.loads((RESULTS / "batch.json").read_text())["rows"]
    said.append(f"killed after {killed['killed_at']:,} of {killed['rows']:,} rows: {killed['once']:,} answered once")
    said.append(f"{killed['as_undisturbed']:,} as in the batch that nobody disturbed")
    said.append(f"in {killed['seconds']:.0f} s in place of {whole['seconds']:.0f} s")
    good, *bad = json.loads((RESULTS / "canary.json").read_text())["rows"]
    low, high = (100 * bound for bound in good["share_interval"])
    said.append(f"{100 * good['share']:.1f} % [{low:.1f}, {high:.1f}] of {good['requests']:,} requests")
    said.append(f"{good['moved']} of the {good['asked_again']:,} users who asked again met another version")
    said += [f"after {one['withdrawn_s']:.0f} s, {one['failed']} failed" for one in bad]
    outage = json.loads((RESULTS / "outage.json").read_text())
    _, away, _ = outage["rows"]
    said.append(f"{away['seconds']:.0f} s under {outage['settings']['streams']} streams")
    said.append(f"{away['answers']:,} answers meanwhile, {away['failed']} failed, {away['wrong']} wrong")
    (missing,) = [one for one in outage["targets"] if "ledger" in one["name"]]
    said.append(f"of {outage['tokens_in_ledger']:,} tokens {missing['value']} were missing from the ledger")
    *rounds, waiting = json.loads((RESULTS / "queue.json").read_text())["rows"]
    undisturbed, killed, paused, drawn = rounds
    for row in (killed, paused):
        assert row["once"] == row["succeeded"]
        said.append(f"{row['succeeded']} of {row['jobs']} succeeded once, {row['as_undisturbed']} with the adapter")
        said.append(f"{row['seconds']:.0f} s in place of {undisturbed['seconds']:.0f} s")
    said.append(f"{drawn['once']} of {drawn['jobs']} succeeded once, {drawn['as_undisturbed']} with the adapter")
    said.append(f"after {drawn['starts']} starts; {drawn['fell_back']} of them fell back")
    said.append(f"{waiting['jobs']} jobs that wait take {waiting['more_mb']:.0f} MB and {waiting['more_processes']}")
    assert [words for words in said if words not in page] == []


def test_what_a_dry_run_promises_is_what_the_benchmark_measured():
    measured = json.loads((RESULTS / "dryrun.json").read_text())
    cells: dict[tuple[str, str], list[str]] = {}
    for row in measured["rows"]:
        cell = f"{row['promised']:,.0f} / {row['measured']:,.0f} ({row['off']:+.0%})"
        cells.setdefault((row["backbone"], row["method"]), []).append(cell)
    assert table(PAGE, "## What a dry run promises") == [[*key, *shown] for key, shown in cells.items()]
    missed = sum(not target["met"] for target in measured["targets"])
    assert (missed, len(measured["targets"])) == (1, 18), "the page says so"


def test_the_page_of_many_replicas_says_what_was_measured_and_simulated():
    from jobs.benchmarks.measured_pages import BLOCK
    from jobs.benchmarks.scaling_page import PAGE, PARTS, results, written

    page = PAGE.read_text()
    assert {name for _, name, _ in BLOCK.findall(page)} == PARTS.keys()
    assert written(page, *results()) == page, "run python -m jobs.benchmarks.scaling_page"


def test_the_page_of_targets_has_every_benchmarks_targets_and_says_why_some_are_not_met():
    from jobs.benchmarks.targets_page import PAGE, abouts, results, written

    held, page = results(), PAGE.read_text()
    assert written(page, held, abouts()) == page, "run python -m jobs.benchmarks.targets_page"
    missed = {name for name, result in held.items() if not all(target["met"] for target in result["targets"])}
    said = page.partition("\n## Not met\n")[2].partition("\n## ")[0]
    explained = {name for line in re.findall(r"^- (.+?): ", said, re.M) for name in re.findall(r"\*\*(.+?)\*\*", line)}
    assert explained == missed


def plain(row: list[str]) -> list[str]:
    return [cell.replace("**", "") for cell in row]


def test_the_table_beside_llama_cpp_is_what_the_benchmark_measured():
    measured = {
        (row["batch"], row["weights"]): row
        for row in json.loads((RESULTS / "weights.json").read_text())["rows"]
        if row["model"] == "SmolLM2"
    }
    kinds = [(f"{bits}{lora}", f"llama.cpp {its}{lora}") for lora in ("", ", LoRA") for bits, its in BITS]
    for cells, (ours, its) in zip(table(PAGE, "### Beside llama.cpp"), kinds, strict=True):
        for batch, cell in zip((1, 8, 32), plain(cells)[1:], strict=True):
            one, other = measured[batch, ours], measured[batch, its]
            low, high = other["ours_decode_ratio_interval"]
            speeds = f"{one['decode_tok_s']:.0f} / {other['decode_tok_s']:.0f}: {other['ours_decode_ratio']:.1f}×"
            assert cell == f"{speeds} [{low:.1f}, {high:.1f}]; {one['ttft_ms']:,.0f} / {other['ttft_ms']:,.0f} ms"
