"""LoReFT and DiReFT: the equations, positions as pyreft cuts them, and what pyreft saved, by its own arithmetic."""

import pytest
import torch
from methods_models import tiny_backbone, tokens
from torch import nn

from pedro.methods import get_method
from pedro.methods.reft import make_edit

WIDTH, RANK = 32, 4


def applied(seed=1, **options):
    """A tiny backbone with random edits, in eval mode."""
    torch.manual_seed(seed)
    return get_method("loreft").apply(tiny_backbone(), options).eval()


def pyreft_locations(last_position, first_n, last_n):
    """As `get_intervention_locations` of pyreft 0.1 has them, without what it pads with."""
    first, last = min(last_position // 2, first_n), min(last_position // 2, last_n)
    return [*range(first), *range(last_position - last, last_position)]


class LoreftIntervention(nn.Module):
    """pyreft 0.1's: what is a token h before is this after."""

    def __init__(self):
        super().__init__()
        self.rotate_layer = nn.utils.parametrizations.orthogonal(LowRankRotateLayer())
        self.learned_source = nn.Linear(WIDTH, RANK)

    def forward(self, base):
        rotated_base = self.rotate_layer(base)
        return base + torch.matmul(self.learned_source(base) - rotated_base, self.rotate_layer.weight.T)

    def state_dict(self, *_args, **_kwargs):
        return {**self.learned_source.state_dict(), "rotate_layer": self.rotate_layer.weight.data}


class LowRankRotateLayer(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(nn.init.orthogonal_(torch.empty(WIDTH, RANK)))

    def forward(self, x):
        return torch.matmul(x, self.weight)


@torch.no_grad()
def take(layer, *states):
    """Put what pyreft saved into an adapter, as docs/methods.md shows."""
    layer.reft_rotation["default"].copy_(torch.stack([state["rotate_layer"] for state in states]))
    layer.reft_source["default"].copy_(torch.stack([state["weight"] for state in states]))
    layer.reft_bias["default"].copy_(torch.stack([state["bias"] for state in states]))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 2, 5, 9])
@pytest.mark.parametrize(("positions", "first", "last"), [("f2+l3", 2, 3), ("f3", 3, 0), ("l1", 0, 1)])
@pytest.mark.parametrize("shared", [True, False])
def test_what_pyreft_trained_gives_its_logits(shared, positions, first, last, length):
    torch.manual_seed(2)
    ids, blocks = tokens(1, 12), [0, 2]
    ours = applied(positions=positions, shared=shared, layers=blocks)
    theirs = tiny_backbone()
    for number, layer in enumerate(ours.base_model.layers()):
        parts = [LoreftIntervention() for _ in range(1 if shared or not (first and last) else 2)]
        take(layer, *(part.state_dict() for part in parts))

        def intervene(_module, _args, output, parts=parts):
            hidden = (output[0] if isinstance(output, tuple) else output).clone()
            for at in pyreft_locations(length, first, last):
                part = parts[0 if len(parts) == 1 or at < min(length // 2, first) else 1]
                hidden[0, at] = part(hidden[0, at])
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        theirs.model.layers[blocks[number]].register_forward_hook(intervene)
    made = ours(ids, prompt_lens=torch.tensor([length])).logits
    torch.testing.assert_close(made, theirs(ids).logits, atol=2e-5, rtol=1e-4)
    if length > 1:
        assert (made - tiny_backbone()(ids).logits).abs().max() > 0.01


@torch.no_grad()
def test_the_equations_are_those_of_the_paper():
    torch.manual_seed(0)
    rotation, source, bias = torch.randn(WIDTH, RANK), torch.randn(RANK, WIDTH), torch.randn(RANK)
    h = torch.randn(WIDTH)
    edit = make_edit(True, rotation, source, bias)
    torch.testing.assert_close(h + (h @ edit.a + edit.c) @ edit.b, h + rotation @ (source @ h + bias))
    edit = make_edit(False, rotation, source, bias)
    r = edit.b  # [R, D]
    torch.testing.assert_close(r @ r.T, torch.eye(RANK), atol=1e-5, rtol=0)
    assert torch.linalg.matrix_rank(torch.cat([r, rotation.T])) == RANK, "it spans what was learned"
    torch.testing.assert_close(h + (h @ edit.a + edit.c) @ edit.b, h + r.T @ (source @ h + bias - r @ h))
    torch.testing.assert_close(make_edit(False, r.T, source, bias).b, r, atol=1e-5, rtol=0)


@torch.no_grad()
def test_padding_moves_no_edit_and_an_answer_has_none():
    model, (row,) = applied(positions="f2+l1"), tokens(1, 8)
    alone = model(row[None], prompt_lens=torch.tensor([5])).logits[0]
    for pad in ([0, 0, 0], []):
        before, after = torch.tensor(pad, dtype=torch.long), torch.zeros(3 - len(pad), dtype=torch.long)
        ids = torch.cat([before, row, after])[None]
        mask = torch.cat([before, torch.ones_like(row), after])[None]
        made = model(ids, attention_mask=mask, prompt_lens=torch.tensor([5])).logits[0]
        torch.testing.assert_close(made[len(pad) : len(pad) + 8], alone, atol=1e-4, rtol=1e-4)
    cache = model(row[None, :5], use_cache=True).past_key_values
    then = model(row[None, 5:], past_key_values=cache).logits[0]
    torch.testing.assert_close(then, alone[5:], atol=1e-4, rtol=1e-4)


def test_checkpointing_changes_no_gradient():
    grads = []
    for checkpointing in (False, True):
        model = applied().train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(tokens(), labels=tokens(), prompt_lens=torch.tensor([4, 6])).loss.backward()
        grads.append([p.grad for _, p in get_method("loreft").parameter_groups(model)[0]])
    assert all(torch.allclose(a, b, atol=1e-6) and a.abs().sum() > 0 for a, b in zip(*grads, strict=True))
