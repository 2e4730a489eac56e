"""vLLM, with or without LoRA, stepped by hand so that each token's moment is seen. Imports nothing of ours but names.

Runs in vLLM's own Python. Prefix caching and detokenisation are off, prompts are token ids, the engine core runs in
this process: the same work that our engine is given.
"""

from __future__ import annotations

import os
from typing import Any

from jobs.benchmarks.model_sizes import MODEL_SIZES, prompts
from jobs.benchmarks.timeline import Timeline


class Vllm:
    """Set-up: size, directory, threads, max_batch, length; `adapters`: LoRA directories (none: the compiled model)."""

    def __init__(self, setup: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
        import torch
        import vllm

        self._size = MODEL_SIZES[setup["size"]]
        adapters = setup["adapters"]
        lora = {"enable_lora": True, "max_loras": len(adapters), "max_lora_rank": 16} if adapters else {}
        self._engine = vllm.LLM(
            model=setup["directory"],
            skip_tokenizer_init=True,
            dtype=setup["dtype"],
            max_model_len=setup["length"],
            max_num_seqs=setup["max_batch"],
            enable_prefix_caching=False,
            disable_log_stats=True,
            enforce_eager=bool(adapters) and not torch.cuda.is_available(),
            seed=0,
            **lora,
        ).llm_engine
        self.facts = {"version": vllm.__version__}
        self._adapters = adapters
        self._count = 0

    def run(self, order: dict[str, Any]) -> dict[str, float]:
        """The order's prompts at once, to their ends."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.lora.request import LoRARequest
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=order["new"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        asked = prompts(self._size, order["batch"], order["prompt"], order["seed"])
        timeline = Timeline()
        for row, ids in enumerate(asked):
            self._count += 1
            which = row % order["tenants"] if self._adapters else None
            lora = None if which is None else LoRARequest(f"a{which}", which + 1, self._adapters[which])
            prompt = TokensPrompt(prompt_token_ids=ids)
            self._engine.add_request(str(self._count), prompt, params, lora_request=lora)
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                timeline.take(output.request_id, sum(len(part.token_ids) for part in output.outputs))
        return timeline.figures()
