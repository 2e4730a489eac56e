"""Jobs that train together in one worker: each adapter as alone, and one that fails fails alone."""

from __future__ import annotations

import math

import pytest
import torch
from training_runs import (
    DiesAfterCheckpoint,
    Interrupted,
    LocalReporter,
    context_for,
    parameters,
    run,
    spec_for,
    write_rows,
)

from pedro.backbone import load_model, resolve_backbone
from pedro.errors import ConfigError, TrainingError
from pedro.training.cotraining.coordinator import PassCoordinator, Stopped
from pedro.training.cotraining.engine import SharedBackbone
from pedro.training.cotraining.stacked_model import check_repeatable, tied_copy
from pedro.training.loop import train
from pedro.training.spec import FineTuneSpec

METHODS = {
    "pedro": {"name": "pedro", "r": 4},
    "mean": {"name": "pedro-1", "r": 4, "apply_to": "answer", "tail": 2},
    "lora": {"name": "lora", "r": 2},
    "ia3": {"name": "ia3"},
    "codes": {"name": "ia3", "r": 3},
    "red": {"name": "red"},
}
CLOSE = 1e-5


def shared(folder, number, method="pedro", **training):
    """The spec of one of several tenants, with rows, a seed and a rate of its own."""
    own = folder / f"tenant{number}"
    own.mkdir(exist_ok=True)
    if not (own / "train.jsonl").exists():
        write_rows(own / "train.jsonl", 40, start=100 * number)
    settings = {"max_steps": 4, "eval_every": 2, "seed": number, "lr": 10 ** -(3 + number / 4), **training}
    method = METHODS.get(method, method) if isinstance(method, str) else method
    spec = spec_for(own, method, {"share": True}, **settings)
    return spec.model_copy(update={"tenant": f"tenant{number}"})


def together(specs, folder, begin=lambda _context, _participant: None, reporter=None, passes=None):
    """Train the specs at one coordinator; the participants, and each one's (outcome, parameters), by its number. The
    shapes of the batches that they learn from go to `passes`."""
    torch.set_num_threads(1)
    backbone, ends = SharedBackbone(specs[0]), {}
    embedding = backbone.stacked_model._model.get_input_embeddings()

    def note(_module, inputs, _output):
        if passes is not None and torch.is_grad_enabled():
            passes.append(inputs[0].shape)

    embedding.register_forward_hook(note)

    def work(number, spec):
        def at(participant):
            context = backbone.context(spec, folder / "cache", participant)
            begin(context, participant)
            if reporter is None:
                outcome = run(context, folder / f"run{number}")
            else:
                outcome = train(
                    context.engine, context.alternation, context.plan, context.data, reporter(number, participant)
                )
            ends[number] = outcome, parameters(context)

        return at

    coordinator = PassCoordinator(backbone.stacked_model, [work(number, spec) for number, spec in enumerate(specs)])
    coordinator.run()
    return coordinator.participants, ends


def alone(spec, folder):
    context = context_for(spec, folder)
    return run(context, folder / f"alone-{spec.tenant}"), parameters(context)


def assert_close(mine, lone, close=CLOSE):
    (outcome, values), (other, others) = mine, lone
    assert (outcome.steps, outcome.best_step, outcome.tokens, outcome.all_tokens, outcome.samples) == (
        other.steps,
        other.best_step,
        other.tokens,
        other.all_tokens,
        other.samples,
    )
    assert outcome.validation_loss == pytest.approx(other.validation_loss, abs=close)
    for name, value in others.items():
        assert (values[name] - value).abs().max() <= close, name


@pytest.mark.parametrize("method", METHODS)
def test_each_adapter_is_that_of_its_lone_run(tmp_path, method):
    even, passes = [shared(tmp_path, number, method) for number in range(3)], []
    _, ends = together(even, tmp_path, passes=passes)
    assert {rows for rows, _ in passes} == {1}, "a narrow backbone, too, gets no padding from a group"
    for number, spec in enumerate(even):
        assert_close(ends[number], alone(spec, tmp_path))


