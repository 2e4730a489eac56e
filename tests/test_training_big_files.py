"""Many rows: memory that does not grow with their tokens, and a run that resumes in the middle of an epoch."""

import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from datasets import Dataset
from datasets.arrow_writer import ArrowWriter
from training_runs import DiesAfterCheckpoint, Interrupted, context_for, parameters, run, same, spec_for

from pedro.data.dataset import _features
from pedro.training.loop import train

FEW, MANY, TOKENS = 1_000, 100_000, 400
MOST_BYTES = 60e6  # some 230 a row were measured, most of them for a moment


def rows_on_disk(path: Path, count: int) -> Path:
    """Random rows as `load_rows` writes them, without the minutes that a tokenizer takes."""
    random = np.random.default_rng(0)
    ids = pa.array(random.integers(3, 400, count * TOKENS, dtype=np.int32))
    columns = {
        "input_ids": pa.ListArray.from_arrays(pa.array(np.arange(count + 1, dtype=np.int32) * TOKENS), ids),
        "prompt_len": pa.array(np.full(count, TOKENS - 4, dtype=np.int32)),
        "split_hash": pa.array(random.random(count)),
        "completion": pa.array(["red"] * count),
        "line": pa.array(np.arange(1, count + 1)),
    }
    with ArrowWriter(path=str(path), features=_features(False)) as writer:
        writer.write_table(pa.table(columns), writer_batch_size=1000)
        writer.finalize()
    return path


def own_memory() -> int:
    """Bytes of this process that are no file's: what is mapped is read again at need."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells it")
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status.read_text())[1])


@pytest.mark.slow
def test_many_rows_take_little_memory_and_a_run_resumes_among_them(tmp_path, monkeypatch):
    """Of 160 MB of tokens none are kept, only a hash and a few places of each row."""
    files = {count: rows_on_disk(tmp_path / f"{count}.arrow", count) for count in (FEW, MANY)}
    assert files[MANY].stat().st_size > 2 * MOST_BYTES
    spec = spec_for(tmp_path, max_steps=4, eval_every=4, checkpoint_every=2, eval_rows=16)

    def context(count):
        monkeypatch.setattr("pedro.training.prepare.load_rows", lambda *_: Dataset.from_file(str(files[count])))
        return context_for(spec, tmp_path)

    run(context(FEW), tmp_path / "few")  # what is made once is there by then
    before = own_memory()
    whole = context(MANY)
    run(whole, tmp_path / "whole")
    assert own_memory() - before < MOST_BYTES

    assert whole.plan.steps * whole.plan.batch_size < len(whole.data.train) / 1000, "in the first epoch"
    broken, resumed = context(MANY), context(MANY)
    with pytest.raises(Interrupted):
        train(broken.engine, broken.alternation, broken.plan, broken.data, DiesAfterCheckpoint(tmp_path / "run", 2))
    run(resumed, tmp_path / "run")
    assert same(parameters(resumed), parameters(whole))
