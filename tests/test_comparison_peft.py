"""Results of PEFT's method_comparison: theirs beside ours, marked as theirs, and ours in their form."""

import copy
import json
from pathlib import Path

import pytest
from comparisons import result, rows_of, write_comparison
from typer.testing import CliRunner

from pedro.cli import app
from pedro.comparison.imported import ImportedRun
from pedro.comparison.peft_results import export_results, import_results
from pedro.comparison.report import as_markdown, make_report, print_report, summarize
from pedro.comparison.result_model import RunResult
from pedro.comparison.run_files import IMPORTED, read_comparison
from pedro.comparison.tables import select
from pedro.errors import ConfigError, DataError

# what a file of theirs holds, most of its metrics and of its configs left out
THEIRS = {
    "run_info": {
        "created_at": "2026-05-27T17:25:11+00:00",
        "total_time": 1531.9,
        "experiment_name": "hira/llama-3.2-3B-rank32-lr4.5e-3",
        "peft_branch": "main",
        "train_config": {
            "model_id": "meta-llama/Llama-3.2-3B",
            "max_steps": 5000,
            "seed": 0,
            "optimizer_kwargs": {"lr": 0.0045, "weight_decay": 0.0},
        },
        "peft_config": {"task_type": "CAUSAL_LM", "peft_type": "HIRA", "r": 32},
        "error_msg": "",
    },
    "train_info": {
        "accelerator_memory_reserved_avg": 15904586439,
        "accelerator_memory_max": 23599251456,
        "accelerator_memory_reserved_99th": 21544042496,
        "train_time": 1301.0097959969953,
        "file_size": 36714432,
        "num_trainable_params": 9175040,
        "num_total_params": 3221924864,
        "status": "success",
        "metrics": [
            {"step": 250, "valid accuracy": 0.34, "train loss": 0.96},
            {"step": 5000, "test accuracy": 0.5072024260803639, "train loss": 0.56, "forgetting": 0.4813060760498047},
        ],
    },
    "meta_info": {
        "model_info": {"sha": "13afe51", "created_at": "2024-09-18T15:23:48+00:00"},
        "dataset_info": {"metamath": {"sha": "aa4f34d"}, "gsm8k": {"sha": "740312a"}},
        "package_info": {"peft-version": "0.19.2.dev0"},
        "system_info": {"accelerator": "NVIDIA L40S"},
        "pytorch_info": "",
    },
}
PROCESSED = {  # what their processing.py reads of a file
    "run_info": ("created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config"),
    "train_info": (
        *("accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th"),
        *("train_time", "file_size", "status", "metrics"),
    ),
    "meta_info": ("package_info", "system_info"),
}
VERSIONS = ("peft-version", "transformers-version", "datasets-version", "torch-version", "bitsandbytes-version")


def changed(path: tuple[str, ...], value: object) -> dict:
    """Their file with another value at a place."""
    values = copy.deepcopy(THEIRS)
    inner = values
    for name in path[:-1]:
        inner = inner[name]
    inner[path[-1]] = value
    return values


@pytest.fixture
def folder(tmp_path) -> Path:
    """A comparison of two methods that exist."""
    runs = [
        result(
            label,
            "snips",
            seed,
            rows_of("snips", seed, 1.0, 20),
            method=method,
            options={"r": 2},
            samples=600,
            all_tokens=9000,
            saved_bytes=4321,
            forgetting={"loss_before": 2.0, "loss": 2.5, "tokens": 64},
        )
        for label, method in (("PEDRO", "pedro"), ("LoRA (r=2)", "lora"))
        for seed in (0, 1)
    ]
    return write_comparison(tmp_path / "made", runs)


def saved(path: Path, values: object) -> Path:
    path.write_text(json.dumps(values))
    return path


def test_their_results_stand_beside_ours_as_theirs(folder, tmp_path):
    before = print_report(make_report(read_comparison(folder)))
    assert import_results(read_comparison(folder), [saved(tmp_path / "hira.json", THEIRS)]) == 1
    report = make_report(read_comparison(folder))
    text = print_report(report)
    assert text.startswith(before), "nothing of ours changes"
    added = " ".join(text.removeprefix(before).split())
    assert "As PEFT's method_comparison reports them: other data, hyperparameters and seeds, no intervals" in added
    assert "hira/llama-3.2-3B-rank32-lr4.5e-3 (HIRA; meta-llama/Llama-3.2-3B; metamath, gsm8k; seed 0)" in added
    assert "9,175,040 0.0045 5,000 50.7 +0.481 1,301 36,714.4 22,506" in added
    assert "hira/llama" in as_markdown(report)
    assert summarize(report)["imported"][0]["accuracy"] == 0.5072024260803639


def test_files_of_their_earlier_form_are_read_too(folder):
    values = changed(("run_info", "peft_config"), None)
    for name in ("reserved_avg", "max", "reserved_99th"):
        train = values["train_info"]
        train[f"cuda_memory_{name}"] = train.pop(f"accelerator_memory_{name}")
    del values["train_info"]["metrics"][-1]["forgetting"]
    run = ImportedRun.from_peft(values)
    assert (run.peft_type, run.memory, run.forgetting) == ("full-finetuning", 23599251456, None)


