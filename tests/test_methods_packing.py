"""Packed passes: without padding, and with the padded pass's logits and gradients."""

import math

import pytest
import torch
from methods_models import MODEL_TYPES, tiny_backbone, tokens, tuned
from peft import LoraConfig, get_peft_model

from pedro.methods import METHODS, get_method
from pedro.methods.output_head import logits_at
from pedro.methods.packing import NAME, AttendAgain, JobOfBatch, Packing, attend, can_pack, shares_beginnings
from pedro.training.bilevel import GroupedAdamW
from pedro.training.engines import TorchEngine, packed_logits

LENGTHS, PROMPTS = (5, 9, 6, 3), (4, 5, 6, 3)
PACK = {
    "pedro",
    "pedro-1",
    "pedro-3",
    "para",
    "lora",
    "ia3",
    "adalora",
    "bitfit",
    "red",
    "houlsby",
    "lorta",
    "miss",
    "loreft",
    "lpt",
    "p-tuning-v2",
    "full",
}
READ_PROMPTS = {"pedro", "pedro-1", "pedro-3", "para", "loreft", "lpt"}
IN_CACHE = {"p-tuning-v2"}  # which who reads beginnings once into a cache could not put beside them


def a_batch(alike=0):
    """Four rows, the first `alike` tokens of all of them the same."""
    ids = tokens(len(LENGTHS), max(LENGTHS))
    ids[:, :alike] = ids[0, :alike]
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    batch = {
        "input_ids": torch.where(mask, ids, 0),
        "attention_mask": mask.long(),
        "prompt_lens": torch.tensor(PROMPTS),
    }
    return batch, mask & (torch.arange(ids.shape[1]) >= torch.tensor(PROMPTS)[:, None] - 1)


def padded_logits(model, positions, batch):
    with logits_at(model, positions):
        return model(**batch, use_cache=False).logits[0]


def with_gradients(model, logits):
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    weights = torch.linspace(-1, 1, logits.numel()).view_as(logits)
    gradients = torch.autograd.grad((logits * weights).sum(), trained, allow_unused=True)
    return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]


def assert_alike(found, wanted):
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 + 1e-5 * float(other.abs().max()))


def assert_packed_as_padded(model, alike=0):
    batch, positions = a_batch(alike)
    packing = Packing.of(batch, share=bool(alike))
    assert (packing.shared, len(packing.places)) == (alike, sum(LENGTHS) - 3 * alike)
    wanted = with_gradients(model, padded_logits(model, positions, batch))
    assert_alike(with_gradients(model, packed_logits(model, packing, positions, batch)), wanted)
    assert model.config._attn_implementation == "sdpa" != NAME


def adapted(name):
    model = get_method(name).apply(tiny_backbone())
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad and name != "full":
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return model.eval()


def test_it_is_known_which_methods_act_token_by_token():
    assert {name for name in METHODS if name != "peft" and can_pack(adapted(name))} >= PACK


@pytest.mark.parametrize("name", sorted(PACK))
def test_a_packed_pass_has_the_logits_and_gradients_of_the_padded_one(name):
    model = adapted(name)
    assert_packed_as_padded(model)
    assert shares_beginnings(model) == (name not in READ_PROMPTS | IN_CACHE)
    if name not in READ_PROMPTS:
        assert_packed_as_padded(model, alike=2)


@pytest.mark.parametrize("name", sorted(PACK - IN_CACHE))
def test_a_block_that_is_computed_again_attends_as_the_first_time(name, monkeypatch):
    model, calls = adapted(name).train(), []
    batch, positions = a_batch()
    wanted = with_gradients(model, padded_logits(model, positions, batch))
    model.gradient_checkpointing_enable({"use_reentrant": False, "context_fn": AttendAgain(model)})
    assert can_pack(model)
    assert_alike(with_gradients(model, padded_logits(model, positions, batch)), wanted)
    monkeypatch.setattr(
        "pedro.methods.packing.attend", lambda *given, **named: calls.append(1) or attend(*given, **named)
    )
    assert_alike(with_gradients(model, packed_logits(model, Packing.of(batch), positions, batch)), wanted)
    assert len(calls) > model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_every_backbone_packs_or_is_known_not_to(model_type):
    model = tuned(model_type)
    slides = model_type in ("mistral", "gemma2", "gemma3_text")
    assert can_pack(model) == (not slides)
    if not slides:
        assert_packed_as_padded(model)
        for name in ("lpt", "p-tuning-v2"):
            assert_packed_as_padded(get_method(name).apply(tiny_backbone(model_type), {"tokens": 4}).eval())


@pytest.mark.parametrize(
    "options", [{"pool": "mean"}, {"apply_to": "answer", "tail": 2}, {"conditioning": "system", "head_end": [7]}]
)
def test_pedros_options_read_the_same_prompts_of_a_packed_batch(options):
    assert_packed_as_padded(tuned(**options))


