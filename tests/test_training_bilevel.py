"""Bi-level training: who moves in which step, against a reference of two optimizers."""

import pytest
import torch
from training_runs import context_for, parameters, spec_for

from pedro.errors import ConfigError
from pedro.methods.output_head import supervised
from pedro.training.batches import RowStream, supervised_tokens, tensors, token_loss
from pedro.training.bilevel import OMEGA, THETA, learning_rate
from pedro.training.estimate import dry_run
from pedro.training.loop import batch_step


def _is_theta(name):
    return ".pedro_a." in f"{name}." or ".pedro_b." in f"{name}."


def _moments(context):
    state = context.engine.optimizer.state
    return {name: state[p]["exp_avg"].clone() for name, p in context.engine.parameters}


def _step(context, role, rows, place=0, lr=1e-2):
    context.alternation.activate(role)
    context.engine.optimizer.set_lr(lr, lr)
    batch = RowStream(rows, context.plan.batch_size, 0).batch(place)
    batch_step(context.engine, batch, context.plan, context.data.pad_id, salt=0)


def test_theta_never_moves_in_an_omega_step_nor_omega_in_a_theta_step(tmp_path):
    context = context_for(spec_for(tmp_path), tmp_path)
    context.engine.mode(training=True)
    _step(context, OMEGA, context.data.train)  # from here on both have gradients and moments to be polluted
    _step(context, THETA, context.data.theta)
    for role in (OMEGA, THETA, OMEGA):
        values, moments = parameters(context), _moments(context)
        _step(context, role, context.data.train, place=1)
        for name, parameter in context.engine.parameters:
            moved = not torch.equal(parameter, values[name])
            assert moved == (_is_theta(name) == (role == THETA)), name
            assert moved or torch.equal(_moments(context)[name], moments[name]), f"moments of {name}"


def test_alternation_equals_two_plain_optimizers_on_the_same_batches(tmp_path):
    spec = spec_for(tmp_path, weight_decay=0.1, clip=0.5)
    context, reference = context_for(spec, tmp_path), context_for(spec, tmp_path)
    omega = [p for name, p in reference.engine.parameters if not _is_theta(name)]
    theta = [p for name, p in reference.engine.parameters if _is_theta(name)]
    plain = {
        OMEGA: (omega, torch.optim.AdamW(omega, lr=1e-2, weight_decay=0.1, fused=True)),
        THETA: (theta, torch.optim.AdamW(theta, lr=1e-2, weight_decay=0.0, fused=True)),
    }
    context.engine.mode(training=True)
    reference.model.train()
    for place in range(4):
        for role, rows in ((OMEGA, context.data.train), (THETA, context.data.theta)):
            _step(context, role, rows, place)
            chosen, optimizer = plain[role]
            batch_rows = RowStream(rows, context.plan.batch_size, 0).batch(place)
            batch = tensors(batch_rows, context.data.pad_id, "cpu", batch_rows[0])
            positions, wanted = supervised(batch.pop("labels"))
            reference.model.zero_grad()
            (token_loss(reference.model(**batch).logits[positions], wanted) / supervised_tokens(batch_rows)).backward()
            torch.nn.utils.clip_grad_norm_(chosen, 0.5)
            optimizer.step()
    wanted = parameters(reference)
    for name, value in parameters(context).items():
        assert torch.allclose(value, wanted[name], atol=1e-7), name


def test_an_update_to_a_smaller_than_a_bf16_step_survives_bf16_training(tmp_path):
    context = context_for(spec_for(tmp_path, precision="bf16"), tmp_path)
    backbone = [p for p in context.model.parameters() if not p.requires_grad]
    assert {p.dtype for p in backbone} == {torch.bfloat16}
    assert {p.dtype for _, p in context.engine.parameters} == {torch.float32}
    context.engine.mode(training=True)
    _step(context, OMEGA, context.data.train)  # while W_up is zero, a has no gradient
    before = parameters(context)
    _step(context, THETA, context.data.theta, lr=1e-6)
    for name, a in context.engine.parameters:
        if ".pedro_a." in f"{name}.":
            largest = a.detach().abs().argmax()
            moved = (a.detach() - before[name])[largest].abs()
            assert 0 < moved < a[largest].abs() * 2**-9, f"{name}: half a step of bf16 at the largest coefficient"


def test_methods_without_theta_train_on_what_would_be_the_theta_rows(tmp_path):
    with_theta = context_for(spec_for(tmp_path), tmp_path)
    without = context_for(spec_for(tmp_path, "lora"), tmp_path)
    joint = context_for(spec_for(tmp_path, bilevel=False), tmp_path)
    assert len(without.data.train) == len(with_theta.data.train) + len(with_theta.data.theta)
    assert len(joint.data.train) == len(without.data.train)
    assert (len(without.data.theta), len(joint.data.theta)) == (0, 0)
    assert not without.plan.bilevel
    assert not joint.plan.bilevel


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.06), (10, 0.0), (100, 0.06), (7, 0.5)])
def test_the_learning_rate_climbs_then_falls_and_never_stands_still_at_zero(steps, warmup):
    rates = [learning_rate(k, steps, 1.0, warmup) for k in range(steps)]
    top = rates.index(max(rates))
    assert top == round(warmup * steps) or steps == 1
    assert rates[:top] == sorted(rates[:top])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert min(rates) > 0
    assert max(rates) == 1.0


def test_b_up_learns_at_a_rate_of_its_own_where_that_is_asked_for(tmp_path):
    context = context_for(spec_for(tmp_path, b_up_lr_ratio=10), tmp_path)
    context.engine.mode(training=True)
    before = parameters(context)
    _step(context, OMEGA, context.data.train, lr=1e-3)
    moved = {name: (p - before[name]).abs().max().item() for name, p in parameters(context).items()}
    bias = [size for name, size in moved.items() if ".pedro_bias." in f"{name}."]
    up = [size for name, size in moved.items() if ".pedro_up." in f"{name}."]
    assert bias == pytest.approx([1e-2] * len(bias), rel=0.01), "Adam's first step is the rate itself"
    assert up == pytest.approx([1e-3] * len(up), rel=0.01)


def test_a_ratio_of_one_is_the_training_without_it_to_the_bit(tmp_path):
    plain, ratio = (context_for(spec_for(tmp_path, b_up_lr_ratio=r), tmp_path) for r in (None, 1))
    for context in (plain, ratio):
        context.engine.mode(training=True)
        for place in range(3):
            _step(context, OMEGA, context.data.train, place)
            _step(context, THETA, context.data.theta, place)
    wanted = parameters(plain)
    assert all(torch.equal(value, wanted[name]) for name, value in parameters(ratio).items())


def test_a_rate_of_b_up_is_refused_by_methods_that_have_none(tmp_path):
    spec = spec_for(tmp_path, "lora", b_up_lr_ratio=3)
    for attempt in (lambda: context_for(spec, tmp_path), lambda: dry_run(spec, calibrated=False)):
        with pytest.raises(ConfigError, match=r"training\.b_up_lr_ratio: lora has no b_up"):
            attempt()
