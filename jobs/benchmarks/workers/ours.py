"""Our engine, driven by its own step loop in this process; adapters of any kind, or none, in one engine."""

from __future__ import annotations

from typing import Any

import torch

from jobs.benchmarks.bench_engine import BenchEngine
from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts


class Ours:
    """Set-up: size, device, dtype, threads (None: auto), max_batch, length; `adapters`: directories by kind.

    With a `tokenizer` (a directory) tokens become text, as in a server; `digest` is the backbone's if not the size's.
    """

    def __init__(self, setup: dict[str, Any]) -> None:
        if setup["threads"] is not None:
            torch.set_num_threads(setup["threads"])
        self._size = MODEL_SIZES[setup["size"]]
        self._refs: dict[str, list[str]] = setup["adapters"]
        self._engine = BenchEngine(
            self._size,
            device=setup["device"],
            dtype=setup["dtype"],
            max_batch=setup["max_batch"],
            max_length=setup["length"],
            threads=setup["threads"],
            tokenizer=_tokenizer(setup.get("tokenizer")),
            digest=setup.get("digest"),
        )

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """The order's prompts at once, row i with the adapter of tenant i (`adapters`: a kind, or none)."""
        asked = prompts(self._size, order["batch"], order["prompt"], order["seed"])
        refs = self._refs.get(order["adapters"] or "", [])[: order["tenants"]]
        if refs:
            self._engine.load(refs)
        chosen = [refs[row % len(refs)] if refs else None for row in range(len(asked))]
        return self._engine.answer(asked, chosen, order["new"], beams=order.get("beams", 1)).figures()


def _tokenizer(directory: str | None) -> Any:
    if directory is None:
        return None
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
