"""PEDRO with `apply_to: answer`: the prompt is read bare but for its tail, which is scaled as the answer is."""

import pytest
import torch
from methods_models import randomize, tiny_backbone, tokens, tuned
from peft import PeftModel, get_peft_model
from test_methods_training import by_heart, recalled, train_on

from pedro import PedroConfig
from pedro.errors import ConfigError
from pedro.methods import get_method
from pedro.methods.architectures import describe

PROMPT, ANSWER = 7, 3
MODEL_TYPES = ("llama", "phi3", "gpt_neox", "gpt2", "gemma2")


def answer_side(tail=1, **options):
    return tuned(apply_to="answer", tail=tail, **options)


@torch.no_grad()
def slowly(adapter: dict[str, torch.Tensor], ids: torch.Tensor, prompt: int, tail: int) -> torch.Tensor:
    """The logits [T, V] of one row ids [T] on llama, from equations 6 and 7: the bare backbone reads the prompt up to
    its tail; what follows goes through its layers behind those keys and values, scaled."""
    bare, start = tiny_backbone(), max(0, prompt - tail)
    begun = bare(ids[None, :start], use_cache=True) if start else None
    handles = []
    for place in describe(bare).layers:
        down, up, bias, a, b = (adapter[f"{place.name}.modulation.pedro_{n}"] for n in ("down", "up", "bias", "a", "b"))
        vectors: dict[str, torch.Tensor] = {}

        def make(_block, args, kwargs, place=place, vectors=vectors, down=down, up=up, bias=bias, a=a, b=b):
            hidden = args[0] if args else kwargs["hidden_states"]
            x = place.norm(hidden[0, prompt - 1 - start]) @ down
            above = sum(a[j] * x**j for j in range(len(a)))
            below = 1 + sum(b[i] * x ** (i + 1) for i in range(len(b))).abs()
            sizes = [place.sites[target].width for target in ("q", "v", "up")]
            vectors.update(zip(("q", "v", "up"), ((above / below) @ up + bias).split(sizes), strict=True))

        handles.append(place.block.register_forward_pre_hook(make, with_kwargs=True))
        for target in ("q", "v", "up"):
            hook = lambda _m, _a, output, vectors=vectors, target=target: output * vectors[target]  # noqa: E731
            handles.append(place.sites[target].module.register_forward_hook(hook))
    rest = bare(ids[None, start:], past_key_values=begun.past_key_values if begun else None).logits[0]
    return torch.cat([begun.logits[0], rest]) if begun else rest


@torch.no_grad()
@pytest.mark.parametrize("tail", [1, 3, PROMPT, 50])
def test_logits_are_those_of_the_bare_prompt_and_a_scaled_rest_written_out(tail):
    model, ids = answer_side(tail), tokens(1, PROMPT + ANSWER)
    weights = {
        name.removeprefix("base_model.model.").removesuffix(".default"): p
        for name, p in model.named_parameters()
        if "pedro_" in name
    }
    made = model(ids, prompt_lens=torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(made, slowly(weights, ids[0], PROMPT, tail), atol=1e-4, rtol=1e-4)
    assert (made[PROMPT - 1] - tiny_backbone()(ids).logits[0, PROMPT - 1]).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("model_type", MODEL_TYPES)
@pytest.mark.parametrize("pool", ["last", "mean"])
def test_before_the_tail_a_row_is_the_bare_backbones_to_the_bit(model_type, pool):
    ids = tokens(2, PROMPT + ANSWER)
    made = answer_side(2, model_type=model_type, pool=pool)(ids, prompt_lens=torch.tensor([PROMPT, 4])).logits
    bare = tiny_backbone(model_type)(ids).logits
    for row, start in enumerate((PROMPT - 2, 2)):
        assert torch.equal(made[row, :start], bare[row, :start])
        assert (made[row, start:] - bare[row, start:]).abs().amax(-1).min() > 1e-3


@torch.no_grad()
def test_a_tail_as_long_as_the_prompt_is_what_pedro_does():
    ids, lens = tokens(2, PROMPT + ANSWER), torch.tensor([PROMPT, 4])
    assert torch.equal(answer_side(PROMPT)(ids, prompt_lens=lens).logits, tuned()(ids, prompt_lens=lens).logits)


@torch.no_grad()
@pytest.mark.parametrize("tail", [1, 3])
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_behind_left_padding_equals_reading_all_again(tail, beams):
    model = answer_side(tail)
    short, long = tokens(1, 4, seed=1)[0], tokens(1, 8, seed=2)[0]
    ids = torch.stack([torch.cat([short.new_zeros(4), short]), long])
    mask = (ids > 0).long()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}
    cached = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(input_ids=ids, attention_mask=mask, use_cache=False, **options))
    if beams == 1:
        for row, length in ((0, 4), (1, 8)):
            whole = cached[row, 8 - length :][None]
            logits = model(whole, prompt_lens=torch.tensor([length])).logits[0, length - 1 : -1]
            logits[:, 2] = float("-inf")  # what min_new_tokens forbids
            assert torch.equal(logits.argmax(-1), whole[0, length:])


