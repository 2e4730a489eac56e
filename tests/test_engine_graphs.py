"""The static-shape decode step that CUDA graphs capture.

On a CPU a "graph" is the function called again, and paged attention is spelled out. Where there is a GPU the same tests
run on it as well, with what is really captured: in float32 masked, in bfloat16 with torch's own paged attention.
"""

import copy

import pytest
import torch
from engine_models import DIGEST, make_adapter, prompt, random_backbone, reference_logits

from pedro.engine import graphs
from pedro.engine import runner as runner_module
from pedro.engine.graphs import GraphCapture, find_paged_attention
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.methods.servable import read_adapter


def capture(run):
    """As `GraphCapture`: replaying writes to the tensor that was given out."""
    made = run()
    captured.append(made.shape[0])
    return lambda: made.copy_(run()), made


captured: list[int] = []


def paged_attention(
    query, keys, values, starts, _starts_k, max_q, max_k, *, scale, window_size, enable_gqa, seqused_k, block_table
):
    """What torch's `varlen_attn` documents for one query a row over a paged cache, spelled out."""
    assert max_q == 1
    assert enable_gqa == (query.shape[1] != keys.shape[2])
    out = torch.empty_like(query)
    for row in range(len(starts) - 1):
        used = int(seqused_k[row])
        assert used <= max_k
        own_keys, own_values = (t[block_table[row]].flatten(0, 1)[:used] for t in (keys, values))  # [T, K, d]
        if window_size[0] >= 0:
            own_keys, own_values = own_keys[-window_size[0] - 1 :], own_values[-window_size[0] - 1 :]
        groups = query.shape[1] // keys.shape[2]
        own_keys, own_values = (t.repeat_interleave(groups, 1).transpose(0, 1) for t in (own_keys, own_values))
        weights = torch.softmax(query[row][:, None] @ own_keys.transpose(1, 2) * scale, -1)
        out[row] = (weights @ own_values)[:, 0]
    return out


@pytest.fixture(params=["paged", "masked", *(["cuda-masked", "cuda-paged"] if torch.cuda.is_available() else [])])
def graphed(request, monkeypatch):
    """The device and dtype to run on; what is captured is counted."""
    captured.clear()
    if request.param == "cuda-paged" and find_paged_attention(torch.bfloat16) is None:
        pytest.skip("the installed torch has no paged varlen_attn")
    if request.param.startswith("cuda"):

        class Counted(GraphCapture):
            def __call__(self, run):
                replay, made = super().__call__(run)
                captured.append(made.shape[0])
                return replay, made

        monkeypatch.setattr(runner_module, "GraphCapture", Counted)
        return "cuda", torch.bfloat16 if request.param == "cuda-paged" else torch.float32
    monkeypatch.setattr(runner_module, "uses_graphs", lambda device: True)
    monkeypatch.setattr(runner_module, "GraphCapture", lambda: capture)
    paged = paged_attention if request.param == "paged" else None
    monkeypatch.setattr(runner_module, "find_paged_attention", lambda dtype: paged)
    return "cpu", torch.float32


def bound(model, dtype: torch.dtype) -> float:
    """How far logits may be off: in bfloat16 a few times what the model's own forward is off in it."""
    if dtype == torch.float32:
        return 1e-4
    device = next(model.parameters()).device
    ids = torch.tensor([prompt(24, 5)], device=device)
    off = copy.deepcopy(model).to(dtype)(ids).logits.float() - model(ids).logits
    return 4 * float(off.abs().max())


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "phi3"])
def test_graphed_steps_equal_the_reference_for_any_rows_kinds_and_lengths(model_type, graphed, tmp_path):
    device, dtype = graphed
    model = random_backbone(model_type, max_position_embeddings=400).to(device)
    runner = Runner(copy.deepcopy(model).to(dtype), slots=11, length=300, kernel="torch")
    off = bound(model, dtype)
    tuned = {None: model}
    adapters = {None: None}
    for number, name in enumerate(["pedro", "red", "lora"]):
        tuned[name] = make_adapter(model, tmp_path / name, seed=number, method=name)
        adapters[name] = read_adapter(tmp_path / name, runner.architecture, DIGEST, runner.device, runner.simd_width)
    kinds = ["pedro", None, "lora", "red", "pedro", None, "lora"]
    slots, lengths = [9, 0, 3, 4, 1, 10, 6], [5, 3, 254, 12, 1, 8, 20]
    tokens = [prompt(n, n) for n in lengths]
    for order in ([1, 5], range(7)):  # bare rows alone, before any adapter's buffers exist
        rows = [PrefillRow(slots[i], tokens[i], lengths[i], adapters[kinds[i]]) for i in order]
        runner.begin(rows)
        runner.advance()
        runner.end()
        for step in range(3):
            running = [i for i in order if step != 1 or i % 2]  # some pause
            for i in running:
                tokens[i].append(2 + (13 * i + step) % 90)
            made = runner.decode([DecodeRow(slots[i], tokens[i][-1], len(tokens[i]) - 1) for i in running])
            for got, best, i in zip(made.values, made.best, running, strict=True):
                wanted = reference_logits(tuned[kinds[i]], tokens[i], lengths[i])[-1]
                torch.testing.assert_close(got.cpu(), wanted.cpu(), atol=off, rtol=1e-4)
                assert best == int(got.argmax())
        tokens = [ids[:n] for ids, n in zip(tokens, lengths, strict=True)]
    assert captured, "steps were captured"


def test_a_graph_is_captured_once_for_steps_of_one_size(graphed):
    device, dtype = graphed
    runner = Runner(random_backbone("llama").to(device, dtype), slots=8, length=64, kernel="torch")
    runner.begin([PrefillRow(slot, prompt(4, slot), 4) for slot in range(3)])
    runner.advance()
    runner.end()
    for step in range(5):
        runner.decode([DecodeRow(slot, 7, 4 + step) for slot in range(3)])
    assert captured == [4], "three rows, rounded up"


def test_the_graphs_used_least_recently_give_way(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "MAX_GRAPHS", 2)
    device, dtype = graphed
    runner = Runner(random_backbone("llama").to(device, dtype), slots=8, length=64, kernel="torch")
    runner.begin([PrefillRow(slot, prompt(4, slot), 4) for slot in range(3)])
    runner.advance()
    runner.end()
    for rows in (1, 2, 1, 3, 1, 2):
        runner.decode([DecodeRow(slot, 7, 4) for slot in range(rows)])
    assert captured == [1, 2, 4, 2], "one row's stays, two rows' went"


def test_a_row_that_is_not_finite_is_marked(graphed):
    model = random_backbone("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = float("nan")
    device, dtype = graphed
    runner = Runner(model.to(device, dtype), slots=2, length=32, kernel="torch")
    runner.begin([PrefillRow(slot, [3, 4, 5], 3) for slot in range(2)])
    runner.advance()
    runner.end()
    made = runner.decode([DecodeRow(0, 50, 3), DecodeRow(1, 7, 3)])
    assert made.best[0] == -1
    assert made.best[1] == int(made.values[1].argmax())
