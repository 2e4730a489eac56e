"""DeepSpeed in every ZeRO stage, alone and as two workers, against plain torch on the same global batches."""

from functools import cache

import pytest
import torch
from training_groups import Training, train_in_group
from training_runs import context_for, dpo_spec_for, parameters, run, spec_for

pytestmark = pytest.mark.slow
STAGES = (0, 1, 2, 3)
TRAINING = {"clip": 0.5, "eval_every": 2}
BF16 = {"precision": "bf16", "lr": 1e-3, "max_steps": 2}
PAIRS = {**TRAINING, "gradient_accumulation": 2, "max_steps": 4}
AGAIN = {"gradient_checkpointing": True, "max_steps": 4}
REPEATED = ("pedro", "lora", "ia3")
SHORT = {"max_steps": 2}
WORLDS = (2, 1)


def _spec(folder, world, stage, method="pedro", **training):
    resources = {"workers": world, "zero_stage": stage}
    spec = spec_for(folder, method, resources, **{"gradient_accumulation": 2, **TRAINING, **training})
    return {**spec.to_dict(), "gate": {"max_rows": 5}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """What a group of so many workers trained in every stage; each group is started once.

    Two workers train once more with an interruption, one worker once more in bf16.
    """

    @cache
    def trained(world):
        folder = tmp_path_factory.mktemp("group")
        trainings = []
        for stage in STAGES:
            tree = _spec(folder, world, stage)
            trainings.append(Training(f"whole{stage}", tree))
            if stage < 3:
                trainings.append(Training(f"nf4 {stage}", _spec(folder, world, stage, backbone_dtype="nf4", **SHORT)))
            if world == 2:
                trainings.append(Training(f"cut{stage}", tree, cut_at=4))
                preferences = dpo_spec_for(folder, resources={"workers": world, "zero_stage": stage}, **PAIRS)
                trainings.append(Training(f"dpo{stage}", preferences.to_dict()))
                packed = _spec(folder, world, stage, gradient_checkpointing=stage == 3)
                trainings.append(Training(f"packed{stage}", packed, packed=True))
                if stage in (0, 3):
                    trainings += [
                        Training(f"{method} again, {stage}", _spec(folder, world, stage, method, **AGAIN))
                        for method in REPEATED
                    ]
            else:
                trainings += [
                    Training(f"{method} in bf16, {stage}", _spec(folder, world, stage, method, **BF16))
                    for method in ("pedro", "full")
                ]
        return train_in_group(world, folder, trainings)

    return trained


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Validations and parameters of plain torch."""
    folder = tmp_path_factory.mktemp("reference")
    context = context_for(spec_for(folder, **TRAINING), folder)
    outcome = run(context, folder / "run")
    return [loss for _, loss in outcome.validations], parameters(context)


@pytest.mark.parametrize("world", WORLDS)
def test_workers_and_zero_stages_are_invisible_in_the_result(trained, reference, world):
    wanted, values = reference
    results = trained(world)
    first = results[f"whole{STAGES[0]}"]["metrics"]
    for stage in STAGES:
        result = results[f"whole{stage}"]
        assert [loss for _, loss in result["validations"]] == pytest.approx(wanted, rel=1e-5), stage
        far = max((torch.tensor(result["values"][name]) - value).abs().max() for name, value in values.items())
        assert far < 5e-5, stage
        assert (result["metrics"]["rows"], result["metrics"]["accuracy"]) == (first["rows"], first["accuracy"]), stage
        assert result["trainable"] == 21_320
        assert result["digest"].startswith("sha256:"), stage


def test_workers_of_which_one_packs_and_one_pads_are_invisible_in_the_result(trained, reference):
    wanted, values = reference
    for stage in STAGES:
        result = trained(2)[f"packed{stage}"]
        assert result["rows"] == {1}, "the first one packed"
        assert [loss for _, loss in result["validations"]] == pytest.approx(wanted, rel=1e-5), stage
        far = max((torch.tensor(result["values"][name]) - value).abs().max() for name, value in values.items())
        assert far < 5e-5, stage


@pytest.mark.parametrize("world", WORLDS)
def test_workers_and_stages_train_over_a_backbone_in_4_bit_as_plain_torch_does(trained, world, tmp_path):
    context = context_for(spec_for(tmp_path, backbone_dtype="nf4", **TRAINING, **SHORT), tmp_path)
    wanted = [loss for _, loss in run(context, tmp_path / "run").validations]
    results = trained(world)
    for stage in STAGES[:3]:
        result = results[f"nf4 {stage}"]
        assert [loss for _, loss in result["validations"]] == pytest.approx(wanted, rel=1e-5), stage


def test_an_interrupted_group_ends_with_the_same_bits(trained):
    results = trained(2)
    for stage in STAGES:
        whole, cut = results[f"whole{stage}"], results[f"cut{stage}"]
        assert cut["digest"] == whole["digest"], f"ZeRO {stage}"
        assert cut["validations"] == whole["validations"], f"ZeRO {stage}"


def test_workers_learn_preferences_as_one_does(trained, tmp_path):
    results = trained(2)
    context = context_for(dpo_spec_for(tmp_path, **{**PAIRS, "gradient_accumulation": 1}), tmp_path)
    outcome = run(context, tmp_path / "run")
    wanted = [loss for _, loss in outcome.validations]
    for stage in STAGES:
        result = results[f"dpo{stage}"]
        assert [loss for _, loss in result["validations"]] == pytest.approx(wanted, rel=1e-4), stage
        values = parameters(context).items()
        assert max((torch.tensor(result["values"][name]) - value).abs().max() for name, value in values) < 1e-4, stage
        assert (result["metrics"]["loss"], result["tokens"]) == (
            pytest.approx(outcome.validation_loss, rel=1e-3), outcome.all_tokens,
        ), stage  # fmt: skip


@pytest.mark.parametrize("method", REPEATED)
def test_blocks_that_are_computed_twice_are_invisible_in_the_result(trained, tmp_path, method):
    results = trained(2)
    context = context_for(
        spec_for(tmp_path, method, **{**TRAINING, **AGAIN, "gradient_checkpointing": False}), tmp_path
    )
    outcome = run(context, tmp_path / "run")
    wanted, values = [loss for _, loss in outcome.validations], parameters(context).items()
    for stage in (0, 3):
        result = results[f"{method} again, {stage}"]
        assert [loss for _, loss in result["validations"]] == pytest.approx(wanted, rel=1e-5), stage
        assert max((torch.tensor(result["values"][name]) - value).abs().max() for name, value in values) < 5e-5, stage


@pytest.mark.parametrize("method", ["pedro", "full"])
def test_bf16_runs_in_every_stage_for_adapters_and_for_full_fine_tuning(trained, method):
    results = trained(1)
    losses = [results[f"{method} in bf16, {stage}"]["loss"] for stage in STAGES]
    assert losses == pytest.approx([losses[0]] * len(STAGES), rel=2e-2)
