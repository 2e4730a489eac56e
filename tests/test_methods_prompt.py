"""What conditions the vectors: the prompt and nothing else, whatever the padding, the cache or the neighbours."""

import warnings

import pytest
import torch
from methods_models import late_prompt, randomize, tiny_backbone, tokens, tuned
from peft import get_peft_model
from transformers import GenerationConfig, StaticCache

from pedro import PedroConfig
from pedro.errors import ConfigError
from pedro.methods import get_method
from pedro.methods.pedro.layer import PedroLayer

PROMPT, ANSWER = 6, 4


def vectors_of(model, *args, **kwargs) -> torch.Tensor:
    """All vectors [layers, B, W] that a forward pass makes."""
    made = []
    layers = [module for module in model.modules() if isinstance(module, PedroLayer)]
    handles = [layer.register_forward_hook(lambda layer, args, output: made.append(output)) for layer in layers]
    with torch.no_grad():
        model(*args, **kwargs)
    for handle in handles:
        handle.remove()
    return torch.stack([torch.cat(list(vectors.values()), dim=-1) for vectors in made])


def padded(rows: list[torch.Tensor], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [T_i] as one batch (ids [B, T], attention mask [B, T]) with padding on the given side."""
    length = max(len(row) for row in rows)
    fill = [torch.zeros(length - len(row), dtype=torch.long) for row in rows]
    pairs = [(f, r) if side == "left" else (r, f) for f, r in zip(fill, rows, strict=True)]
    masks = [
        (f, torch.ones_like(r)) if side == "left" else (torch.ones_like(r), f) for f, r in zip(fill, rows, strict=True)
    ]
    return torch.stack([torch.cat(p) for p in pairs]), torch.stack([torch.cat(m) for m in masks])


def contrast(model, input_ids, generation_config=None, **given) -> torch.Tensor:
    """A search that is not transformers': looks at the two best next tokens, takes the one with the surer follower."""
    use_cache, attention_mask = given["use_cache"], given["attention_mask"]
    for _ in range(generation_config.max_new_tokens):
        mask = torch.ones_like(input_ids)
        mask[:, : attention_mask.shape[1]] = attention_mask
        first = model(input_ids, attention_mask=mask, use_cache=use_cache)
        best = first.logits[:, -1].topk(2).indices.flatten()  # [2 B]
        mask = torch.cat([mask, mask[:, -1:]], dim=1).repeat_interleave(2, dim=0)
        if use_cache:
            first.past_key_values.batch_repeat_interleave(2)
            tried = model(best[:, None], attention_mask=mask, past_key_values=first.past_key_values)
        else:
            rows = torch.cat([input_ids.repeat_interleave(2, dim=0), best[:, None]], dim=1)
            tried = model(rows, attention_mask=mask, use_cache=False)
        sure = tried.logits[:, -1].softmax(-1).amax(-1).view(-1, 2).argmax(-1, keepdim=True)
        input_ids = torch.cat([input_ids, best.view(-1, 2).gather(1, sure)], dim=1)
    return input_ids


def boundary(kind: str, ids: torch.Tensor, mask: torch.Tensor, prompts: list[int], side: str) -> dict:
    """The same boundary told by labels, prompt_lens or prompt_mask; labels go along in each case."""
    rank = mask.cumsum(dim=1)
    is_prompt = (mask == 1) & (rank <= torch.tensor(prompts)[:, None])
    labels = ids.masked_fill(is_prompt | (mask == 0), -100)
    extra = {
        "labels": {},
        "prompt_lens": {"prompt_lens": torch.tensor(prompts)},
        "prompt_mask": {"prompt_mask": is_prompt},
    }
    return {"attention_mask": mask, "labels": labels, **extra[kind]}


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["labels", "prompt_lens", "prompt_mask"])
def test_changing_the_answer_changes_no_vector(kind, side, pool):
    model = tuned(pool=pool)
    prompts, answers = [6, 3], [4, 2]
    rows = [tokens(1, p + a, seed=p)[0] for p, a in zip(prompts, answers, strict=True)]
    others = [torch.cat([row[:p], row[p:].flip(0) % 61 + 3]) for row, p in zip(rows, prompts, strict=True)]
    made = []
    for batch in (rows, others):
        ids, mask = padded(batch, side)
        made.append(vectors_of(model, ids, **boundary(kind, ids, mask, prompts, side)))
    assert torch.equal(*made)
    changed = [torch.cat([(row[:p] + 5) % 61 + 3, row[p:]]) for row, p in zip(rows, prompts, strict=True)]
    ids, mask = padded(changed, side)
    assert not torch.allclose(made[0], vectors_of(model, ids, **boundary(kind, ids, mask, prompts, side)), atol=1e-3)


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
@pytest.mark.parametrize("kind", ["labels", "prompt_lens", "prompt_mask"])
def test_the_vectors_are_those_of_the_prompt_alone(kind, pool):
    model, ids = tuned(pool=pool), tokens(2, PROMPT + ANSWER)
    alone = vectors_of(model, ids[:, :PROMPT])
    with_answer = vectors_of(model, ids, **boundary(kind, ids, torch.ones_like(ids), [PROMPT] * 2, "right"))
    torch.testing.assert_close(with_answer, alone, atol=1e-5, rtol=1e-5)


