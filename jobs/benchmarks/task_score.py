"""An adapter that has learned a task, and how many of its answers are right, whatever the backbone's weights are.

The adapter is PEDRO's, trained on float32 weights on the packaged commands (SNIPS, seven intents). An answer is right
if its tokens are the intent's, the end with them.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.bench_engine import BenchEngine, take
from jobs.benchmarks.model_sizes import MODEL_SIZES, bench_folder
from jobs.benchmarks.timeline import Timeline
from jobs.benchmarks.training import Load, setup_of
from pedro.backbone import load_model, load_tokenizer, resolve_backbone

if TYPE_CHECKING:
    from pedro.training.context import TrainingContext
    from pedro.training.spec import FineTuneSpec

ROWS = 300  # that are asked
LOADS = {"pedro-nano": Load(16, 400, 1, ROWS)}
LARGE = Load(8, 60, 1, ROWS)
LR = 1e-2
AT_ONCE = 8


def right_answers(name: str, kind: str, threads: int, most: int | None = None) -> list[bool]:
    """Of each row whether the adapter's answer is right on the backbone `name` with `kind` of weights.

    Raises BackboneError for a backbone that is not here.
    """
    backbone = resolve_backbone(name)
    adapter = str(_trained(name))
    rows = _rows(name)[:most]
    longest = max(len(row["input_ids"]) for row in rows) + 1
    setup: dict[str, Any] = {"max_batch": AT_ONCE, "max_length": longest, "threads": threads, "weights": kind}
    engine = BenchEngine(MODEL_SIZES["tiny"], model=load_model(backbone), digest=backbone.digest, **setup)
    engine.load([adapter])
    end = load_tokenizer(backbone).eos_token_id
    wanted, answers = {}, dict[str, list[int]]()
    for row in rows:
        prompt, answer = row["input_ids"][: row["prompt_len"]], row["input_ids"][row["prompt_len"] :]
        request = engine.request(prompt, adapter, len(answer))
        engine.engine.add(request)
        wanted[request.id], answers[request.id] = answer, []
    timeline = Timeline()
    while engine.engine.has_work():
        outputs = engine.engine.step()
        take(outputs, timeline)
        for output in outputs:
            answers[output.request_id] += output.token_ids
    engine.close()
    assert all(answer[-1] == end for answer in wanted.values()), "an answer's end is one of its tokens"
    return [answers[asked] == answer for asked, answer in wanted.items()]


def _trained(name: str) -> Path:
    """The adapter's directory; trained once."""
    from jobs.benchmarks.workers.train import LocalCheckpoints
    from pedro.training.loop import train
    from pedro.training.worker import save_model

    directory = bench_folder() / "training" / name / "commands"
    if not (directory / "pedro_adapter.json").is_file():
        directory.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(dir=directory.parent))
        context = _context(name, folder / "cache")
        train(context.engine, context.alternation, context.plan, context.data, LocalCheckpoints(folder))
        save_model(context, {}, folder / "adapter")
        (folder / "adapter").rename(directory)
        shutil.rmtree(folder)
    return directory


def _rows(name: str) -> list[dict[str, Any]]:
    """The validation rows as the trainer encodes them."""
    from pedro.training.prepare import prepare_data

    spec, backbone = _spec(name), resolve_backbone(name)
    with tempfile.TemporaryDirectory() as folder:
        rows = prepare_data(spec, backbone, load_tokenizer(backbone), Path(folder)).splits(False)[2]
        return [] if rows is None else list(rows)


def _context(name: str, cache: Path) -> TrainingContext:
    from pedro.training.context import build_context

    return build_context(_spec(name), cache)


def _spec(name: str) -> FineTuneSpec:
    from jobs.benchmarks.workers.train import spec_of

    load = LOADS.get(name, LARGE)
    spec = spec_of({**setup_of(name, load), "batch": load.batch, "steps": load.steps}, "pedro")
    fields = spec.to_dict()
    steps = {"max_steps": load.steps, "eval_every": load.steps, "eval_rows": load.batch, "lr": LR, "theta_every": 10}
    return spec.model_validate({**fields, "training": {**fields["training"], **steps}})
