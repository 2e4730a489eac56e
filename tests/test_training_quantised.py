"""Backbones in 8 and 4 bit: what is held, what is computed with it, what is trained over it, and what is refused."""

from functools import cache

import pytest
import torch
from methods_models import tiny_backbone, tokens
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional
from training_runs import (
    DiesAfterCheckpoint,
    Interrupted,
    context_for,
    dpo_spec_for,
    parameters,
    run,
    same,
    spec_for,
    write_rows,
)
from transformers.pytorch_utils import Conv1D

from pedro import quantised_linear
from pedro.adapter_directory import read_manifest
from pedro.backbone import load_model, resolve_backbone
from pedro.comparison.spec import ComparisonSpec
from pedro.evaluation.saved import backbone_of
from pedro.evaluation.scoring import score
from pedro.methods import METHODS, get_method
from pedro.quantised_linear import (
    BLOCK,
    QuantisedConv1D,
    QuantisedLinear,
    QuantisedProjection,
    held_bytes,
    hold_weight,
    quantised,
    whole_weight,
)
from pedro.training import quantised_load
from pedro.training.batches import tensors
from pedro.training.context import build_context
from pedro.training.cotraining.engine import SharedBackbone
from pedro.training.estimate import dry_run
from pedro.training.loop import train
from pedro.training.quantised_check import PEFT_TYPES, READING, must_be_whole
from pedro.training.quantised_load import footprint, load_quantised, projections
from pedro.training.worker import save, score_directory, train_and_score

KINDS = quantised_linear.KINDS
NF4 = [  # Dettmers et al. 2023, appendix E
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
]
SHORT = {"max_steps": 4, "eval_every": 2}
WIDER = {"hidden_size": 96, "intermediate_size": 128}
OPTIONS = {
    "lpt": {"tokens": 4, "r": 8},
    "loretta": {"r": 16},
    "peft": {"peft_type": "VERA", "r": 4},
}
PEFT_OPTIONS = {"PROMPT_TUNING": {"num_virtual_tokens": 2}, "PREFIX_TUNING": {"num_virtual_tokens": 2}}
PEFT_OPTIONS |= {"P_TUNING": {"num_virtual_tokens": 2}, "VBLORA": {"vector_length": 16, "num_vectors": 8, "r": 2}}
PEFT_OPTIONS |= {"FOURIERFT": {"n_frequency": 20}, "RANDLORA": {"r": 4}}


