"""Every adapter kind that the engine serves, all in one batch, equals the PEFT model that carries it alone."""

import copy
import re
from pathlib import Path

import pytest
import torch
from engine_models import DIGEST, make_adapter, make_engine, prompt, random_backbone, reference_logits, request, run
from peft import LoraConfig, get_peft_model

from pedro import engine as engine_package
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.errors import AdapterError
from pedro.methods.adapter_files import save_adapter
from pedro.methods.servable import read_adapter

KINDS = {
    "pedro": ("pedro", {}),
    "mean": ("pedro-1", {}),
    "para": ("para", {}),
    "ia3": ("ia3", {}),
    "ia3-r": ("ia3", {"r": 4}),
    "red": ("red", {}),
    "bitfit": ("bitfit", {}),
    "lora": ("lora", {"r": 4}),
    "lora-wide": ("lora", {"r": 20}),
    "adalora": ("adalora", {"r": 6, "target_r": 3}),
    "ssp": ("ssp", {"r": 4}),
    "melora": ("melora", {"r": 3, "n": 2}),
    "lora-dash": ("lora-dash", {"r": 4, "directions": 3}),
    "lorta": ("lorta", {"r": 8}),
    "miss": ("miss", {"r": 5}),  # a divisor of no width
    "loreft": ("loreft", {"positions": "f2+l1"}),
    "direft": ("loreft", {"direct": True, "shared": False, "positions": "f1+l2", "layers": [0, 2]}),
    "grouped": ("pedro", {"group_size": "head", "pool": "mean", "window": 3}),
    "by-layer": ("pedro", {"r": [4, 6, 12], "orders": [[4, 3], [6, 5], [2, 2]]}),
}
STAY = ("lora", "adalora", "ssp", "melora", "lora-dash", "lorta", "miss", "loreft")
BACKBONES = {
    "llama": ("native", "torch"),
    "qwen2": ("native",),  # its q, k and v have biases
    "qwen3": ("native",),  # norms q and k by head
    "gemma": ("native",),
    "phi3": ("native", "torch"),  # fused projections
    "gemma2": ("torch",),
    "gpt_neox": ("torch",),  # fused by head
    "gpt2": ("torch",),
}
CASES = [(kind, kernel) for kind, kernels in BACKBONES.items() for kernel in kernels]
UNSERVED = {("gpt2", "ia3"), ("gpt_neox", "ia3"), ("gpt2", "miss")}  # ungated MLPs; of PEFT for linear layers alone