def test_a_newer_result_of_an_experiment_takes_the_place_of_the_older(folder, tmp_path):
    newer = changed(("train_info", "file_size"), 5)
    newer["run_info"]["created_at"] = "2027-01-01T00:00:00+00:00"
    other = changed(("run_info", "experiment_name"), "lora/other")
    place = tmp_path / "results"
    place.mkdir()
    for number, values in enumerate((newer, THEIRS, other)):
        saved(place / f"{number}.json", values)
    assert import_results(read_comparison(folder), [place]) == 3
    import_results(read_comparison(folder), [saved(tmp_path / "again.json", THEIRS)])
    kept = read_comparison(folder).imported
    assert [(run.experiment, run.file_size) for run in kept] == [
        ("hira/llama-3.2-3B-rank32-lr4.5e-3", 5),
        ("lora/other", 36714432),
    ]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([], "run_info: expected an object"),
        (changed(("train_info", "status"), "canceled"), "expected 'success', got 'canceled'"),
        (changed(("train_info", "metrics"), []), "train_info.metrics: expected a list"),
        (
            changed(("train_info", "num_trainable_params"), "many"),
            "num_trainable_params: expected a number, got 'many'",
        ),
        (changed(("run_info", "experiment_name"), "a\nb"), "experiment_name: expected a line of text"),
        (changed(("run_info", "train_config"), None), "run_info.train_config: expected an object"),
        (changed(("run_info", "peft_config"), "LORA"), "run_info.peft_config: expected an object"),
    ],
)
def test_a_file_that_is_none_of_theirs_is_named_and_nothing_is_kept(folder, tmp_path, values, said):
    good, bad = saved(tmp_path / "good.json", THEIRS), saved(tmp_path / "bad.json", values)
    with pytest.raises(DataError, match=said) as error:
        import_results(read_comparison(folder), [good, bad, tmp_path / "none.json"])
    assert "bad.json" in error.value.message
    assert "none.json: No such file" in error.value.message
    assert not (folder / IMPORTED).exists()


def test_results_are_imported_beside_a_comparison_alone_and_a_broken_list_is_a_problem(folder, tmp_path):
    theirs = saved(tmp_path / "hira.json", THEIRS)
    with pytest.raises(ConfigError, match="holds no comparison yet"):
        import_results(read_comparison(tmp_path / "empty"), [theirs])
    (folder / IMPORTED).write_text("[{}]")
    found = read_comparison(folder)
    assert not found.imported
    assert "imported.json: experiment" in found.problems[0]
    assert len(found.runs) == 4


def test_ours_are_written_as_their_programs_read_them_and_read_back(folder, tmp_path):
    files = export_results(select(read_comparison(folder)), tmp_path / "peft")
    assert sorted(path.name for path in files) == [
        *(f"lora--stories260K-LoRA_r=2-snips-seed{seed}.json" for seed in (0, 1)),
        *(f"pedro--stories260K-PEDRO-snips-seed{seed}.json" for seed in (0, 1)),
    ]
    runs = {(run.method, run.seed): run for run in read_comparison(folder).runs}
    for path in files:
        values = json.loads(path.read_text())
        for part, names in PROCESSED.items():
            assert set(names) <= set(values[part])
        assert all(name in values["meta_info"]["package_info"] for name in VERSIONS)
        last = values["train_info"]["metrics"][-1]
        assert {"test accuracy", "train loss", "train samples", "train total tokens"} <= set(last)
        assert last["forgetting"] == 0.5
        assert values["train_info"]["num_total_params"] > 260_032
        back = ImportedRun.from_peft(values)
        run: RunResult = runs[path.name.partition("--")[0], back.seed]
        assert back.peft_type == run.method.upper()
        assert (back.accuracy, back.lr, back.file_size) == (run.scores[0].value, run.lr, 4321)
        assert (back.parameters, back.steps) == (run.trainable_parameters, run.steps)
    config = json.loads((tmp_path / "peft" / files[-1].name).read_text())["run_info"]["peft_config"]
    assert config["r"] == 2
    assert config["base_model_name_or_path"] == "stories260K"


def test_pedro_compare_exports_and_imports_and_starts_nothing(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    spec = tmp_path / "made.yaml"
    spec.write_text("name: made\ntasks: [snips]\nmethods: [pedro, lora]\n")
    words = ["compare", str(spec), "--out", str(folder), "--export-peft", str(tmp_path / "peft")]
    done = CliRunner().invoke(app, [*words, "--import-peft", str(saved(tmp_path / "hira.json", THEIRS))])
    assert done.exit_code == 0, done.output
    assert "4 results written" in done.output
    assert "hira/llama-3.2-3B" in done.output
    assert len(list((tmp_path / "peft").glob("*.json"))) == 4
    again = CliRunner().invoke(
        app, ["compare", str(spec), "--out", str(folder), "--import-peft", str(tmp_path / "peft")]
    )
    assert again.exit_code == 0, again.output
    assert len(read_comparison(folder).imported) == 5
