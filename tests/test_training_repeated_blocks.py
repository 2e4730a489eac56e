"""Gradient checkpointing: blocks that are computed twice give every method the gradients of blocks that are kept."""

import pytest
import torch
from methods_models import tiny_backbone
from test_methods_training import OPTIONS, by_heart
from training_runs import context_for, spec_for

from pedro.errors import ConfigError
from pedro.methods import METHODS, get_method
from pedro.methods.output_head import logits_at, supervised
from pedro.training.batches import tensors, token_loss
from pedro.training.estimate import dry_run

PREFIX = "p-tuning-v2"  # its prefix lies in the KV cache


@pytest.mark.parametrize("name", [name for name in METHODS if name != PREFIX])
def test_blocks_that_are_computed_twice_give_every_method_the_same_loss_and_gradients(name):
    torch.set_num_threads(1)
    model = get_method(name).apply(tiny_backbone(), OPTIONS.get(name, {})).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # fresh adapters change nothing, and let no gradient through
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
    rows, calls = by_heart(6), []
    block = next(module for module in model.modules() if hasattr(module, "self_attn"))
    block.mlp.register_forward_pre_hook(lambda *_: calls.append(name))

    def step():
        batch = tensors(rows, pad_id=0, device="cpu", filler=rows[0])
        positions, wanted = supervised(batch.pop("labels"))
        torch.manual_seed(3)
        model.zero_grad(set_to_none=True)
        with logits_at(model, positions):
            loss = token_loss(model(**batch, use_cache=False).logits[0], wanted)
        loss.backward()
        return loss, {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    loss, kept = step()
    assert len(calls) == 1
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    again, repeated = step()
    assert len(calls) == 3, "the block was computed twice"
    assert torch.equal(again, loss)
    assert repeated.keys() == kept.keys()
    for key, gradient in kept.items():
        torch.testing.assert_close(repeated[key], gradient, atol=1e-6, rtol=1e-5, msg=key)
    assert any(gradient.any() for gradient in kept.values())


def test_a_prefix_in_the_kv_cache_is_refused_by_job_and_dry_run_alike(tmp_path):
    spec = spec_for(tmp_path, PREFIX, gradient_checkpointing=True)
    for ask in (lambda: context_for(spec, tmp_path), lambda: dry_run(spec, calibrated=False)):
        with pytest.raises(ConfigError, match=r"training\.gradient_checkpointing: p-tuning-v2 keeps its prefix"):
            ask()