@pytest.mark.parametrize("method", ["pedro", "lora", "ia3"])
def test_each_adapter_is_that_of_a_group_whose_rows_are_padded(tmp_path, method):
    changes, passes, padded = {"max_steps": 2, "eval_every": 2}, [], []
    specs = [shared(tmp_path, number, method, batch_size=3 + number, **changes) for number in range(3)]
    _, ends = together(specs, tmp_path, passes=passes)
    specs = [shared(tmp_path, number, method, batch_size=3 + number, packing=False, **changes) for number in range(3)]
    _, slow = together(specs, tmp_path / "padded", passes=padded)
    assert all(rows == 1 for rows, _ in passes)
    assert all(rows == 3 + 4 + 5 for rows, _ in padded)
    for number, end in slow.items():
        assert_close(ends[number], end)
    tokens = sum(end[0].all_tokens for end in ends.values())
    passed = sum(length for _, length in passes)
    assert passed == tokens if method == "pedro" else passed < tokens, "what a job's rows begin with passes once"


def test_each_adapter_is_that_of_its_lone_run_over_a_backbone_in_4_bit(tmp_path):
    specs = [shared(tmp_path, number, max_steps=2, backbone_dtype="nf4") for number in range(2)]
    _, ends = together(specs, tmp_path)
    for number, spec in enumerate(specs):
        assert_close(ends[number], alone(spec, tmp_path))


@pytest.mark.parametrize("method", ["pedro", "lora", "ia3"])
def test_jobs_may_differ_in_all_that_is_not_backbone_or_method(tmp_path, method):
    """Batches of other sizes, slices, other steps, one level and two, more or fewer validations."""
    uneven = [
        shared(tmp_path, 0, method, batch_size=3, max_steps=3, eval_every=1),
        shared(tmp_path, 1, method, batch_size=8, gradient_accumulation=3, bilevel=False),
        shared(tmp_path, 2, method, batch_size=5, theta_every=2, weight_decay=0.1, clip=0.1, max_steps=5),
    ]
    _, ends = together(uneven, tmp_path)
    for number, spec in enumerate(uneven):
        assert_close(ends[number], alone(spec, tmp_path))


def test_jobs_with_rows_of_equal_lengths_are_told_apart_to_the_bit(tmp_path):
    """Two jobs with the same spec end with the same bits, wherever they sit: nothing of one reaches another."""
    specs = [shared(tmp_path, 1), shared(tmp_path, 2), shared(tmp_path, 1)]
    _, ends = together(specs, tmp_path)
    for name, value in ends[0][1].items():
        assert (value - ends[2][1][name]).abs().max() <= 1e-6, name
    assert any((value - ends[1][1][name]).abs().max() > 1e-3 for name, value in ends[0][1].items())


@pytest.mark.parametrize("method", ["pedro", "lora", "ia3"])
def test_one_whose_numbers_are_lost_fails_alone(tmp_path, method):
    specs = [shared(tmp_path, number, method, max_steps=3) for number in range(3)]

    def spoil(context, participant):
        if participant.number == 1:
            for _, parameter in context.engine.parameters:
                parameter.data.fill_(math.nan)

    participants, ends = together(specs, tmp_path, spoil)
    assert isinstance(participants[1].error, TrainingError)
    assert "the loss is nan" in str(participants[1].error)
    assert participants[0].error is None
    assert participants[2].error is None
    for number in (0, 2):
        assert_close(ends[number], alone(specs[number], tmp_path))


def test_rows_that_break_a_pass_end_their_own_job_only(tmp_path):
    specs = [shared(tmp_path, number, max_steps=2) for number in range(2)]

    def spoil(context, participant):
        if participant.number == 0:
            forward = context.engine.forward
            context.engine.forward = lambda positions, **batch: forward(
                positions, **{**batch, "input_ids": batch["input_ids"] + 10**6}
            )

    participants, ends = together(specs, tmp_path, spoil)
    assert isinstance(participants[0].error, IndexError)
    assert_close(ends[1], alone(specs[1], tmp_path))