def three():
    """One backbone with an adapter that scales all, and two that scale tails."""
    model = get_peft_model(
        tiny_backbone(), PedroConfig(task_type="CAUSAL_LM", apply_to="answer"), adapter_name="answer"
    )
    model.add_adapter("prompt", PedroConfig(task_type="CAUSAL_LM", r=4))
    longer = {"apply_to": "answer", "tail": 3, "targets": ("k", "gate", "up")}
    model.add_adapter("longer", PedroConfig(task_type="CAUSAL_LM", **longer))
    for seed, name in enumerate(("answer", "prompt", "longer")):
        randomize(model, seed, adapter=name)
    return model.eval()


@torch.no_grad()
def test_rows_of_one_batch_keep_the_sides_of_their_own_adapters():
    model, ids = three(), tokens(5, 8)
    names = ["prompt", "answer", "__base__", "longer", "answer"]
    together = model(ids, adapter_names=names, prompt_lens=torch.tensor([6, 5, 6, 6, 8])).logits
    for row, (name, length) in enumerate(zip(names, (6, 5, 6, 6, 8), strict=True)):
        alone = model(ids[row : row + 1], adapter_names=[name], prompt_lens=torch.tensor([length])).logits[0]
        torch.testing.assert_close(together[row], alone, atol=1e-5, rtol=1e-5)
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), adapter_names=names, **options)
    for row, name in enumerate(names):
        one = {"input_ids": ids[row : row + 1], "attention_mask": torch.ones_like(ids[:1])}
        assert torch.equal(made[row], model.generate(**one, adapter_names=[name], **options)[0])


@torch.no_grad()
def test_adapters_that_are_active_together_scale_each_its_own_tail():
    model, ids = three(), tokens(1, 8)
    made = {}
    for names in (["answer"], ["longer"], ["answer", "longer"]):
        model.base_model.set_adapter(names)
        made["+".join(names)] = model(ids, prompt_lens=torch.tensor([6])).logits[0]
    both, bare = made.pop("answer+longer"), tiny_backbone()(ids).logits[0]
    assert torch.equal(both[:3], bare[:3])
    assert (both[3:] - bare[3:]).abs().amax(-1).min() > 1e-3
    assert all((both[5:] - alone[5:]).abs().amax(-1).min() > 1e-3 for alone in made.values())
    kept = model(ids[:, :6], use_cache=True).past_key_values
    torch.testing.assert_close(model(ids[:, 6:], past_key_values=kept).logits[0], both[6:], atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_no_gradient():
    ids = tokens(2, PROMPT + ANSWER)
    labels = ids.masked_fill(torch.arange(PROMPT + ANSWER) < PROMPT, -100)
    gradients = []
    for on in (False, True):
        model = answer_side(2).train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids, labels=labels).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 15
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, msg=lambda m, n=name: f"{n}: {m}")


@torch.no_grad()
def test_it_is_trained_saved_and_loaded_as_any_other(tmp_path):
    rows = by_heart()
    with torch.enable_grad():
        model, _ = train_on("pedro", rows, steps=60, options={"apply_to": "answer", "tail": 2})
    assert recalled(model, rows) >= 0.9
    tiny = answer_side(3)
    ids, lens = tokens(), torch.tensor([6, 4])
    tiny.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_backbone(), tmp_path).eval()
    assert (again.peft_config["default"].apply_to, again.peft_config["default"].tail) == ("answer", 3)
    assert torch.equal(again(ids, prompt_lens=lens).logits, tiny(ids, prompt_lens=lens).logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"apply_to": "both"}, r"method\.apply_to: expected one of prompt, answer, got 'both'"),
        ({"apply_to": "answer", "tail": 0}, r"method\.tail: expected a whole number > 0, got 0"),
        ({"apply_to": "answer", "tail": 1.5}, r"method\.tail: expected a whole number > 0, got 1\.5"),
        ({"apply_to": "answer", "tail": True}, r"method\.tail: expected a whole number > 0, got True"),
        ({"tail": 3}, r"method\.tail: expected 1 with apply_to: prompt, which has none, got 3"),
    ],
)
def test_a_wrong_side_or_tail_is_named(options, message):
    with pytest.raises(ConfigError, match=message):
        get_method("pedro").config(tiny_backbone().config, options)