def test_an_explicit_boundary_goes_before_the_labels():
    model, ids = tuned(), tokens(2, 10)
    labels = ids.masked_fill(torch.arange(10) < 8, -100)
    explicit = vectors_of(model, ids, labels=labels, prompt_lens=torch.tensor([4, 4]))
    torch.testing.assert_close(explicit, vectors_of(model, ids[:, :4]), atol=1e-5, rtol=1e-5)


def test_without_supervision_a_row_is_all_prompt():
    model, ids = tuned(), tokens(2, 8)
    labels = torch.full_like(ids, -100)
    assert torch.equal(vectors_of(model, ids, labels=labels), vectors_of(model, ids))


def test_a_fully_supervised_row_is_conditioned_on_its_first_token_only():
    model, ids = tuned(), tokens(2, 8)
    other = torch.cat([ids[:, :1], tokens(2, 7, seed=9)], dim=1)
    assert torch.equal(vectors_of(model, ids, labels=ids), vectors_of(model, other, labels=other))


@pytest.mark.parametrize("pool", ["last", "mean", "max"])
def test_a_row_of_padding_only_spoils_no_gradient(pool):
    model, ids = tuned(pool=pool), tokens(2, 8)
    mask = torch.tensor([[1] * 8, [0] * 8])
    labels = ids.masked_fill((mask == 0) | (torch.arange(8) < 5), -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.requires_grad)


