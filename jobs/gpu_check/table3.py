"""The paper's table 3 at a backbone's real sizes: one engine, all adapters in it, each line alone."""

from __future__ import annotations

import gc
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from jobs.benchmarks.bench_engine import BenchEngine
from jobs.benchmarks.efficiency import copy_limit_tok_s
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, default_dtype, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.workers.roofline import Roofline

PAPER_TOK_S = {"pedro": 32.5, "ia3": 33.1, "lora": 25.1}  # on an A40 at beam 1, batch size not stated
TENANTS = {"pedro": 64, "ia3": 64, "lora": 8}  # a LoRA of rank 16 on all linears of 7B has 160 MB
ROUNDS = 2
BATCHES, BEAMS = (1, 64), (1, 3)


def run(device: str, model: str, note: Callable[[dict[str, Any]], None]) -> None:
    """The machine's bandwidth, then a finding a line; the first round of each is not counted (graphs are captured)."""
    size, dtype = MODEL_SIZES[model], default_dtype(device)
    roofline = Roofline({"threads": torch.get_num_threads(), "device": device, "dtype": dtype}).run({})
    note({"roofline": roofline})
    batches = BATCHES if device == "cuda" else (1, 4)
    engine = BenchEngine(
        size, device, dtype, max_batch=max(batches) * max(BEAMS), max_length=PROMPT_TOKENS + NEW_TOKENS + 8
    )
    limit = copy_limit_tok_s(size, roofline["copy_gb_s"], 4 if dtype == "float32" else 2)
    for kind in (None, *TENANTS):
        refs = [str(path) for path in adapter_directories(size, kind, min(TENANTS[kind], max(batches)))] if kind else []
        engine.load(refs)
        for batch in batches:
            for beams in BEAMS if kind else (1,):
                note(_line(engine, size, kind, refs, batch, beams, limit))
        del refs
        gc.collect()
    engine.close()


def _line(
    engine: BenchEngine, size: ModelSize, kind: str | None, refs: list[str], batch: int, beams: int, limit: float
) -> dict[str, Any]:
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    rounds = []
    for number in range(ROUNDS + 1):
        asked = prompts(size, batch, PROMPT_TOKENS, seed=number)
        chosen = [refs[row % len(refs)] if refs else None for row in range(batch)]
        figures = engine.answer(asked, chosen, NEW_TOKENS, beams=beams).figures()
        if number:
            rounds.append(figures)
    keys = ("tok_s", "decode_tok_s", "ttft_ms") if beams == 1 else ("tok_s",)  # beams come all at the end
    row: dict[str, Any] = {"adapters": kind or "none", "batch": batch, "beams": beams, "tenants": len(refs[:batch])}
    row |= {key: round(median(figures[key] for figures in rounds), 2) for key in keys}
    if batch == beams == 1:
        row["bandwidth_share"] = round(row["decode_tok_s"] / limit, 3)
        row["paper_tok_s"] = PAPER_TOK_S.get(kind or "")
    if on_gpu:
        row["peak_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
    return row
