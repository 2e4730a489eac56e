"""`make gpu-check`, all of it, in small and on the CPU; and that an abort of a part loses nothing."""

import json
import sys

import pytest

from jobs.gpu_check import __main__ as gpu_check
from jobs.gpu_check.training import TINY, check_method
from pedro.methods import METHODS


@pytest.fixture
def check(tmp_path, monkeypatch):
    """Runs the command; gives its exit code and its result file."""
    monkeypatch.setenv("PEDRO_HOME", str(tmp_path / "home"))
    out = tmp_path / "result.json"

    def run(*words: str) -> tuple[int, dict]:
        code = gpu_check.main(["--device", "cpu", "--model", "tiny", "--out", str(out), *words])
        return code, json.loads(out.read_text())

    return run


@pytest.mark.slow
def test_all_parts_run_in_small_on_the_cpu(check):
    code, result = check("--limit", "1500")
    assert {name: part["status"] for name, part in result["parts"].items()} == dict.fromkeys(
        gpu_check.LIMITS_S, "passed"
    )
    assert code == 0
    assert result["commit"] is not None or result["versions"]["torch"]
    findings = {name: part["findings"] for name, part in result["parts"].items()}
    assert len(findings["correctness"]) >= 14
    assert {row["method"] for row in findings["training"]} == set(METHODS)
    lines = {(row["adapters"], row["batch"], row["beams"]) for row in findings["table3"][1:]}
    assert {(kind, batch, beams) for kind in ("pedro", "ia3", "lora") for batch in (1, 4) for beams in (1, 3)} <= lines
    assert [row["gradient_checkpointing"] for row in findings["bilevel"]] == [True, False]


def test_a_part_that_hangs_or_breaks_leaves_its_findings_and_the_others_run(check, monkeypatch):
    parts = {
        "hangs": "",
        "breaks": "print('{\"ok\": true}', flush=True); raise SystemExit('no such card')",
        "wrong": "print('{\"ok\": true}'); print('{\"ok\": false}')",
        "right": "print('words in between'); print('{\"ok\": true}')",
    }
    monkeypatch.setattr(gpu_check, "LIMITS_S", {**dict.fromkeys(parts, 600), "hangs": 3})
    hangs = ["sh", "-c", "echo '{\"ok\": true}'; exec sleep 600"]  # says what it does at once, as Python would not
    monkeypatch.setattr(
        gpu_check,
        "command",
        lambda name, _options: hangs if name == "hangs" else [sys.executable, "-S", "-c", parts[name]],
    )
    code, result = check()
    assert code == 1
    assert {name: (part["status"], len(part["findings"])) for name, part in result["parts"].items()} == {
        "hangs": ("stopped after 3 s", 1),
        "breaks": ("broke with exit code 1", 1),
        "wrong": ("1 findings are wrong", 2),
        "right": ("passed", 1),
    }
    assert result["parts"]["breaks"]["last_lines"] == ["no such card"]


@pytest.mark.parametrize("name", ["pedro", "learned-adapter", "ssp"])
def test_a_bi_level_step_moves_only_its_own_group(name):
    finding = check_method(METHODS[name], TINY, "cpu", steps=20)
    assert finding["ok"]
    assert finding["moves_only_its_own"]
