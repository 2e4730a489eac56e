"""Embeddings of prompts equal the last hidden state of the PEFT model that carries the adapter alone, of length 1."""

import pytest
import torch
import torch.nn.functional as F
from engine_models import drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine import SamplingParams
from pedro.errors import PedroError

KINDS = {"pedro": ("pedro", {}), "mean": ("pedro-1", {}), "red": ("red", {}), "lora": ("lora", {"r": 4})}
POOLINGS = ("last", "mean")


def embed(name, ids, pooling="last", **fields):
    return request(name, ids, 0, pooling=pooling, **fields)


def vector(answer):
    assert (answer.token_ids, answer.last.finish_reason) == ([], "length")
    return torch.frombuffer(bytearray(answer.last.embedding), dtype=torch.float32)


@torch.no_grad()
def reference(model, ids, pooling):
    conditioned = any(config.peft_type == "PEDRO" for config in getattr(model, "peft_config", {}).values())
    lens = {"prompt_lens": torch.tensor([len(ids)])} if conditioned else {}
    hidden = model(input_ids=torch.tensor([ids]), output_hidden_states=True, **lens).hidden_states[-1][0]
    return F.normalize(hidden[-1] if pooling == "last" else hidden.mean(0), dim=0)


@pytest.mark.parametrize(
    ("model_type", "kernel"),
    [("llama", "native"), ("llama", "torch"), ("gemma", "native"), ("phi3", "native"), ("gpt2", "torch")],
)
def test_embeddings_in_one_batch_with_answers_equal_each_prompt_alone(model_type, kernel, tmp_path):
    model = random_backbone(model_type)
    tuned = {None: model}
    for seed, (name, (method, options)) in enumerate(KINDS.items(), 1):
        tuned[name] = make_adapter(model, tmp_path / name, seed, method, **options)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=6, kernel=kernel)
    assert engine.stats()["kernel"] == kernel
    asked = {
        f"{name}-{pooling}": (name, pooling, prompt(3 + 5 * number, number))
        for number, name in enumerate(tuned)
        for pooling in POOLINGS
    }
    requests = [embed(key, ids, pooling, adapter=name) for key, (name, pooling, ids) in asked.items()]
    talk = request("talk", prompt(9, 9), 12, adapter="pedro")
    answers = run(engine, *requests[:5], talk, *requests[5:])
    for key, (name, pooling, ids) in asked.items():
        wanted = reference(tuned[name], ids, pooling)
        torch.testing.assert_close(vector(answers[key]), wanted, atol=1e-4, rtol=0, msg=lambda m, k=key: f"{k}: {m}")
        assert answers[key].last.prompt_tokens == len(ids)
    bare, own = (vector(answers[f"{name}-last"]) for name in (None, "pedro"))
    assert (reference(model, asked["pedro-last"][2], "last") - own).abs().max() > 0.01, "the adapter has an effect"
    assert bare.norm().item() == pytest.approx(1, abs=1e-5)
    assert answers["talk"].token_ids == run(engine, talk)["talk"].token_ids
    assert engine.stats()["slots_free"] == 6


def test_a_long_prompt_that_is_read_in_slices_is_embedded_whole():
    model = random_backbone("llama", max_position_embeddings=600)
    engine = make_engine(model, prefill_tokens=32)
    ids = prompt(590, 4)
    engine.add(request("other", prompt(5), 40))
    for pooling in POOLINGS:
        engine.add(embed(pooling, ids, pooling))
    answers = drain(engine)
    for pooling in POOLINGS:
        torch.testing.assert_close(vector(answers[pooling]), reference(model, ids, pooling), atol=1e-4, rtol=0)


def test_a_mean_is_taken_of_all_tokens_though_the_first_were_read_before():
    model = random_backbone("llama")
    engine = make_engine(model, prefix_bytes=1 << 20)
    ids = prompt(40)
    run(engine, request("before", ids))
    answers = run(engine, embed("last", ids), embed("mean", ids, "mean"))
    assert (answers["last"].last.cached_tokens, answers["mean"].last.cached_tokens) == (32, 0)
    for pooling in POOLINGS:
        torch.testing.assert_close(vector(answers[pooling]), reference(model, ids, pooling), atol=1e-4, rtol=0)


def test_what_cannot_be_embedded_is_refused():
    engine = make_engine(random_backbone("llama"), max_length=16)
    assert "whole" in run(engine, embed("whole", prompt(16)))
    with pytest.raises(PedroError, match="17 tokens and exceeds the context of 16") as refused:
        engine.add(embed("long", prompt(17)))
    assert refused.value.param == "prompt"
    for fields, param in (
        ({"pooling": "cls", "max_tokens": 0}, "pooling"),
        ({"pooling": "last", "max_tokens": 4}, "max_tokens"),
        ({"pooling": "last"}, "max_tokens"),
    ):
        with pytest.raises(PedroError) as refused:
            SamplingParams(**fields)
        assert refused.value.param == param


def test_embeddings_take_their_tenants_turn():
    """A flood of one tenant's embeddings: another's answer waits for few of them."""
    engine = make_engine(random_backbone("llama"), max_batch=2, prefill_tokens=32)
    flood = [f"f{number}" for number in range(20)]
    for name in flood:
        engine.add(embed(name, prompt(30), tenant="acme"))
    engine.step()
    engine.add(request("mine", prompt(4), 1, tenant="globex"))
    answers = drain(engine, until=lambda found: "mine" in found)
    assert len(answers) < len(flood) / 2
    drain(engine)
