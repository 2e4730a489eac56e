"""Late prompt tuning: soft tokens from the prompt alone, whatever the padding, the cache or the neighbours."""

import pytest
import torch
from methods_models import late_prompt as tuned
from methods_models import tiny_backbone, tokens

from pedro.errors import BackboneError, ConfigError
from pedro.methods import get_method
from pedro.methods.late_prompt import LatePromptLayer, extend_mask

BACKBONES = ["llama", "qwen3", "gemma", "phi3", "gpt2", "gpt_neox"]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_cached_steps_equal_a_full_recompute(model_type, attention):
    model, ids = tuned(model_type, attention), tokens()
    cache = model(ids[:, :6], use_cache=True).past_key_values
    steps = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in (6, 7, 8)], dim=1)
    whole = model(ids, prompt_lens=torch.tensor([6, 6])).logits
    torch.testing.assert_close(steps, whole[:, 6:], atol=1e-4, rtol=1e-4)
    bare = tiny_backbone(model_type)(ids).logits
    assert (whole - bare).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", BACKBONES)
def test_padding_on_either_side_and_neighbours_change_nothing(model_type, attention):
    model = tuned(model_type, attention)
    short, long = tokens(1, 5, seed=8), tokens(1, 9)
    alone = model(short).logits[0]
    fill, ones = torch.zeros(1, 4, dtype=torch.long), torch.ones(1, 9, dtype=torch.long)
    for side in ("left", "right"):
        left = side == "left"
        ids = torch.cat([torch.cat([fill, short] if left else [short, fill], 1), long])
        mask = torch.cat([torch.cat([fill, ones[:, :5]] if left else [ones[:, :5], fill], 1), ones])
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits[0]
        torch.testing.assert_close(logits[4:] if left else logits[:5], alone, atol=1e-4, rtol=1e-4)


def test_changing_the_answer_changes_no_soft_token():
    model, made = tuned(), []
    layer = next(module for module in model.modules() if isinstance(module, LatePromptLayer))
    layer.register_forward_hook(lambda layer, args, output: made.append(output))
    ids, other = tokens(), tokens()
    other[:, 6:] = tokens(seed=9)[:, 6:]
    with torch.no_grad():
        for rows in (ids, other):
            model(rows, labels=rows.masked_fill(torch.arange(9) < 6, -100))
    assert torch.equal(*made)


@torch.no_grad()
def test_generation_by_beams_and_switching_off():
    model, ids = tuned(), tokens()
    with model.disable_adapter():
        assert torch.equal(model(ids).logits, tiny_backbone()(ids).logits)
    beams = model.generate(input_ids=ids, num_beams=3, max_new_tokens=4, do_sample=False)
    alone = model.generate(input_ids=ids[:1], num_beams=3, max_new_tokens=4, do_sample=False)
    assert torch.equal(beams[:1, : alone.shape[1]], alone)
    bare = model.unload()
    assert torch.equal(bare(ids).logits, tiny_backbone()(ids).logits)


def test_gradients_reach_the_generator_with_checkpointing_as_without():
    grads = []
    for checkpointing in (False, True):
        model = tuned().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(tokens(), labels=tokens(), prompt_lens=torch.tensor([4, 4])).loss.backward()
        grads.append([p.grad for _, p in get_method("lpt").parameter_groups(model)[0]])
    assert all(torch.allclose(a, b, atol=1e-6) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))


def test_soft_tokens_see_each_other_causally_and_are_seen_by_all():
    mask = torch.tensor([[[[True, False], [True, True]]]])
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert extend_mask(mask, 2, rows=True)[0, 0].int().tolist() == expected
    assert extend_mask(mask[:, :, 1:], 2, rows=False)[0, 0].int().tolist() == expected[3:]
    with pytest.raises(ConfigError, match='attn_implementation="sdpa"'):
        extend_mask(torch.ones(1, 4), 2, rows=True)


def test_a_backbone_with_sliding_windows_is_refused():
    with pytest.raises(BackboneError, match="gemma2 attends in sliding windows"):
        get_method("lpt").apply(tiny_backbone("gemma2"))
