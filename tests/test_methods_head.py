"""PEDRO with `head_end`: the vectors come from a prompt's head, up to where these tokens first end."""

import random

import pytest
import torch
from methods_models import randomize, tiny_backbone, tokens, tuned
from peft import PeftModel, get_peft_model

from pedro import PedroConfig
from pedro.adapter_kinds.heads import head_length
from pedro.errors import ConfigError
from pedro.methods import get_method
from pedro.methods.prompt import PromptPass

END = (5, 6)


def prompts(*places, length=12):
    """Rows of random tokens with END at these places (None: nowhere)."""
    ids = tokens(len(places), length, seed=7)
    ids[(ids == 5) | (ids == 6)] = 7
    for row, place in enumerate(places):
        if place is not None:
            ids[row, place : place + 2] = torch.tensor(END)
    return ids


def test_the_head_ends_where_the_tokens_first_end_in_the_prompt():
    rng, found, passed = random.Random(2), set(), PromptPass("PEDRO")
    for _ in range(300):
        end, ids = tuple(rng.choices(range(3), k=rng.randint(1, 3))), rng.choices(range(3), k=rng.randint(2, 9))
        length = rng.randint(1, len(ids))
        passed._ids = torch.tensor([ids])
        head = passed.head(torch.arange(len(ids))[None] < length, end)
        stop = head_length(end, ids[:length])
        assert head[0].tolist() == [place < stop for place in range(len(ids))], (end, ids, length)
        found.add("all" if stop == length else "some")
    assert found == {"all", "some"}


@torch.no_grad()
@pytest.mark.parametrize("pool", ["last", "mean"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_are_those_of_a_prompt_that_says_the_head_itself(pool, side):
    ids, stops, lens = prompts(2, 5, None), (4, 7, 9), (9, 9, 9)
    headed, plain = tuned(head_end=END, pool=pool), tuned(pool=pool)
    wanted = plain(ids, prompt_lens=torch.tensor(stops)).logits
    torch.testing.assert_close(headed(ids, prompt_lens=torch.tensor(lens)).logits, wanted)
    fill = torch.zeros_like(ids[:, :3])
    padded = torch.cat([fill, ids] if side == "left" else [ids, fill], dim=1)
    mask = (padded > 0).long()
    made = headed(padded, attention_mask=mask, prompt_lens=torch.tensor(lens)).logits[mask.bool()].view_as(wanted)
    torch.testing.assert_close(made, wanted, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_what_follows_the_head_changes_no_key_or_value_before_it():
    model, ids = tuned(head_end=END), prompts(3)
    other = ids.clone()
    other[:, 8:] = (other[:, 8:] + 9) % 50 + 8
    ours, theirs = (model(one, use_cache=True).past_key_values for one in (ids, other))
    for one, two in zip(ours.layers, theirs.layers, strict=True):
        assert torch.equal(one.keys[:, :, :8], two.keys[:, :, :8])
        assert torch.equal(one.values[:, :, :8], two.values[:, :, :8])
    plain = tuned()
    ours, theirs = (plain(one, use_cache=True).past_key_values for one in (ids, other))
    assert not torch.equal(ours.layers[1].values[:, :, :8], theirs.layers[1].values[:, :, :8])


@torch.no_grad()
def test_generation_is_conditioned_on_the_head_too_and_with_an_answer_side_only_the_tail_is_scaled(tmp_path):
    ids = prompts(3, 6)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    for more in ({}, {"apply_to": "answer", "tail": 2}):
        model = tuned(head_end=END, **more)
        made = model.generate(input_ids=ids, **options)
        logits = model(made, prompt_lens=torch.tensor([12, 12])).logits[:, 11:-1]
        logits[..., 2] = float("-inf")  # what min_new_tokens forbids
        assert torch.equal(logits.argmax(-1), made[:, 12:])
        if more:
            assert torch.equal(model(ids).logits[:, :10], tiny_backbone()(ids).logits[:, :10])
        model.save_pretrained(tmp_path / str(len(more)))
        again = PeftModel.from_pretrained(tiny_backbone(), tmp_path / str(len(more))).eval()
        assert torch.equal(again.generate(input_ids=ids, **options), made)


@torch.no_grad()
def test_rows_of_one_batch_keep_the_heads_of_their_own_adapters():
    model = get_peft_model(tiny_backbone(), PedroConfig(task_type="CAUSAL_LM", head_end=END), adapter_name="headed")
    model.add_adapter("whole", PedroConfig(task_type="CAUSAL_LM"))
    for seed, name in enumerate(("headed", "whole")):
        randomize(model, seed, adapter=name)
    ids, names = prompts(2, 2, 5), ["whole", "headed", "headed"]
    together = model.eval()(ids, adapter_names=names).logits
    for row, name in enumerate(names):
        alone = model(ids[row : row + 1], adapter_names=[name]).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_embeddings_in_which_no_tokens_can_be_found_are_refused():
    model, ids = tuned(head_end=END), prompts(3)
    with pytest.raises(ConfigError, match="inputs_embeds: PEDRO looks for head_end in tokens; pass input_ids"):
        model(inputs_embeds=model.get_input_embeddings()(ids), use_cache=True)


@pytest.mark.parametrize("end", [[], [-1], [5, True], "ab", 7, [64]])
def test_tokens_that_can_end_no_head_are_named(end):
    with pytest.raises(ConfigError, match=r"method\.head_end: expected .*token ids?"):
        get_method("pedro").config(tiny_backbone().config, {"head_end": end})