def test_reft_edits_the_same_tokens_of_a_packed_batch():
    for options in ({"positions": "f1+l2", "shared": False}, {"positions": "l1", "direct": True}):
        assert_packed_as_padded(get_method("loreft").apply(tiny_backbone(), options).eval())


def test_what_depends_on_rows_is_not_packed():
    model = tuned()
    assert can_pack(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert not can_pack(model)
    activated = get_peft_model(tiny_backbone(), LoraConfig(task_type="CAUSAL_LM", alora_invocation_tokens=[5]))
    assert not can_pack(activated)
    averaged = get_peft_model(
        tiny_backbone(), LoraConfig(task_type="CAUSAL_LM", velora_config={"init_type": "batch_average"})
    )
    assert not can_pack(averaged)
    eager = tuned(changes={"attn_implementation": "eager"})
    assert not can_pack(eager)


@pytest.mark.parametrize(
    ("method", "width", "passed"),
    [
        ("pedro", 256, sum(LENGTHS)),  # whose vectors scale the beginnings, too
        ("lora", 256, sum(LENGTHS) - 3 * 2),
        ("p-tuning-v2", 256, sum(LENGTHS) - 3 * 2),
        ({"name": "lora", "dropout": 0.5}, 256, sum(LENGTHS)),
        ("lora", 64, len(LENGTHS) * max(LENGTHS)),
    ],
)
def test_training_passes_no_padding_and_common_beginnings_once_through_a_wide_backbone(method, width, passed):
    name, options = (method, {}) if isinstance(method, str) else (method["name"], {"dropout": method["dropout"]})
    model = get_method(name).apply(tiny_backbone(hidden_size=width, num_hidden_layers=1), options)
    omega, theta = get_method(name).parameter_groups(model)
    engine = TorchEngine(model, GroupedAdamW(omega, theta), [*omega, *theta], accumulation=1, clip=1.0)
    engine.mode(training=True)
    batch, positions = a_batch(alike=2)
    seen = []
    model.get_input_embeddings().register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0].numel()))
    logits = engine.forward(positions, **batch)
    assert seen == [passed]
    if not options:
        torch.testing.assert_close(logits, padded_logits(model, positions, batch), rtol=1e-4, atol=1e-4)


def test_what_is_shared_leaves_each_row_a_token_of_its_prompt():
    batch = {"input_ids": torch.ones(3, 4, dtype=torch.long), "attention_mask": torch.ones(3, 4)}
    assert Packing.of({**batch, "prompt_lens": torch.tensor([4, 3, 2])}, share=True).shared == 1
    assert Packing.of({**batch, "prompt_lens": torch.tensor([4, 3, 1])}, share=True).shared == 0
    assert Packing.of(batch).saved == 0


def test_rows_of_several_jobs_share_beginnings_with_those_of_their_own_alone():
    model, (batch, positions) = adapted("lora"), a_batch(alike=2)
    packing = Packing.of(batch, share=True, rows=(2, 1, 1))
    assert packing.jobs == (
        JobOfBatch(slice(0, 2), slice(0, 12), 2),
        JobOfBatch(slice(2, 3), slice(12, 18), 0),
        JobOfBatch(slice(3, 4), slice(18, 21), 0),
    )
    wanted = with_gradients(model, padded_logits(model, positions, batch))
    assert_alike(with_gradients(model, packed_logits(model, packing, positions, batch)), wanted)
    in_pairs = Packing.of(batch, share=True, rows=(2, 2))
    assert (in_pairs.shared, len(in_pairs.places)) == (4, sum(LENGTHS) - 4)
    assert_alike(with_gradients(model, packed_logits(model, in_pairs, positions, batch)), wanted)


def test_numbers_that_one_job_has_lost_reach_no_other_jobs_vectors():
    packing = Packing.of(a_batch()[0], rows=(2, 1, 1))
    lost = packing.jobs[1]
    vectors = torch.arange(12.0).view(4, 3)
    vectors[lost.rows] = math.nan
    vectors.requires_grad_()
    spread = packing.spread(vectors)
    others = [token for token in range(len(packing.places)) if not lost.tokens.start <= token < lost.tokens.stop]
    assert spread[0, others].isfinite().all()
    weights = torch.ones_like(spread)
    weights[0, lost.tokens] = math.nan
    (into,) = torch.autograd.grad(spread, vectors, weights)
    assert torch.equal(into[[0, 1, 3], 0], torch.tensor(LENGTHS).float()[[0, 1, 3]])


def test_attention_of_a_bf16_backbone_is_computed_in_float32():
    model = tuned().to(torch.bfloat16)
    batch, positions = a_batch()
    exact = packed_logits(tuned(), Packing.of(batch), positions, batch)
    found = packed_logits(model, Packing.of(batch), positions, batch)
    padded = padded_logits(model, positions, batch)
    assert found.dtype == torch.bfloat16
    assert (found.float() - exact).abs().mean() <= 1.5 * (padded.float() - exact).abs().mean()
