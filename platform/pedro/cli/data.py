"""`pedro data`: check a data file before training on it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from pedro.cli.output import AsJson, emit

app = typer.Typer(help="Check a tenant's data before training.", no_args_is_help=True)


@app.command()
def check(
    file: Annotated[
        Path,
        typer.Argument(
            help="Rows of messages, prompt/completion, Alpaca, ShareGPT or preferences: JSONL, JSON, CSV, Parquet."
        ),
    ],
    backbone: Annotated[
        str, typer.Option(help="The backbone whose tokenizer and context length apply.")
    ] = "stories260K",
    validation: Annotated[Path | None, typer.Option(help="A validation or test file, to check for leakage.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Most tokens per row [the backbone's context].")] = None,
    fields: Annotated[
        str | None,
        typer.Option(help="Map your columns: prompt=question,completion=answer (in a spec: data.fields)."),
    ] = None,
    show: Annotated[int, typer.Option(help="Print how the first N rows are masked.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Summarise the file and list every line that cannot be used; exit 1 if it cannot be trained on.

    Example: `pedro data check train.jsonl --validation test.jsonl --show 3`
    """
    from pedro.backbone import context_length, load_tokenizer, resolve_backbone
    from pedro.data.check import check_file
    from pedro.data.lines import parse_fields
    from pedro.data.masks import show_masks
    from pedro.data.mistakes import escaped

    named = parse_fields(fields) if fields else None
    resolved = resolve_backbone(backbone)
    tokenizer = load_tokenizer(resolved)
    length = max_length or context_length(resolved)
    report = check_file(file, tokenizer, length, validation=validation, fields=named)
    masks = show_masks(file, tokenizer, show, fields=named) if show and report.usable else []
    value = {**report.to_dict(), "masks": [asdict(mask) for mask in masks]} if show else report.to_dict()

    def show_report() -> None:
        typer.echo(report.text())
        for mask in masks:
            pieces = zip(mask.tokens, mask.supervised, strict=True)
            texts = [(escaped(token), learnt) for token, learnt in pieces]
            shown = " ".join(typer.style(text, bold=True, underline=True) if on else text for text, on in texts)
            typer.echo(f"\n{mask.place}: {mask.prompt_len} prompt tokens condition the vectors; loss on the rest")
            typer.echo(f"  {shown}")
            typer.echo(f"  prompt {mask.prompt!r}\n  answer {mask.completion!r}")

    emit(value, as_json, show_report)
    if not report.usable:
        raise typer.Exit(1)