def slow_reference(weight, kind):
    """What is left of a weight: number by number, as the papers have it."""
    rows, columns = weight.shape
    flat = weight.float().flatten().tolist()
    if kind == "int8":
        scales = [max(abs(x) for x in flat[row * columns : (row + 1) * columns]) / 127 for row in range(rows)]
        return torch.tensor([round(x / scales[at // columns]) * scales[at // columns] for at, x in enumerate(flat)])
    kept = []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK]
        most = max(abs(x) for x in block)
        kept += [min(NF4, key=lambda level: abs(x / most - level)) * most for x in block]
    return torch.tensor(kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(8, 64), (6, 48), (5, 96), (3, 7), (12, 172), (64, 32)])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_held_is_what_the_papers_say_whatever_the_shape(kind, shape, dtype):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)
    held = hold_weight(weight, kind)
    whole = whole_weight(held, shape, kind, torch.float32)
    assert whole.shape == shape
    far, least = ((one - weight.float().flatten()).abs() for one in (whole.flatten(), slow_reference(weight, kind)))
    torch.testing.assert_close(far, least, rtol=1e-4, atol=1e-6)  # of two levels that are equally near either will do
    assert all(part.is_contiguous() for part in held)
    assert sum(part.numel() * part.element_size() for part in held) == held_bytes(shape, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_quantised_in_parts_and_rows_of_zeros_stay_zeros(kind, monkeypatch):
    weight = torch.randn(8, 96)
    weight[3] = 0
    whole = hold_weight(weight, kind)
    monkeypatch.setattr(quantised_linear, "AT_ONCE", 2)
    for part, other in zip(hold_weight(weight, kind), whole, strict=True):
        assert torch.equal(part, other)
    assert (whole_weight(whole, (8, 96), kind, torch.float32)[3] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("form", ["linear", "linear without bias", "conv1d"])
@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_gradients_are_those_of_the_weight_that_was_read_back(kind, form, dtype):
    torch.manual_seed(0)
    plain = Conv1D(48, 32) if form == "conv1d" else nn.Linear(32, 48, bias=form == "linear")
    plain.to(dtype).requires_grad_(False)
    held = quantised(plain, kind)
    assert isinstance(held, QuantisedConv1D if form == "conv1d" else QuantisedLinear)
    assert isinstance(held, type(plain)), "so that PEFT takes it for what it stands for"
    assert held.weight.shape == plain.weight.shape
    assert held.weight.dtype == dtype
    weight = held.weight.T if form == "conv1d" else held.weight
    x, slow = (torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1)).to(dtype) for _ in range(2))
    x.requires_grad_(True)
    slow.requires_grad_(True)
    if held.bias is not None:
        held.bias.requires_grad_(True)
    made, wanted = held(x), functional.linear(slow, weight, plain.bias)
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    torch.testing.assert_close(made, wanted, **close)
    back = torch.randn_like(made)
    made.backward(back)
    (slow_gradient,) = torch.autograd.grad(wanted, slow, back)
    torch.testing.assert_close(x.grad, slow_gradient, **close)
    assert held.numbers.grad is None
    assert held.scales.grad is None
    if held.bias is not None:
        torch.testing.assert_close(held.bias.grad, back.sum((0, 1)), **close)


@pytest.mark.parametrize("readable", [True, False], ids=["tensor by tensor", "whole first"])
@pytest.mark.parametrize(("name", "kind"), [("stories260K", "nf4"), ("pedro-nano", "int8")])
def test_projections_are_quantised_and_nothing_else(name, kind, readable, monkeypatch):
    backbone = resolve_backbone(name)
    plain = load_model(backbone)
    if not readable:
        monkeypatch.setattr(quantised_load, "can_be_cut", lambda _: False)
    model = load_quantised(backbone, "float32", kind, "cpu")
    chosen = projections(plain)
    assert len(chosen) == 7 * plain.config.num_hidden_layers
    assert [n for n, m in model.named_modules() if isinstance(m, QuantisedProjection)] == chosen
    for path in chosen:
        weight = plain.get_submodule(path).weight
        wanted = whole_weight(hold_weight(weight, kind), tuple(weight.shape), kind, torch.float32)
        assert torch.equal(model.get_submodule(path).weight, wanted), path
    others = {n: p for n, p in plain.named_parameters() if n.removesuffix(".weight") not in chosen}
    kept = dict(model.named_parameters())
    assert "model.embed_tokens.weight" in others
    assert all(torch.equal(kept[n], p) for n, p in others.items())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    ids = torch.arange(5, 15)[None]
    slow = plain
    for path in chosen:
        slow.get_submodule(path).weight.data = model.get_submodule(path).weight
    torch.testing.assert_close(model(ids).logits, slow(ids).logits, rtol=1e-4, atol=1e-4)


def test_a_float_weight_is_gone_before_the_next_one_is_quantised(monkeypatch):
    """The peak is never the float model beside the quantised one."""
    weights, alive = [], []

    take = QuantisedProjection._take

    def watch(self, weight, bias, kind):
        alive.append(sum(not one.expired() for one in weights))
        weights.append(StorageWeakRef(weight.untyped_storage()))
        take(self, weight, bias, kind)

    monkeypatch.setattr(QuantisedProjection, "_take", watch)
    model = load_quantised(resolve_backbone("stories260K"), "float32", "nf4", "cpu")
    assert len(alive) == 7 * model.config.num_hidden_layers
    assert max(alive) == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_dry_run_counts_the_bytes_that_the_job_then_has(tmp_path, kind, precision):
    spec = spec_for(tmp_path, "lora", precision=precision, backbone_dtype=kind)
    report = dry_run(spec, calibrated=False)
    context = context_for(spec, tmp_path)
    frozen = [p for p in context.model.parameters() if not p.requires_grad]
    assert report.memory_bytes["backbone"] == sum(p.numel() * p.element_size() for p in frozen)
    plain = dry_run(spec_for(tmp_path, "lora", precision=precision), calibrated=False)
    assert report.memory_bytes["backbone"] < plain.memory_bytes["backbone"]
    assert report.memory_bytes["activations"] > plain.memory_bytes["activations"], "a projection that is whole"
    assert (report.backbone_parameters, report.trainable_parameters) == (
        plain.backbone_parameters, plain.trainable_parameters,
    )  # fmt: skip
    assert {p.dtype for _, p in context.engine.parameters} == {torch.float32}
    plain_model = load_model(context.backbone, "float32" if precision == "fp32" else "bfloat16")
    assert context.model.config._attn_implementation == plain_model.config._attn_implementation


def test_large_projections_take_an_eighth_and_a_quarter():
    model = tiny_backbone(hidden_size=256, intermediate_size=512)
    count = sum(model.get_submodule(name).weight.numel() for name in projections(model))
    rest = sum(p.numel() for p in model.parameters()) - count
    for kind, share in (("int8", 0.25), ("nf4", 0.125)):
        held = footprint(model, kind, 4)
        assert held.total - 4 * rest == pytest.approx(share * 4 * count, rel=0.13), "and scales"
        assert held.whole == 4 * 256 * 512


@cache
def whole_run(folder, method, kind):
    context = context_for(spec_for(folder, method, backbone_dtype=kind, **SHORT), folder)
    outcome = run(context, folder / f"{method}-{kind}")
    return outcome, parameters(context)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("quantised")
    write_rows(folder / "train.jsonl")
    return folder


@pytest.mark.parametrize(("method", "kind"), [("pedro", "nf4"), ("pedro", "int8"), ("lora", "nf4")])
def test_training_is_that_over_the_weights_that_were_read_back(folder, method, kind):
    """The slow reference: the same run over a float backbone of the numbers that are left."""
    outcome, values = whole_run(folder, method, kind)
    spec = spec_for(folder, method, **SHORT)
    backbone = resolve_backbone(spec.backbone)
    plain, held = load_model(backbone), load_quantised(backbone, "float32", kind, "cpu")
    for path in projections(plain):
        plain.get_submodule(path).weight.data = held.get_submodule(path).weight
    context = build_context(spec, folder / "cache", bare=plain)
    wanted = run(context, folder / f"slow-{method}-{kind}")
    losses, others = ([loss for _, loss in one.validations] for one in (outcome, wanted))
    assert losses == pytest.approx(others, rel=1e-4)
    assert losses[-1] < losses[0], "it learns"
    for name, value in parameters(context).items():
        torch.testing.assert_close(values[name], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(folder, kind, tmp_path):
    outcome, values = whole_run(folder, "pedro", kind)
    spec = spec_for(folder, backbone_dtype=kind, **SHORT)
    cut = context_for(spec, folder)
    with pytest.raises(Interrupted):
        train(cut.engine, cut.alternation, cut.plan, cut.data, DiesAfterCheckpoint(tmp_path, 2))
    resumed = context_for(spec, folder)
    again = run(resumed, tmp_path)
    assert again.validations == outcome.validations
    assert same(parameters(resumed), values)


def reads(monkeypatch):
    """Counts whose weights are read back but for the product."""
    found = []
    plain = QuantisedLinear.weight.fget
    monkeypatch.setattr(QuantisedLinear, "weight", property(lambda self: found.append(self) or plain(self)))
    return found


def step_over(method, options, monkeypatch):
    """One forward and backward pass of a fresh adapter; how many weights were read meanwhile."""
    model = tiny_backbone(**WIDER)
    for name in projections(model):
        model.set_submodule(name, quantised(model.get_submodule(name), "nf4"))
    model = get_method(method).apply(model, options)
    model.train()
    rows = [{"input_ids": ids, "prompt_len": 4} for ids in tokens(2, 9).tolist()]
    batch = tensors(rows, pad_id=0, device="cpu", filler=rows[0])
    del batch["labels"]
    found = reads(monkeypatch)
    model(**batch, use_cache=False).logits.square().mean().backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert trained
    assert all(p.is_floating_point() for p in trained)
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in trained), "a gradient came through"
    return len(found)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_leaves_the_weights_alone_or_is_refused(name, monkeypatch):
    options = OPTIONS.get(name, {})
    if must_be_whole("nf4", name, options):
        assert name == "full" or step_over(name, options, monkeypatch) > 0
    else:
        assert step_over(name, options, monkeypatch) == 0


def test_methods_that_read_weights_are_those_that_say_so():
    assert {name for name, method in METHODS.items() if method.reads_weights} == set(READING)


@pytest.mark.parametrize("peft_type", PEFT_TYPES)
def test_the_types_of_peft_that_are_taken_leave_the_weights_alone(peft_type, monkeypatch):
    options = {"peft_type": peft_type, **PEFT_OPTIONS.get(peft_type, {})}
    assert not must_be_whole("nf4", "peft", options)
    assert step_over("peft", options, monkeypatch) == 0


@pytest.mark.parametrize(
    ("method", "resources", "said"),
    [
        (
            "full",
            {},
            "nf4: method full trains the weights themselves; take an adapter's method, or leave backbone_dtype",
        ),
        ("gift", {}, "nf4: method gift computes with the backbone's whole weights at every step; take another method"),
        ({"peft_type": "BOFT"}, {}, "nf4: method.peft_type BOFT is not among those that leave the weights alone"),
        ({"peft_type": "LORA", "use_dora": True}, {}, "method.use_dora computes with"),
        ({"peft_type": "MISS", "init_weights": "bat"}, {}, "method.init_weights bat computes with"),
        ({"peft_type": "LORA", "modules_to_save": ["lm_head"]}, {}, "method.modules_to_save trains"),
        ("pedro", {"zero_stage": 3}, "resources.zero_stage 3 cuts each weight in pieces, .* use at most 2"),
    ],
)
def test_what_cannot_train_so_is_refused_with_the_spec(tmp_path, method, resources, said):
    with pytest.raises(ValueError, match=f"training.backbone_dtype: .*{said}"):
        spec_for(tmp_path, method, resources, backbone_dtype="nf4")
    spec_for(tmp_path, method, resources)  # is not refused without it


def test_another_dtype_is_refused(tmp_path):
    with pytest.raises(ValueError, match="backbone_dtype"):
        spec_for(tmp_path, backbone_dtype="fp4")


def test_a_comparison_refuses_it_method_by_method():
    fields = {"name": "c", "backbones": ["stories260K"], "tasks": ["snips"], "methods": ["pedro", "backbone"]}
    fields["training"] = {"backbone_dtype": "int8"}
    ComparisonSpec.model_validate(fields)
    with pytest.raises(ValueError, match=r"methods\.Full fine-tuning: training\.backbone_dtype: int8: method full"):
        ComparisonSpec.model_validate({**fields, "methods": ["pedro", "full"]})


def test_specs_without_it_are_what_they_were(tmp_path):
    assert "backbone_dtype" not in spec_for(tmp_path).to_dict()["training"]
    told = spec_for(tmp_path, backbone_dtype="int8").to_dict()
    assert told["training"]["backbone_dtype"] == "int8"
    assert type(spec_for(tmp_path)).model_validate(told).training.backbone_dtype == "int8"


@pytest.mark.parametrize("make", [spec_for, dpo_spec_for], ids=["answers", "preferences"])
def test_scores_the_gates_too_are_those_of_the_quantised_backbone(tmp_path, make, monkeypatch):
    spec = make(tmp_path, "lora", backbone_dtype="nf4", max_steps=3)
    spec = spec.model_copy(update={"gate": spec.gate.model_copy(update={"max_rows": 6})})
    context = context_for(spec, tmp_path)

    class Quiet:
        resume = checkpoint = metrics = line = lambda self, *_: None

    trained = train_and_score(context, Quiet())
    save(context, trained, tmp_path / "adapter")
    manifest = read_manifest(tmp_path / "adapter")
    assert manifest["spec"]["training"]["backbone_dtype"] == "nf4"
    name = "accuracy" if spec.beta is None else "preference_accuracy"
    for unload in (True, False):  # on the context's own backbone, and on one that is loaded again
        if not unload:
            monkeypatch.setattr("pedro.training.worker.backbone_of", lambda _: None)
            context = context_for(spec, tmp_path)
        again = score_directory(context, tmp_path / "adapter")
        assert (again.loss, again.accuracy) == pytest.approx((trained.metrics["loss"], trained.metrics[name]), rel=1e-4)
    if spec.beta is None:
        held = load_quantised(context.backbone, "float32", "nf4", "cpu")
        rows = list(context.scored_rows()[1])
        assert score(held, context.tokenizer, rows).loss == pytest.approx(trained.metrics["backbone_loss"], rel=1e-4)
        float_loss = score(load_model(context.backbone), context.tokenizer, rows).loss
        assert abs(float_loss - trained.metrics["backbone_loss"]) > 1e-4, "it is another model"


def test_an_adapter_that_is_taken_off_leaves_the_quantised_backbone(tmp_path):
    context = context_for(spec_for(tmp_path, backbone_dtype="int8"), tmp_path)
    bare = backbone_of(context.model)
    assert bare is not None
    assert sum(isinstance(module, QuantisedProjection) for module in bare.modules()) == len(projections(bare))


def test_gpt2_is_quantised_with_its_own_kind_of_linear():
    model = tiny_backbone("gpt2")
    ids = tokens(2, 9)
    for name in projections(model):
        held = quantised(model.get_submodule(name), "int8")
        assert isinstance(held, QuantisedConv1D), name
        model.get_submodule(name).weight.data = held.weight
    wanted = model(ids).logits
    for name in projections(model):
        model.set_submodule(name, quantised(model.get_submodule(name), "int8"))
    torch.testing.assert_close(model(ids).logits, wanted, rtol=1e-3, atol=1e-3)
    tuned = get_method("lora").apply(model)
    assert tuned.peft_config["default"].fan_in_fan_out is True, "as without"


def test_jobs_that_share_a_worker_share_the_held_weights(tmp_path):
    spec = spec_for(tmp_path, "lora", {"share": True}, backbone_dtype="nf4")
    shared = SharedBackbone(spec)
    one, other = (
        shared.context(spec, tmp_path / "cache", participant)
        for participant in (type("Place", (), {"number": number})() for number in range(2))
    )
    places = [
        {n: p.data_ptr() for n, p in c.model.named_parameters() if n.endswith((".numbers", ".scales"))}
        for c in (one, other)
    ]
    assert places[0]
    assert places[0] == places[1]