@torch.no_grad()
@pytest.mark.parametrize("pool_source", ["normed", "residual"])
@pytest.mark.parametrize("pool", ["last", "mean", "max"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_equals_each_row_alone(side, pool, pool_source):
    model = tuned(pool=pool, pool_source=pool_source)
    rows, prompts = [tokens(1, 10)[0], tokens(1, 6, seed=5)[0]], [7, 4]
    ids, mask = padded(rows, side)
    together = model(ids, attention_mask=mask, prompt_lens=torch.tensor(prompts)).logits
    for i, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
        alone = model(row[None], prompt_lens=torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(together[i][mask[i].bool()], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_generation_equals_full_recomputation_with_left_padding(options, pool):
    model = tuned(pool=pool)
    prompts, new = [8, 5], 9
    ids, mask = padded([tokens(1, p, seed=p)[0] for p in prompts], "left")
    made = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        **options,
    )
    for i, prompt in enumerate(prompts):
        row = made.sequences[i, 8 - prompt :][None]
        logits = model(row, prompt_lens=torch.tensor([prompt])).logits[0, prompt - 1 : -1]
        if "num_beams" in options:  # a beam's score is its mean log probability, recomputed without any cache
            chosen = logits.log_softmax(-1)
            chosen[:, 2] = float("-inf")  # min_new_tokens forbids the end
            score = logits.log_softmax(-1)[torch.arange(new), row[0, prompt:]].mean()
            torch.testing.assert_close(made.sequences_scores[i], score, atol=1e-4, rtol=1e-4)
        else:
            logits[:, 2] = float("-inf")
            assert torch.equal(logits.argmax(-1), row[0, prompt:])
            torch.testing.assert_close(torch.stack(made.scores, 1)[i], logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_kept_cache_goes_on_with_its_vectors_through_plain_forward_calls():
    model, ids = tuned(), tokens(2, 10)
    first = model(ids[:, :6], use_cache=True)
    second = model(ids[:, 6:9], past_key_values=first.past_key_values)
    third = model(ids[:, 9:], past_key_values=second.past_key_values)
    whole = model(ids, prompt_lens=torch.tensor([6, 6])).logits
    torch.testing.assert_close(torch.cat([first.logits, second.logits, third.logits], 1), whole, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_kept_cache_outlives_switching_and_deleting_its_adapter():
    model, ids = tuned(), tokens(1, 9)
    whole = model(ids, prompt_lens=torch.tensor([6])).logits
    model.add_adapter("other", PedroConfig(task_type="CAUSAL_LM"))
    cache = model(ids[:, :6], use_cache=True).past_key_values
    model.set_adapter("other")
    model.delete_adapter("default")
    torch.testing.assert_close(model(ids[:, 6:], past_key_values=cache).logits, whole[:, 6:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_vectors_follow_the_rows_of_their_cache():
    model, ids = tuned(), tokens(3, 8)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    chosen = ids[[0, 0, 2, 2]]
    whole = model(chosen, prompt_lens=torch.tensor([6] * 4)).logits
    torch.testing.assert_close(model(chosen[:, 6:], past_key_values=cache).logits, whole[:, 6:], atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_static_cache_can_be_used_again_after_a_reset():
    model, ids = tuned(), tokens(1, 8)
    cache = StaticCache(config=model.config, max_cache_len=16)
    for seed in (1, 2):
        ids = tokens(1, 8, seed=seed)
        model(ids[:, :6], past_key_values=cache)
        got = model(ids[:, 6:], past_key_values=cache).logits
        whole = model(ids, prompt_lens=torch.tensor([6])).logits[:, 6:]
        torch.testing.assert_close(got, whole, atol=1e-4, rtol=1e-4)
        cache.reset()


@torch.no_grad()
def test_a_cache_filled_without_the_adapter_is_refused():
    model, ids = tuned(), tokens(1, 8)
    with model.disable_adapter():
        cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.raises(ConfigError, match="filled without the adapter"):
        model(ids[:, 6:], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_a_prepared_four_dimensional_mask_is_understood(attention, pool):
    model = tuned(pool=pool, changes={"attn_implementation": attention})
    ids, mask = padded([tokens(1, 8)[0], tokens(1, 5, seed=4)[0]], "left")
    flat = model(ids, attention_mask=mask).logits[:, -1]
    visible = torch.tril(torch.ones(8, 8, dtype=torch.bool)) & mask.bool()[:, None, None, :]
    prepared = (
        visible
        if attention == "sdpa"
        else torch.zeros(2, 1, 8, 8).masked_fill(~visible, torch.finfo(torch.float32).min)
    )
    torch.testing.assert_close(model(ids, attention_mask=prepared).logits[:, -1], flat, atol=1e-4, rtol=1e-4)


def test_a_wrong_boundary_is_refused_with_what_was_expected():
    model, ids = tuned(), tokens(2, 8)
    with pytest.raises(ConfigError, match=r"prompt_lens: expected between 1 and .*\[8, 8\], got \[9, 3\]"):
        model(ids, prompt_lens=torch.tensor([9, 3]))
    with pytest.raises(ConfigError, match=r"prompt_lens: expected shape \(2,\), got \(3,\)"):
        model(ids, prompt_lens=torch.tensor([1, 2, 3]))
    with pytest.raises(ConfigError, match=r"prompt_mask: expected shape \(2, 8\), got \(2, 7\)"):
        model(ids, prompt_mask=torch.ones(2, 7))


@pytest.mark.parametrize("make", [tuned, late_prompt])
@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"prefill_chunk_size": 4}, "prefill_chunk_size: (PEDRO|late prompt tuning) reads a prompt in one piece"),
        ({"token_healing": True}, "token_healing: .* cannot tell a prompt that changes from its answer"),
        ({"guidance_scale": 1.5}, "guidance_scale: .* guidance reads a second one"),
        ({"negative_prompt_ids": tokens(1, 3)}, "negative_prompt_ids: "),
        ({"cache_implementation": "paged"}, "cache_implementation: .* takes one sequence a row"),
    ],
)
def test_what_reads_a_prompt_in_another_way_is_refused_by_name(make, option, message):
    model, ids = make(), tokens(1, 8)
    with pytest.raises(ConfigError, match=message):
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, **option)
    if "negative_prompt_ids" not in option:  # no field of a generation config
        config = GenerationConfig(max_new_tokens=2, **option)
        with pytest.raises(ConfigError, match=message):
            model.get_base_model().generate(ids, generation_config=config)


def test_packed_rows_are_refused():
    with pytest.raises(ConfigError, match="cu_seq_lens_q: PEDRO takes one sequence a row, and these are packed"):
        tuned()(tokens(1, 8), cu_seq_lens_q=torch.tensor([0, 3, 8]))
    anew = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="position_ids: PEDRO takes one sequence a row, and these are packed"):
        tuned()(tokens(1, 8), position_ids=anew, labels=tokens(1, 8))
    tuned()(tokens(1, 8), position_ids=torch.arange(3, 11)[None], prompt_lens=torch.tensor([4]))


def reft():
    torch.manual_seed(1)
    return get_method("loreft").apply(tiny_backbone(), {"positions": "f2+l2"}).eval()


CONDITIONED = {
    "pedro": tuned,
    "para": lambda: tuned(activation="gelu", pool="mean"),
    "lpt": late_prompt,
    "loreft": reft,
}


@torch.no_grad()
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"custom_generate": contrast}]
)
@pytest.mark.parametrize("name", CONDITIONED)
def test_generation_without_a_cache_gives_the_tokens_of_generation_with_one(name, options):
    model = CONDITIONED[name]()
    ids, mask = padded([tokens(1, length, seed=length)[0] for length in (8, 5)], "left")
    common = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, **options}
    with_cache, without = (
        model.generate(input_ids=ids, attention_mask=mask, use_cache=cached, **common) for cached in (True, False)
    )
    assert torch.equal(with_cache, without)


