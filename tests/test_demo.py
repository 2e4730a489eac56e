"""The demo as a user runs it, from nothing and once more; and what it makes of bad outcomes."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from pedro.data.demo import DEMO_TENANTS
from pedro.demo import STEPS, _problems, demo_spec


def outcome(**swap):
    row = {"tenant": "acme", "adapter": "voice", "accuracy": 0.8, "majority_accuracy": 0.2}
    return {"tenants": [row], "swap": {"failed": 0, "mixed": 0, "answered_by_new": 5, **swap}}


def test_a_good_outcome_has_no_problems():
    assert _problems(outcome()) == []


@pytest.mark.parametrize("swap", [{"failed": 1}, {"mixed": 1}, {"answered_by_new": 0}])
def test_a_failed_or_mixed_or_unseen_swap_is_a_problem(swap):
    assert len(_problems(outcome(**swap))) == 1


def test_an_adapter_near_the_majority_class_is_a_problem():
    weak = outcome()
    weak["tenants"][0]["accuracy"] = 0.39
    assert "acme.voice is only +0.190 over the majority" in _problems(weak)[0]


def test_every_demo_tenant_has_a_valid_spec_and_packaged_files():
    assert len(STEPS) == len(DEMO_TENANTS)
    for tenant in DEMO_TENANTS:
        spec = demo_spec(tenant, 10)
        assert Path(spec.data.train).is_file()
        assert Path(str(spec.data.test)).is_file()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_demo_reaches_its_marks_from_nothing_and_starts_from_what_is_there():
    with tempfile.TemporaryDirectory(prefix="pedro-", ignore_cleanup_errors=True) as home:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
        env["PEDRO_HOME"] = home
        try:
            first, second = run(env), run(env)
        finally:  # a demo that was cut off leaves its cluster
            subprocess.run([sys.executable, "-m", "pedro.cli", "down", "--yes"], env=env, timeout=120, check=False)
        assert json.loads((Path(home) / "demo" / "result.json").read_text()) == second
    for result in (first, second):
        assert {row["tenant"] for row in result["tenants"]} == {"acme", "globex", "initech"}
        for row in result["tenants"]:
            assert row["test_rows"] >= 200
            assert row["accuracy"] >= row["majority_accuracy"] + 0.20
            assert row["accuracy"] > row["backbone_accuracy"]
        swap = result["swap"]
        assert (swap["failed"], swap["mixed"]) == (0, 0)
        assert swap["in_flight"] > 0
        assert swap["answered_by_old"] > 0
        assert swap["answered_by_new"] > 0
        assert swap["new_accuracy"] > swap["old_accuracy"]
    assert [row["digest"] for row in first["tenants"]] == [row["digest"] for row in second["tenants"]]


def run(env):
    done = subprocess.run(
        [sys.executable, "-m", "pedro.cli", "demo", "--json"], env=env, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(next(line for line in reversed(done.stdout.splitlines()) if line.startswith("{")))
