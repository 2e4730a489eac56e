"""A pretrained backbone, published: a transformers directory with its provenance, the result JSON, a figure."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs.pretrain.atomic_files import replacing
from jobs.pretrain.corpus import LEFT_OUT, SOURCES
from pedro.errors import ConfigError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

LIMIT_BYTES = 32_000_000
LICENCE = """Weights and tokenizer: Creative Commons Attribution-ShareAlike 4.0 International (CC BY-SA 4.0)
https://creativecommons.org/licenses/by-sa/4.0/legalcode

They were trained on texts under the licences below. Share-alike is the strictest of them, so it is taken for the
whole, whether or not weights are an adaptation of the texts that they were trained on.

"""


def check_size(model: torch.nn.Module) -> None:
    """Raise ConfigError for a model that is too large to be carried by the package."""
    size = 2 * sum(parameter.numel() for parameter in model.parameters())
    if size > LIMIT_BYTES:
        raise ConfigError(
            f"preset: {size / 1e6:.1f} MB in bf16, but an embedded backbone may have {LIMIT_BYTES / 1e6:.0f}",
            param="preset",
        )


def publish(model: torch.nn.Module, tokenizer: Tokenizer, folder: Path, result: Mapping[str, Any]) -> None:
    """Write the backbone (bf16 safetensors) with PROVENANCE.md and LICENSE; a former one stays until this is whole.

    Raises ConfigError if it is too large.
    """
    check_size(model)
    scratch = folder.with_name(f"{folder.name}.new")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    saved: Any = model.to(torch.bfloat16)
    saved.save_pretrained(scratch)
    model.float()
    tokenizer.save_pretrained(scratch)
    (scratch / "PROVENANCE.md").write_text(provenance_text(result))
    licences = "\n".join(f"{source.name}: {source.licence}, {source.origin}" for source in SOURCES)
    (scratch / "LICENSE").write_text(f"{LICENCE}{licences}\n")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def provenance_text(result: Mapping[str, Any]) -> str:
    """The page that lies beside the weights."""
    shape, run = result["model"], result["run"]
    rows = [
        f"| {entry['name']} | {entry['what']} | {entry['documents']:,} | {entry['tokens_per_epoch']:,} "
        f"| {entry['licence']} | {entry['origin']} |"
        for entry in result["corpus"]["sources"]
    ]
    judged = [
        f"| {name} | {scores['bits_per_char']:.3f} | {scores['perplexity']:.1f} "
        f"| {result['baseline']['quality'][name]['bits_per_char']:.3f} |"
        for name, scores in result["quality"].items()
    ]
    return f"""# {result["name"]}

A Llama of {shape["parameters"]:,} parameters, pretrained for this project by `jobs/pretrain/` on public
text alone; a transformers directory.

| | |
|---|---|
| shape | {shape["layers"]} layers, width {shape["width"]}, {shape["heads"]} heads, \
{shape["kv_heads"]} key/value heads, feed-forward {shape["ffn"]}, context {shape["context"]}, \
tied embeddings, bfloat16 |
| tokenizer | {shape["vocabulary"]:,} byte-level BPE entries, made from the same text; digits stand alone; \
`<unk>` 0, `<s>` 1, `</s>` 2 (every text ended with it), `<pad>` 3 |
| training | {run["tokens"]:,} tokens ({run["epochs"]:.2f} epochs), {run["steps"]:,} steps, seed {run["seed"]}, \
{run["seconds"] / 60:.0f} min on {run["device"]} |
| licence | CC BY-SA 4.0 (LICENSE) |

## What it read

| source | part | documents | tokens an epoch | licence | from |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Left out: {LEFT_OUT}.

## How well it predicts

Bits a character on text that it has not read; stories260K on the same text.

| text | bits/char | perplexity (its own tokens) | {result["baseline"]["name"]} bits/char |
|---|---|---|---|
{chr(10).join(judged)}
"""


def draw(result: Mapping[str, Any], path: Path) -> None:
    """The training curve: loss of training batches, and bits a character of held-out text against the baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    losses, looks, decay = result["curve"]["train_loss"], result["curve"]["held_out"], result["run"]["decay_from"]
    left.plot([tokens / 1e6 for tokens, _ in losses], [loss for _, loss in losses], linewidth=0.8, color="#0072b2")
    left.set(xlabel="million tokens", ylabel="training loss, nats a token", title=result["name"])
    for number, name in enumerate(result["quality"]):
        colour = ("#0072b2", "#d55e00", "#009e73")[number % 3]
        right.plot([t / 1e6 for t, _ in looks], [scores[name] for _, scores in looks], color=colour, label=name)
        right.axhline(result["baseline"]["sample"][name], color=colour, linestyle=":", linewidth=1)
    right.set(
        xlabel="million tokens", ylabel="bits a character, held out", title=f"dotted: {result['baseline']['name']}"
    )
    right.legend()
    for axes in (left, right):
        if decay is not None:
            axes.axvline(decay / 1e6, color="grey", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.3)
    with replacing(path) as scratch:
        figure.savefig(scratch, dpi=120, format="png")
    pyplot.close(figure)


def write_result(result: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as scratch:
        scratch.write_text(json.dumps(result, indent=1) + "\n")
