"""Jobs whose batches pass no padding: the key that turns it off, and exact resuming."""

import pytest
from training_runs import DiesAfterCheckpoint, Interrupted, context_for, parameters, run, same, spec_for

from pedro.training.loop import train
from pedro.training.spec import FineTuneSpec


def test_an_interrupted_packed_run_ends_with_the_same_bits_and_a_padded_one_nearby(tmp_path, monkeypatch):
    monkeypatch.setattr("pedro.methods.packing.WIDTH", 0)  # so that the packaged backbone packs
    often = {"max_steps": 4, "eval_every": 4, "checkpoint_every": 2}

    def context(packing, **more):
        made = context_for(spec_for(tmp_path, packing=packing, **often, **more), tmp_path)
        embedding = made.model.get_input_embeddings()
        embedding.register_forward_hook(lambda _module, inputs, _output: shapes.add((packing, inputs[0].shape[0] == 1)))
        return made

    shapes = set()
    whole, broken, resumed, padded = (context(packing) for packing in (True, True, True, False))
    repeating = context(True, gradient_checkpointing=True)
    outcome, other = run(whole, tmp_path / "whole"), run(padded, tmp_path / "padded")
    assert shapes == {(True, True), (False, False)}
    with pytest.raises(Interrupted):
        train(broken.engine, broken.alternation, broken.plan, broken.data, DiesAfterCheckpoint(tmp_path / "run", 2))
    assert run(resumed, tmp_path / "run").validations == outcome.validations
    assert same(parameters(resumed), parameters(whole))
    assert run(repeating, tmp_path / "repeating").validations == outcome.validations
    assert same(parameters(repeating), parameters(whole))
    assert outcome.validation_loss == pytest.approx(other.validation_loss, rel=1e-4)
    assert outcome.all_tokens == other.all_tokens


def test_a_spec_says_of_packing_only_that_it_is_off():
    fields = {"tenant": "acme", "adapter": "colours", "data": {"train": "rows.jsonl"}}
    assert "packing" not in FineTuneSpec.model_validate(fields).to_dict()["training"]
    off = FineTuneSpec.model_validate({**fields, "training": {"packing": False}})
    assert FineTuneSpec.model_validate(off.to_dict()) == off
    assert off.to_dict()["training"]["packing"] is False