@torch.no_grad()
@pytest.mark.parametrize("name", CONDITIONED)
def test_drafts_of_an_assistant_or_of_the_prompt_change_no_token(name):
    model, ids = CONDITIONED[name](), tokens(1, 4).repeat(1, 3)
    common = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    plain = model.generate(input_ids=ids, **common)
    for draft in (
        {"assistant_model": tiny_backbone()},
        {"assistant_model": model},
        {"prompt_lookup_num_tokens": 3},
        {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
    ):
        assert torch.equal(model.generate(input_ids=ids, **common, **draft), plain), draft


@torch.no_grad()
def test_a_conversation_on_an_old_cache_keeps_the_first_prompts_vectors_and_warns():
    model, ids = tuned(), tokens(1, 12)
    cache = model(ids[:, :6], use_cache=True).past_key_values
    with pytest.warns(UserWarning, match="past_key_values: .* vectors stay those of its first prompt"):
        made = model.generate(input_ids=ids, past_key_values=cache, max_new_tokens=4, do_sample=False)
    logits = model(made, prompt_lens=torch.tensor([6])).logits
    assert torch.equal(logits[:, 11:-1].argmax(-1), made[:, 12:])


@torch.no_grad()
def test_an_adapter_that_transformers_loaded_has_the_same_boundary(tmp_path):
    tuned().save_pretrained(tmp_path)
    model, ids = tiny_backbone(), tokens(2, 8)
    model.load_adapter(str(tmp_path))
    made = [model.generate(ids, max_new_tokens=8, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*made)


def test_unloading_gives_the_backbones_own_generate_back():
    assert "generate" not in vars(tuned().unload())


def test_a_forward_call_without_a_boundary_warns_of_the_leak():
    for make in (tuned, late_prompt):
        model, ids = make().train(), tokens(1, 8)
        with pytest.warns(UserWarning, match="training without labels, prompt_lens or prompt_mask"):
            model(ids)
        model.eval()
        with pytest.warns(UserWarning, match="a forward call without labels, .*; pass prompt_lens"), torch.no_grad():
            model(ids)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(ids, prompt_lens=torch.tensor([4]))
            model(ids, labels=ids)
            model(ids, use_cache=True)
            model.generate(input_ids=ids, max_new_tokens=2, use_cache=False)
            with model.disable_adapter():
                model(ids)


def test_a_failed_forward_pass_leaves_nothing_for_the_next():
    model, ids = tuned(), tokens(2, 8)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(IndexError):
            model(torch.full_like(ids, 10_000))
        assert torch.equal(model(ids).logits, expected)


def test_a_part_of_the_model_cannot_be_called_with_a_stale_prompt():
    model, ids = tuned(), tokens(2, 8)
    model(ids)
    with pytest.raises(RuntimeError, match="call the model that carries the adapter"):
        model.get_base_model().model(ids)


def test_input_embeddings_condition_like_their_tokens():
    model, ids = tuned(), tokens(2, 8)
    embeddings = model.get_input_embeddings()(ids)
    by_embeddings = vectors_of(model, inputs_embeds=embeddings, prompt_lens=torch.tensor([5, 5]))
    assert torch.equal(by_embeddings, vectors_of(model, ids, prompt_lens=torch.tensor([5, 5])))


def three_tenants():
    """One backbone with the adapters acme, beta and (of other targets, pool and activation) corp."""
    model = get_peft_model(tiny_backbone(), PedroConfig(task_type="CAUSAL_LM"), adapter_name="acme")
    model.add_adapter("beta", PedroConfig(task_type="CAUSAL_LM", r=4))
    model.add_adapter(
        "corp", PedroConfig(task_type="CAUSAL_LM", targets=("k", "gate"), activation="relu", pool="max", r=5)
    )
    for seed, name in enumerate(("acme", "beta", "corp")):
        randomize(model, seed, adapter=name)
    return model.eval()


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_mixed_adapters_in_one_batch_equal_each_alone(side):
    model = three_tenants()
    names = ["beta", "acme", "__base__", "corp", "acme"]
    rows = [tokens(1, length, seed=length)[0] for length in (7, 9, 6, 8, 5)]
    ids, mask = padded(rows, side)
    together = model(ids, attention_mask=mask, adapter_names=names).logits
    bare = tiny_backbone()
    for i, (row, name) in enumerate(zip(rows, names, strict=True)):
        if name == "__base__":
            alone = bare(row[None]).logits[0]
        else:
            model.set_adapter(name)
            alone = model(row[None]).logits[0]
        torch.testing.assert_close(together[i][mask[i].bool()], alone, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("beams", [1, 3])
def test_mixed_adapters_generate_what_each_generates_alone(beams):
    model = three_tenants()
    names, ids = ["beta", "__base__", "acme", "corp"], tokens(4, 7)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "num_beams": beams}
    together = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for i, name in enumerate(names):
        row = {"input_ids": ids[i : i + 1], "attention_mask": torch.ones_like(ids[:1])}
        alone = model.generate(**row, adapter_names=[name], **options)
        assert torch.equal(together[i], alone[0])


@torch.no_grad()
def test_mixed_batches_with_a_wrong_name_or_number_are_refused():
    model, ids = three_tenants(), tokens(2, 7)
    with pytest.raises(ConfigError, match="adapter_names: no adapter acm; loaded are acme, beta, corp"):
        model(ids, adapter_names=["acm", "beta"])
    with pytest.raises(ConfigError, match="adapter_names: expected one name a row, 2, got 3"):
        model(ids, adapter_names=["acme", "beta", "beta"])


@torch.no_grad()
def test_several_active_adapters_multiply():
    model, ids = three_tenants(), tokens(2, 7)
    model.base_model.set_adapter(["acme", "corp"])
    both = model(ids).logits
    model.set_adapter("acme")
    assert not torch.allclose(both, model(ids).logits, atol=1e-3)
    model.base_model.set_adapter(["acme", "beta"])
    first_layer = next(m for m in model.modules() if isinstance(m, PedroLayer))
    kept = model(ids, use_cache=True).past_key_values.pedro_vectors[0]
    hidden = model.get_input_embeddings()(ids)
    prompt = torch.ones_like(ids, dtype=torch.bool)
    for target in ("q", "v", "up"):
        product = first_layer(hidden, prompt, "acme")[target] * first_layer(hidden, prompt, "beta")[target]
        torch.testing.assert_close(kept[target], product)