class Counting(LocalReporter):
    """Does something when its job's first metrics come."""

    def __init__(self, folder, act):
        super().__init__(folder, log=lambda line: None)
        self.act = act

    def metrics(self, step, values):
        self.act()


def test_one_that_is_stopped_or_waits_elsewhere_holds_nobody_up(tmp_path):
    specs = [shared(tmp_path, number, max_steps=3, eval_every=1) for number in range(3)]
    order = []

    def reporter(number, participant):
        def wait():
            with participant.away():
                order.append(number)

        acts = {0: participant.stop, 1: wait, 2: lambda: order.append(number)}
        return Counting(tmp_path / f"run{number}", acts[number])

    participants, ends = together(specs, tmp_path, reporter=reporter)
    assert isinstance(participants[0].error, Stopped)
    assert set(ends) == {1, 2}
    assert order.count(1) == order.count(2)
    for number in (1, 2):
        assert_close(ends[number], alone(specs[number], tmp_path))


def test_a_job_that_was_cut_off_goes_on_from_its_own_checkpoint_in_another_group(tmp_path):
    specs = [shared(tmp_path, number, max_steps=4, eval_every=2) for number in range(2)]

    def cut(number, _participant):
        folder = tmp_path / f"run{number}"
        return DiesAfterCheckpoint(folder, 2) if number == 0 else LocalReporter(folder, log=lambda line: None)

    participants, ends = together(specs, tmp_path, reporter=cut)
    assert isinstance(participants[0].error, Interrupted)
    assert set(ends) == {1}
    _, again = together(specs[:1], tmp_path)
    for number, end in ((0, again[0]), (1, ends[1])):
        assert_close(end, alone(specs[number], tmp_path))


def test_a_job_is_charged_for_its_share_of_the_worker(tmp_path):
    specs = [shared(tmp_path, number, max_steps=2, eval_every=0) for number in range(2)]
    participants, ends = together(specs, tmp_path)
    for participant in participants:
        assert 0 < ends[participant.number][0].seconds <= participant.seconds


def test_a_twin_shares_weights_and_nothing_else():
    model = load_model(resolve_backbone("stories260K"))
    other = tied_copy(model)
    mine, theirs = dict(model.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(mine[name].data_ptr() == theirs[name].data_ptr() for name in mine)
    other.get_input_embeddings().weight.data = torch.empty(0)
    assert model.get_input_embeddings().weight.numel()


def test_what_cannot_be_shared_is_said_with_the_spec(tmp_path):
    for changes, said in [
        ({"resources": {"share": True, "workers": 2}}, "jobs share one worker, not 2"),
        ({"resources": {"share": True, "zero_stage": 1}}, "zero_stage 1 shards"),
        ({"method": {"name": "adalora"}}, "method adalora cannot share"),
        ({"method": {"name": "lora", "dropout": 0.1}}, "method.dropout would draw"),
        ({"method": {"name": "pedro", "conditioning": "system"}}, "set method.head_end"),
        ({"objective": "dpo", "gate": {}}, "objective dpo cannot share"),
    ]:
        fields = {**shared(tmp_path, 0).to_dict(), **changes}
        with pytest.raises(ValueError, match=said):
            FineTuneSpec.model_validate(fields)
    plain = FineTuneSpec.model_validate({**shared(tmp_path, 0).to_dict(), "resources": {}})
    assert "share" not in plain.to_dict()["resources"]


def test_a_backbone_that_drops_units_is_not_shared():
    model = load_model(resolve_backbone("stories260K"))
    check_repeatable(model)
    model.config.attention_dropout = 0.1
    with pytest.raises(ConfigError, match="attention_dropout"):
        check_repeatable(model)