@pytest.mark.parametrize(("model_type", "kernel"), CASES)
def test_all_kinds_in_one_batch_equal_each_alone(model_type, kernel, tmp_path):
    model = random_backbone(model_type)
    runner = Runner(copy.deepcopy(model), slots=20, length=64, kernel=kernel)
    assert runner.kernel == kernel
    rows, references = [], []
    for number, (name, (method, options)) in enumerate(KINDS.items()):
        if (model_type, name) in UNSERVED:
            continue
        tuned = make_adapter(model, tmp_path / name, seed=number, method=method, **options)
        bare, made = (reference_logits(m, prompt(7), 7) for m in (model, tuned))
        assert (made - bare).abs().max() > 0.01, f"{name} has an effect to compare"
        adapter = read_adapter(tmp_path / name, runner.architecture, DIGEST, runner.device, runner.simd_width)
        assert adapter.must_stay == (method in STAY)
        ids = prompt(5 + number, number)
        rows.append(PrefillRow(number, ids, len(ids), adapter))
        references.append(tuned)
    rows.append(PrefillRow(19, prompt(6), 6))
    references.append(model)
    runner.begin(rows)
    for until in (1, 9, 20, None):
        runner.advance(until)
    logits, _ = runner.end()
    tokens = [list(row.token_ids) for row in rows]
    for step in range(4):
        for row, reference, ids, got in zip(rows, references, tokens, logits.values, strict=True):
            wanted = reference_logits(reference, ids, len(row.token_ids))[-1]
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4, msg=lambda m, r=row: f"{r.slot}: {m}")
        for number, ids in enumerate(tokens):
            ids.append((11 * number + 5 * step) % 90 + 2)
        steps = [DecodeRow(row.slot, ids[-1], len(ids) - 1) for row, ids in zip(rows, tokens, strict=True)]
        logits = runner.decode(steps)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_a_slot_forgets_the_kind_it_held(kernel, tmp_path):
    model = random_backbone("llama")
    runner = Runner(copy.deepcopy(model), slots=1, length=64, kernel=kernel)
    order = ["lora", "red", "pedro", "loreft", "bitfit", "ia3", None, "loreft", "lora"]
    for number, name in enumerate(order):
        reference, adapter = model, None
        if name is not None:
            directory = tmp_path / str(number)
            reference = make_adapter(model, directory, seed=number, method=KINDS[name][0], **KINDS[name][1])
            adapter = read_adapter(directory, runner.architecture, DIGEST, runner.device, runner.simd_width)
        ids = prompt(6, number)
        runner.begin([PrefillRow(0, ids, len(ids), adapter)])
        runner.advance()
        first, _ = runner.end()
        torch.testing.assert_close(first.values[0], reference_logits(reference, ids, 6)[-1], atol=1e-4, rtol=1e-4)
        then = runner.decode([DecodeRow(0, 17, 6)])
        wanted = reference_logits(reference, [*ids, 17], 6)[-1]
        torch.testing.assert_close(then.values[0], wanted, atol=1e-4, rtol=1e-4)
        runner.release(0)


