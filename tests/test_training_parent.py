"""A job may go on from a version of its tenant's: it starts with that version's weights, and takes no other's."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
from pydantic import ValidationError
from store_moves import stub_version
from training_runs import LocalReporter, context_for, parameters, same, spec_for

from pedro.errors import AdapterError, ConfigError, NotFoundError
from pedro.store import Store
from pedro.training import worker
from pedro.training.context import build_context
from pedro.training.parent import pin_parent
from pedro.training.spec import FineTuneSpec


@pytest.mark.parametrize("method", ["pedro", "lora"])
def test_training_goes_on_from_the_weights_of_the_parent(tmp_path, method):
    context = context_for(spec_for(tmp_path, method), tmp_path)
    fresh = parameters(context)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda _: None))
    worker.save(context, trained, tmp_path / "parent")
    going_on = build_context(context.spec, tmp_path / "cache", parent=tmp_path / "parent")
    assert same(parameters(going_on), parameters(context))
    assert not same(parameters(going_on), fresh)


def test_a_parent_of_another_shape_is_refused_and_so_is_a_damaged_one(tmp_path):
    context = context_for(spec_for(tmp_path, {"name": "lora", "r": 4}), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda _: None))
    worker.save(context, trained, tmp_path / "parent")
    for method in ({"name": "lora", "r": 2}, "pedro", "full"):
        with pytest.raises(ConfigError, match="parent"):
            build_context(spec_for(tmp_path, method), tmp_path / "cache", parent=tmp_path / "parent")
    weights = tmp_path / "parent" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    with pytest.raises(AdapterError):
        build_context(context.spec, tmp_path / "cache", parent=tmp_path / "parent")


@pytest.fixture
def store(tmp_path):
    """A store with version 1 of acme.colours, a LoRA, as champion, and one of another tenant's."""
    made = Store(f"sqlite:///{tmp_path}/pedro.db")
    for name in ("acme.colours", "globex.faq"):
        version = replace(stub_version(1, name), spec={"method": {"name": "lora", "r": 4}})
        made.add_version(version, None)
        made.promote(name, 1)
    made.add_version(stub_version(2, "acme.colours"), made.get_adapter("acme.colours").made)
    yield made
    made.close()


def spec(**fields) -> FineTuneSpec:
    return FineTuneSpec.model_validate(
        {"tenant": "acme", "adapter": "next", "data": {"train": "train.jsonl"}, **fields}
    )


def test_a_parent_is_pinned_to_a_version_and_gives_its_method(store):
    for named in ("acme.colours", "acme.colours:1", "acme.colours@champion"):
        pinned = pin_parent(spec(parent=named), store)
        assert (pinned.parent, pinned.method.name, pinned.method.options) == ("acme.colours:1", "lora", {"r": 4})
        assert FineTuneSpec.model_validate(pinned.to_dict()) == pinned
    assert pin_parent(spec(parent="acme.colours", method={"name": "lora", "r": 4}), store).parent == "acme.colours:1"
    assert "parent" not in pin_parent(spec(), store).to_dict()


def test_what_the_parents_method_cannot_do_is_refused_when_the_job_is_handed_in(store, monkeypatch):
    quantised = spec(parent="acme.colours", training={"backbone_dtype": "nf4"})
    assert pin_parent(quantised, store).method.name == "lora"
    monkeypatch.setattr(
        store, "get_own_version", lambda *_: SimpleNamespace(ref="acme.e:1", spec={"method": {"name": "ether"}})
    )
    with pytest.raises(ConfigError, match=r"backbone_dtype: nf4: method ether"):
        pin_parent(quantised, store)


def test_preferences_are_learnt_from_a_fresh_adapter():
    with pytest.raises(ValidationError, match="starts from a fresh adapter"):
        spec(parent="acme.colours", objective="dpo")


@pytest.mark.parametrize("method", [{"name": "lora", "r": 8}, {"name": "pedro"}])
def test_a_parent_of_another_method_is_refused(store, method):
    with pytest.raises(ConfigError, match=r"acme\.colours:1 was trained with"):
        pin_parent(spec(parent="acme.colours", method=method), store)


def test_a_version_that_was_not_trained_here_is_no_parent(store):
    with pytest.raises(ConfigError, match="not trained here"):
        pin_parent(spec(parent="acme.colours:2"), store)


def test_a_parent_of_another_tenant_is_refused_like_an_unknown_one(store):
    said = []
    for named in ("globex.faq", "globex.none", "acme.none", "nonsense"):
        with pytest.raises(NotFoundError) as refused:
            pin_parent(spec(parent=named), store)
        said.append(refused.value.message.replace(named, "NAME"))
    assert len(set(said)) == 1
