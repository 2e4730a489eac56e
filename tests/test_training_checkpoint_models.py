"""Checkpoints of a job that trains are versions that can be asked for: the last three and the best, behind no alias."""

from __future__ import annotations

from functools import partial

import pytest
from openai.types.fine_tuning.jobs.fine_tuning_job_checkpoint import Metrics
from retention_home import open_home
from training_runs import LocalReporter, context_for, parameters, same, spec_for

from pedro.adapter_directory import read_manifest
from pedro.errors import AdapterError, NotFoundError
from pedro.evaluation.saved import load_saved
from pedro.store import CHAMPION, checkpoint_of
from pedro.training import checkpoint_models
from pedro.training.checkpoint_models import CheckpointModels
from pedro.training.checkpoint_versions import LAST, publish
from pedro.training.loop import train


class Publishing(LocalReporter):
    """Reports as a worker of a job over HTTP does and publishes as its driver; notes each checkpoint's parameters."""

    def __init__(self, directory, context, models, publish):
        super().__init__(directory, lambda _line: None)
        self._context, self._models, self._publish = context, models, publish
        self.parameters, self.losses, self.best = {}, {}, 0

    def checkpoint(self, engine, group, state, best):
        super().checkpoint(engine, group, state, best)
        self.parameters[state.step] = parameters(self._context)
        self.losses[state.step] = state.validations[-1][1]
        adapter = self.directory / f"adapter-{state.step}"
        if made := self._models.save(state, adapter):
            self._publish(adapter, made)
        self.best = state.best_step


def run(context, reporter):
    return train(context.engine, context.alternation, context.plan, context.data, reporter)


@pytest.fixture
def home(tmp_path):
    settings, registry = open_home(tmp_path / "home")
    yield settings, registry
    registry.store.close()


def test_the_last_checkpoints_and_the_best_are_versions_of_their_steps_and_no_alias_names_them(home, tmp_path):
    _, registry = home
    store, told = registry.store, []
    spec = spec_for(tmp_path, {"name": "lora", "r": 2}, max_steps=7, eval_every=1, lr=0.3, checkpoint_every=1)
    context = context_for(spec, tmp_path)
    job = store.ask_for_job("acme", "colours", spec.to_dict(), key_id="key_1").id
    own = registry.start_run(experiment=spec.name, name=job, params={}, tags={"job": job})
    models = CheckpointModels(context, told.append)
    reporter = Publishing(tmp_path / "run", context, models, partial(publish, registry, spec.ref, job, own))
    run(context, reporter)
    assert told == []
    versions = {checkpoint_of(version.gate).step: version for version in registry.versions("acme.colours")}
    assert set(versions) == {*sorted(reporter.parameters)[-LAST:], reporter.best}
    assert {checkpoint_of(version.gate).job_id for version in versions.values()} == {job}
    assert all(version.aliases == () for version in versions.values())
    with pytest.raises(NotFoundError):
        registry.get("acme.colours", CHAMPION)
    events = store.list_job_events(job, ("checkpoint",), limit=100)
    assert {event.data["step"]: event.data["model"] for event in events} == {
        step: version.ref for step, version in versions.items()
    }
    for event in events:
        assert set(event.data["metrics"]) == set(Metrics.model_fields)
        told = event.data["metrics"]
        assert (told["step"], told["valid_loss"]) == (event.data["step"], reporter.losses[event.data["step"]])
        assert 0 <= told["full_valid_mean_token_accuracy"] == told["valid_mean_token_accuracy"] <= 1
    for step, version in versions.items():
        directory = registry.download(version)
        again = load_saved(directory, read_manifest(directory), context.backbone, "float32", "cpu")
        kept = {name: value for name, value in again.named_parameters() if "lora_" in name}
        assert same(kept, reporter.parameters[step])


def test_a_checkpoint_that_the_engine_would_not_serve_is_told_and_training_goes_on(tmp_path, monkeypatch):
    told, published = [], []
    spec = spec_for(tmp_path, {"name": "lora", "r": 2}, max_steps=2, eval_every=1)
    context = context_for(spec, tmp_path)

    def refuse(directory, backbone):
        raise AdapterError("weights: too wide")

    monkeypatch.setattr(checkpoint_models, "check_servable", refuse)
    models = CheckpointModels(context, told.append)
    outcome = run(context, Publishing(tmp_path / "run", context, models, lambda *made: published.append(made)))
    assert outcome.steps == 2
    assert told == [f"the checkpoint of step {step} was not saved as a model: weights: too wide" for step in (1, 2)]
    assert published == []