@pytest.mark.parametrize("kernel", ["native", "torch"])
@pytest.mark.parametrize("name", ["pedro", "red", "lora", "loreft"])
def test_what_a_preempted_request_saved_stands_in_for_its_adapter(name, kernel, tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", seed=1, method=KINDS[name][0], **KINDS[name][1])
    runner = Runner(copy.deepcopy(model), slots=3, length=64, kernel=kernel)
    adapter = read_adapter(tmp_path / "a", runner.architecture, DIGEST, runner.device, runner.simd_width)
    ids = prompt(9)
    runner.begin([PrefillRow(0, ids, 5, adapter)])
    runner.advance()
    runner.end()
    saved = runner.save_state(0)
    runner.release(0)
    runner.begin([PrefillRow(0, prompt(4), 4), PrefillRow(2, [*ids, 33], 5, preempted_state=saved)])
    runner.advance()
    logits, _ = runner.end()
    torch.testing.assert_close(logits.values[1], reference_logits(tuned, [*ids, 33], 5)[-1], atol=1e-4, rtol=1e-4)
    runner.copy(2, [1], len(ids) + 1)
    made = runner.decode([DecodeRow(1, 40, len(ids) + 1), DecodeRow(0, 8, 4)])
    wanted = reference_logits(tuned, [*ids, 33, 40], 5)[-1]
    torch.testing.assert_close(made.values[0], wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_a_bare_copy_into_a_slot_that_held_an_adapter_is_bare(kernel, tmp_path):
    model = random_backbone("llama")
    tuned = make_adapter(model, tmp_path / "a", seed=1)
    runner = Runner(copy.deepcopy(model), slots=3, length=64, kernel=kernel)
    adapter = read_adapter(tmp_path / "a", runner.architecture, DIGEST, runner.device, runner.simd_width)
    ids = prompt(9)
    for rows in ([PrefillRow(1, prompt(5), 5, adapter), PrefillRow(2, ids, 9, adapter)], [PrefillRow(0, ids, 9)]):
        runner.begin(rows)
        runner.advance()
        runner.end()
    runner.release(1)
    runner.copy(0, [1], 9)
    made = runner.decode([DecodeRow(slot, 40, 9) for slot in range(3)])
    for got, reference in zip(made.values, (model, model, tuned), strict=True):
        torch.testing.assert_close(got, reference_logits(reference, [*ids, 40], 9)[-1], atol=1e-4, rtol=1e-4)


def test_an_adapter_whose_form_is_not_served_is_refused_by_name(tmp_path):
    model = random_backbone("llama")
    dora = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    save_adapter(dora, tmp_path / "dora", {"backbone": {"id": "test", "digest": DIGEST}, "method": {"name": "dora"}})
    make_adapter(model, tmp_path / "houlsby", seed=1, method="houlsby")
    runner = Runner(copy.deepcopy(model), slots=1, length=16)
    for name, why in (("dora", "use_dora"), ("houlsby", "PEDRO, PARA")):
        with pytest.raises(AdapterError, match=why):
            read_adapter(tmp_path / name, runner.architecture, DIGEST, runner.device, runner.simd_width)
    gpt2 = random_backbone("gpt2")
    make_adapter(gpt2, tmp_path / "ia3", seed=1, method="ia3")
    runner = Runner(copy.deepcopy(gpt2), slots=1, length=16)
    with pytest.raises(AdapterError, match="without a gate"):
        read_adapter(tmp_path / "ia3", runner.architecture, DIGEST, runner.device, runner.simd_width)


@pytest.mark.parametrize("inputs", [["down_proj"], []])
def test_ia3_of_peft_on_any_projection_equals_its_model(inputs, tmp_path):
    model = random_backbone("llama")
    options = {"target_modules": ["q_proj", "up_proj", "down_proj"], "feedforward_modules": inputs}
    tuned = make_adapter(model, tmp_path / "ia3", seed=1, method="peft", peft_type="IA3", **options)
    runner = Runner(copy.deepcopy(model), slots=1, length=16)
    adapter = read_adapter(tmp_path / "ia3", runner.architecture, DIGEST, runner.device, runner.simd_width)
    runner.begin([PrefillRow(0, prompt(7), 7, adapter)])
    runner.advance(None)
    logits, _ = runner.end()
    torch.testing.assert_close(logits.values[0], reference_logits(tuned, prompt(7), 7)[-1], atol=1e-4, rtol=1e-4)


def test_ia3_on_the_input_of_another_projection_is_refused_by_its_name(tmp_path):
    model = random_backbone("llama")
    options = {"target_modules": ["gate_proj"], "feedforward_modules": ["gate_proj"]}
    make_adapter(model, tmp_path / "ia3", seed=1, method="peft", peft_type="IA3", **options)
    runner = Runner(copy.deepcopy(model), slots=1, length=16)
    with pytest.raises(
        AdapterError, match=r"on the input of mlp\.gate_proj is not served; leave it out of feedforward"
    ):
        read_adapter(tmp_path / "ia3", runner.architecture, DIGEST, runner.device, runner.simd_width)


def test_every_kind_answers_through_the_engine_beside_the_others(tmp_path):
    model = random_backbone("llama")
    tuned = {}
    for number, (name, (method, options)) in enumerate(KINDS.items()):
        tuned[name] = make_adapter(model, tmp_path / name, seed=number, method=method, **options)
    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=5)
    answers = run(engine, *(request(name, prompt(6, i), 5, adapter=name) for i, name in enumerate(KINDS)))
    alone = {
        name: run(make_engine(model, load=lambda ref: tmp_path / ref), request(name, prompt(6, i), 5, adapter=name))
        for i, name in enumerate(KINDS)
    }
    assert {name: a.token_ids for name, a in answers.items()} == {n: a[n].token_ids for n, a in alone.items()}


def test_the_engine_imports_no_method():
    """It knows the neutral kinds, the table of architectures, and whoever picks the reader."""
    folder = Path(engine_package.__file__).parent
    imported = {name for file in folder.glob("*.py") for name in re.findall(r"pedro\.methods[\w.]*", file.read_text())}
    assert imported == {"pedro.methods.architectures", "pedro.methods.servable"}
