"""DeepSpeed in every ZeRO stage, alone and as two workers, against plain torch on the same global batches.

Workers are real processes over gloo. One group of processes runs every stage, since starting it costs most.
"""

import os
import socket
from contextlib import closing, suppress
from queue import Empty

import pytest
import torch
import torch.multiprocessing
from training_runs import LocalReporter, context_for, parameters, run, spec_for

from pedro.errors import TrainingError
from pedro.training.spec import FineTuneSpec

STAGES = (0, 1, 2, 3)


def _worker(rank, world, port, folder, specs, queue):
    """One worker of a group: each spec in turn, interrupted once and resumed where the spec's seed is odd."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    from pedro.training.context import build_context, deepspeed_engine
    from pedro.training.worker import evaluate, save
    from pedro.training.worker_group import WorkerGroup

    group, results = WorkerGroup(rank, world), {}
    with pytest.raises(TrainingError, match="the last worker cannot"):  # on every worker, so that none waits for it
        group.together(lambda: _fail_if(rank == world - 1))
    for name, tree, stop_at in specs:
        spec = FineTuneSpec.model_validate(tree)
        if stop_at:
            first = build_context(spec, folder / "cache", deepspeed_engine(spec), group)
            cut = _Cut(folder / name, stop_at)
            with pytest.raises(InterruptedError):
                _train(first, cut)
        context = build_context(spec, folder / "cache", deepspeed_engine(spec), group)
        outcome = run(context, folder / name)
        metrics = evaluate(context, group)
        trained = _Trained(metrics)
        digest = save(context, trained, folder / f"{name}-adapter")
        with context.engine.gathered():
            values = parameters(context)
        results[name] = {
            "loss": outcome.validation_loss,
            "validations": outcome.validations,
            "values": {key: value.tolist() for key, value in values.items()},
            "metrics": metrics,
            "digest": digest,
            "trainable": context.trainable_parameters,
        }
    if rank == 0:
        queue.put(results)
    torch.distributed.barrier()


def _fail_if(failing):
    if failing:
        raise TrainingError("the last worker cannot")


class _Trained:
    def __init__(self, metrics):
        self.metrics = metrics


def _train(context, reporter):
    from pedro.training.loop import train

    return train(context.engine, context.alternation, context.plan, context.data, reporter)


def _group(world, folder, specs):
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    arguments = (world, port, folder, specs, queue)
    workers = [context.Process(target=_worker, args=(rank, *arguments), daemon=True) for rank in range(world)]
    for worker in workers:
        worker.start()
    try:
        results = None
        while results is None:
            with suppress(Empty):
                results = queue.get(timeout=1)
            codes = [worker.exitcode for worker in workers]
            assert results is not None or not any(codes), f"workers ended with exit codes {codes}"
        for worker in workers:
            worker.join(30)
        return results
    finally:
        for worker in workers:
            worker.kill()


def _spec(folder, world, stage, method="pedro", **training):
    resources = {"workers": world, "zero_stage": stage}
    spec = spec_for(folder, method, resources, **{"gradient_accumulation": 2, "clip": 0.5, **training})
    return {**spec.to_dict(), "gate": {"max_rows": 5}}


def _reference(folder, method="pedro", **training):
    context = context_for(spec_for(folder, method, clip=0.5, **training), folder)
    outcome = run(context, folder / f"reference-{method}")
    return outcome, {name: value.tolist() for name, value in parameters(context).items()}


def _largest_difference(one, other):
    return max((torch.tensor(one[name]) - torch.tensor(other[name])).abs().max().item() for name in other)


SOME_AND_ALL = [
    pytest.param(1, (0, 1, 2), id="one worker"),
    pytest.param(1, (3,), id="one worker, ZeRO 3", marks=pytest.mark.slow),
    pytest.param(2, (0, 1, 2, 3), id="two workers, every stage", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("world", "stages"), SOME_AND_ALL)
def test_workers_and_zero_stages_are_invisible_in_the_result(tmp_path, world, stages):
    wanted, values = _reference(tmp_path)
    specs = [(f"zero{stage}", _spec(tmp_path, world, stage), None) for stage in stages]
    results = _group(world, tmp_path, specs)
    first = results["zero0" if 0 in stages else "zero3"]["metrics"]
    for name, result in results.items():
        losses = [loss for _, loss in result["validations"]]
        assert losses == pytest.approx([loss for _, loss in wanted.validations], rel=1e-5), name
        assert _largest_difference(result["values"], values) < 5e-5, name
        assert (result["metrics"]["rows"], result["metrics"]["accuracy"]) == (first["rows"], first["accuracy"]), name
        assert result["trainable"] == 21_320
        assert result["digest"].startswith("sha256:"), name


@pytest.mark.parametrize("stages", [(1,), pytest.param((0, 2, 3), marks=pytest.mark.slow)])
def test_an_interrupted_group_ends_with_the_same_bits(tmp_path, stages):
    specs = []
    for stage in stages:
        tree = _spec(tmp_path, 2, stage, eval_every=2)
        specs += [(f"whole{stage}", tree, None), (f"cut{stage}", tree, 4)]
    results = _group(2, tmp_path, specs)
    for stage in stages:
        whole, cut = results[f"whole{stage}"], results[f"cut{stage}"]
        assert cut["digest"] == whole["digest"], f"ZeRO {stage}"
        assert cut["validations"] == whole["validations"], f"ZeRO {stage}"


class _Cut:
    """A reporter that breaks the run off after the checkpoint of a step."""

    def __init__(self, folder, step):
        self.inner, self.step = LocalReporter(folder, lambda line: None), step

    def __getattr__(self, name):
        return getattr(self.inner, name)

    def checkpoint(self, engine, group, state, best):
        self.inner.checkpoint(engine, group, state, best)
        if state.step == self.step:
            raise InterruptedError


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pedro", "full"])
def test_bf16_runs_in_every_stage_for_adapters_and_for_full_fine_tuning(tmp_path, method):
    changes = {"precision": "bf16", "lr": 1e-3, "max_steps": 2, "eval_every": 2}
    specs = [(f"zero{stage}", _spec(tmp_path, 1, stage, method, **changes), None) for stage in STAGES]
    losses = [result["loss"] for result in _group(1, tmp_path, specs).values()]
    assert losses == pytest.approx([losses[0]] * len(STAGES), rel=2e-2)
