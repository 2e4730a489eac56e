"""On a CPU, half-precision backbones attend in float32."""

import pytest
import torch

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.evaluation.scoring import answer_losses, generate

STORIES = "stories260K"


@pytest.fixture(scope="module")
def rows():
    tokenizer = load_tokenizer(resolve_backbone(STORIES))
    texts = ("Once upon a time there was a girl", "The big red dog went to the park", "One day Lily")
    ids = [tokenizer(text)["input_ids"] for text in texts]
    return tokenizer, [{"input_ids": row, "prompt_len": 3} for row in ids]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_attention_is_computed_in_float32_whatever_the_backbones_dtype(rows, dtype, monkeypatch):
    tokenizer, batch = rows
    model, seen, real = (
        load_model(resolve_backbone(STORIES), dtype),
        set(),
        torch.nn.functional.scaled_dot_product_attention,
    )

    def watched(query, *rest, **options):
        seen.add(query.dtype)
        return real(query, *rest, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", watched)
    losses = [loss for loss, _ in answer_losses(model, tokenizer, batch)]
    answers = generate(model, tokenizer, batch, 4)
    assert seen == {torch.float32}
    assert model.dtype == getattr(torch, dtype)
    exact = load_model(resolve_backbone(STORIES))
    assert losses == pytest.approx([loss for loss, _ in answer_losses(exact, tokenizer, batch)], rel=0.02)
    assert len(answers) == len(batch)


def test_nothing_of_it_is_saved(tmp_path):
    model = load_model(resolve_backbone(STORIES), "bfloat16")
    model.save_pretrained(tmp_path)
    assert "attn" not in (tmp_path / "config.json").read_text().replace("attention_", "")
