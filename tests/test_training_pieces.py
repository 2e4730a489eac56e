"""Workers of ZeRO-3 read pieces of a backbone: together they are the backbone, and nothing else passes for it."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from training_runs import spec_for

from pedro.backbone import load_model, resolve_backbone
from pedro.errors import BackboneError
from pedro.training import context
from pedro.training.backbone_pieces import Piece, can_be_cut, fill
from pedro.training.ds_config import BUCKET, deepspeed_config
from pedro.training.frozen_linear import ShardedLinear
from pedro.training.memory import Sizes, training_memory

WEIGHTS = "model.safetensors"
SIZES = {"precision": "fp32", "full": False, "tokens": 10, "answer_tokens": 2, "gradient_checkpointing": False}


def pieces(shapes, rank, world):
    """Empty pieces as ZeRO-3 cuts them: equal runs, the last of them padded."""
    for name, shape in shapes.items():
        width = -(-math.prod(shape) // world)
        yield Piece(name, math.prod(shape), rank * width, torch.full((width,), 7.0))


@pytest.fixture
def copied(tmp_path):
    """A backbone of its own, and what changes its weights."""
    directory = tmp_path / "backbone"
    shutil.copytree(resolve_backbone("stories260K").directory, directory)

    def change(act):
        tensors = load_file(directory / WEIGHTS)
        act(tensors)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        return resolve_backbone(str(directory))

    return change


@pytest.mark.parametrize("name", ["stories260K", "pedro-nano"])  # in float32 and in bfloat16
def test_the_pieces_of_all_workers_are_the_backbone(name):
    backbone = resolve_backbone(name)
    assert can_be_cut(backbone)
    wanted = {name: parameter.detach() for name, parameter in load_model(backbone).named_parameters()}
    shapes = {name: parameter.shape for name, parameter in wanted.items()}
    workers = [list(pieces(shapes, rank, 3)) for rank in range(3)]
    for worker in workers:
        fill(backbone, worker)
    for name, *parts in zip(wanted, *workers, strict=True):
        whole = torch.cat([part.numbers for part in parts])
        assert torch.equal(whole[: wanted[name].numel()].view_as(wanted[name]), wanted[name]), name
        assert (whole[wanted[name].numel() :] == 7.0).all(), "padding is nobody's"


def test_a_backbone_saved_without_its_head_is_cut_too(copied):
    def shorten(tensors):
        for name in [name for name in tensors if name.startswith("model.")]:
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    assert can_be_cut(copied(shorten))


@pytest.mark.parametrize(
    "act",
    [
        lambda tensors: tensors.update(more=torch.zeros(2)),
        lambda tensors: tensors.pop("model.norm.weight"),
        lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
        lambda tensors: tensors.update({"model.norm.weight": tensors["model.norm.weight"].to(torch.int32)}),
    ],
    ids=["one more", "one less", "another shape", "whole numbers"],
)
def test_files_that_hold_other_tensors_than_the_model_are_loaded_whole(copied, act):
    backbone = copied(act)
    assert not can_be_cut(backbone)
    with pytest.raises(BackboneError, match="changed while they were read"):
        fill(backbone, [])


def test_a_number_that_is_not_finite_is_refused_by_whoever_reads_it(copied):
    def spoil(tensors):
        tensors["model.norm.weight"][-1] = math.nan

    backbone = copied(spoil)
    shapes = {"model.norm.weight": (64,)}
    fill(backbone, pieces(shapes, 0, 2))
    with pytest.raises(BackboneError, match=r"model\.norm\.weight that are not finite"):
        fill(backbone, pieces(shapes, 1, 2))


def test_stage_3_counts_a_share_of_the_backbone_and_the_one_tensor_that_is_whole():
    def count(stage, largest, **more):
        sizes = Sizes(8, 2, 100, largest)
        return training_memory(sizes, frozen=1001, trainable=10, workers=2, zero_stage=stage, **SIZES, **more)

    assert count(2, 300)["backbone"] == 4 * 1001
    assert (count(3, 300)["backbone"], count(3, 300)["gathered"]) == (4 * 501, 4 * 300)
    assert count(3, 300, on_gpu=True)["gathered"] == 4 * 1011, "DeepSpeed keeps a billion, or all"
    assert count(3, 0)["backbone"] == 4 * 1001, "each loads all of what cannot be read in pieces"
    assert "gathered" not in count(3, 0)


def test_gradient_checkpointing_counts_one_block_whole_and_the_inputs_of_all():
    sizes = Sizes(hidden_size=8, num_layers=2, vocab_size=100, largest=300, block=500)

    def count(**more):
        return training_memory(sizes, frozen=1001, trainable=10, workers=2, zero_stage=3, **{**SIZES, **more})

    kept, repeated = count(), count(gradient_checkpointing=True)
    assert (kept["gathered"], repeated["gathered"]) == (4 * 300, 4 * 500)
    logits = 2 * 2 * 4 * 100
    assert kept["activations"] - logits == 10 * 8 * 4 * 2 * 17
    assert repeated["activations"] - logits == 10 * 8 * 4 * (2 + 17)


@pytest.mark.parametrize(
    ("method", "resources", "precision", "engine"),
    [
        ("pedro", {}, "bf16", "torch"),
        ("full", {}, "fp32", "torch"),
        ("full", {}, "bf16", "deepspeed"),  # float32 masters
        ("pedro", {"workers": 2}, "fp32", "deepspeed"),
        ("pedro", {"zero_stage": 1}, "fp32", "deepspeed"),
    ],
)
def test_deepspeed_trains_where_there_is_work_for_it(tmp_path, monkeypatch, method, resources, precision, engine):
    for name in ("torch", "deepspeed"):
        monkeypatch.setattr(context, f"{name}_engine", lambda spec, name=name: name)
    assert context.engine_for(spec_for(tmp_path, method, resources, precision=precision)) == engine


def test_on_a_cpu_no_tensor_is_whole_for_longer_than_it_is_used():
    common = {"slice_rows": 1, "accumulation": 1, "world": 2, "zero_stage": 3, "clip": 1.0, "bf16_masters": False}
    assert deepspeed_config(**common)["zero_optimization"]["stage3_max_reuse_distance"] == 0
    assert "stage3_max_reuse_distance" not in deepspeed_config(**common, on_gpu=True)["zero_optimization"]


@pytest.mark.parametrize(
    ("trained", "bucket"), [([30, 10], 40), ([10**7] * 9, BUCKET), ([10**8, 1], 10**8)], ids=["small", "many", "large"]
)
def test_what_is_set_aside_for_gradients_is_as_much_as_there_are(trained, bucket):
    common = {"slice_rows": 1, "accumulation": 1, "world": 2, "clip": 1.0, "bf16_masters": False}
    for stage in (1, 2, 3):
        made = deepspeed_config(**common, zero_stage=stage, trained=trained)
        assert made["zero_optimization"]["reduce_bucket_size"] == bucket


class Shard(torch.nn.Parameter):
    """A parameter as DeepSpeed's ZeRO-3 has it: whole only between `all_gather` and `partition`."""

    def __new__(cls, numbers, requires_grad):
        made = super().__new__(cls, numbers.clone(), requires_grad=requires_grad)
        made.ds_id, made.numbers, made.ds_status = 0, numbers, SimpleNamespace(name="AVAILABLE")
        return made

    def all_gather(self):
        self.data, self.ds_status.name = self.numbers.clone(), "AVAILABLE"

    def partition(self):
        self.data, self.ds_status.name = torch.empty(0), "NOT_AVAILABLE"


@pytest.mark.parametrize("trained", [False, True])
def test_a_frozen_sharded_linear_layer_keeps_nothing_and_gives_the_same_gradient(trained):
    torch.manual_seed(0)
    x, bias = torch.randn(2, 3, 4, requires_grad=True), torch.randn(5)
    weight = Shard(torch.randn(5, 4), requires_grad=trained)
    plain, kept = functional.linear, []
    plain(x, weight.numbers, bias).square().sum().backward()
    wanted, x.grad = x.grad, None
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        made = ShardedLinear(plain)(x, weight, bias)
    if trained:
        assert kept
        made.square().sum().backward()
        assert weight.grad is not None
        return
    assert not kept
    weight.partition()  # as after the forward pass
    made.square().sum().backward()
    assert torch.equal(x.grad, wanted)
    assert weight.ds_status.name == "NOT_AVAILABLE", "it was gathered for the backward pass alone"
