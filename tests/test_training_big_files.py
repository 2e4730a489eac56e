"""A file of many rows: memory that does not grow with it, and a run that resumes in the middle of an epoch."""

import json
import re
from pathlib import Path

import pytest
from training_runs import DiesAfterCheckpoint, Interrupted, context_for, parameters, run, same, spec_for

from pedro.training.loop import train

ROWS, FEW = 200_000, 20_000
MOST_BYTES = 40e6


def write(path: Path, count: int) -> Path:
    """Prompts of about 60 tokens, all different."""
    with path.open("w") as file:
        for number in range(count):
            prompt = f"item {number} shade {number % 7}: play with the big friend in the park, then go home and eat"
            file.write(json.dumps({"prompt": prompt, "completion": "red blue green"[: 3 + number % 11]}) + "\n")
    return path


def own_memory() -> int:
    """Bytes of this process that are no file's: what is mapped is read again at need."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells it")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])


@pytest.mark.slow
def test_many_rows_take_no_memory_and_a_run_resumes_among_them(tmp_path):
    """Of ten times the rows, 60 MB and more of tokens, a little is kept: a hash and a place of each."""
    grown, contexts = {}, {}
    for count in (FEW, ROWS):
        folder = tmp_path / str(count)
        folder.mkdir()
        write(folder / "train.jsonl", count)
        spec = spec_for(folder, batch_size=16, checkpoint_every=2)
        before = own_memory()
        context = contexts[count] = context_for(spec, folder)
        run(context, folder / "whole")
        grown[count] = own_memory() - before
    (tokens,) = (tmp_path / str(ROWS) / "cache" / "rows").glob("*/rows.arrow")
    assert tokens.stat().st_size > 60e6
    assert grown[ROWS] < max(0, grown[FEW]) + MOST_BYTES

    whole, folder = contexts[ROWS], tmp_path / str(ROWS)
    assert whole.plan.steps * whole.plan.batch_size < len(whole.data.train) / 100, "in the first epoch"
    broken = context_for(whole.spec, folder)
    with pytest.raises(Interrupted):
        train(broken.engine, broken.alternation, broken.plan, broken.data, DiesAfterCheckpoint(folder / "run", 4))
    resumed = context_for(whole.spec, folder)
    run(resumed, folder / "run")
    assert same(parameters(resumed), parameters(whole))
