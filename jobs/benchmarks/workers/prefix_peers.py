"""Peers with their own prefix caches: llama.cpp's server (wheel `xllamacpp`) and vLLM, each in a Python of its own.

Both run in this process, take token ids and answer greedily; our classes are given the same orders (`workers.prefix`).
"""

from __future__ import annotations

import os
import threading
from typing import Any

from jobs.benchmarks.timeline import Timeline


class LlamaCpp:
    """Set-up: model (a GGUF file), threads, max_batch, length; lora (GGUF files, none of which acts unless a prompt
    names it). Keys and values are float32, as ours."""

    def __init__(self, setup: dict[str, Any]) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = setup["model"]
        params.n_parallel = setup["max_batch"]
        params.n_ctx = setup["max_batch"] * setup["length"]
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = setup["threads"]
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.warmup = True
        params.lora_adapters = [_lora(xllamacpp, file) for file in setup.get("lora", ())]
        params.lora_init_without_apply = True
        self._server = xllamacpp.Server(params)
        self.facts = {"version": getattr(xllamacpp, "__version__", "")}

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """All prompts at once, each on a thread; every token of the file's vocabulary is a word of its own. `lora` of
        the order is the number of each prompt's adapter."""
        texts: list[list[str]] = [[] for _ in order["prompts"]]
        timeline = Timeline()
        failures: list[str] = []

        def ask(number: int, ids: list[int]) -> None:
            def take(chunk: Any) -> None:
                for choice in chunk.get("choices", ()):
                    if choice["text"]:
                        timeline.take(str(number), len(choice["text"].split()))
                        texts[number].append(choice["text"])
                if "error" in chunk:
                    failures.append(str(chunk["error"]))

            body: dict[str, Any] = {
                "prompt": ids,
                "max_tokens": order["new"],
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
            if "lora" in order:
                body["lora"] = [{"id": order["lora"][number], "scale": 1.0}]
            try:
                self._server.handle_completions({**body, "cache_prompt": order.get("cache", True)}, take)
            except Exception as error:  # noqa: BLE001 (told by the run)
                failures.append(str(error))

        threads = [threading.Thread(target=ask, args=asked) for asked in enumerate(order["prompts"])]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise RuntimeError(failures[0])
        answers = [[int(word[1:]) for word in "".join(text).split() if word.startswith("w")] for text in texts]
        return _figures(timeline, answers)


def _lora(xllamacpp: Any, file: str) -> Any:
    adapter = xllamacpp.CommonAdapterLoraInfo()
    adapter.path, adapter.scale = file, 0.0
    return adapter


class Vllm:
    """Set-up: model (a directory), threads, max_batch, length."""

    def __init__(self, setup: dict[str, Any]) -> None:
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB: all sequences at once, and what is kept
        import vllm

        self._engine = vllm.LLM(
            model=setup["model"],
            skip_tokenizer_init=True,
            dtype="float32" if setup["device"] == "cpu" else "bfloat16",
            max_model_len=setup["length"],
            max_num_seqs=setup["max_batch"],
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        ).llm_engine
        self.facts = {"version": vllm.__version__}
        self._count = 0

    def run(self, order: dict[str, Any]) -> dict[str, Any]:
        """All prompts at once."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=order["new"],
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        timeline = Timeline()
        first = self._count
        answers: list[list[int]] = [[] for _ in order["prompts"]]
        for ids in order["prompts"]:
            self._engine.add_request(str(self._count), TokensPrompt(prompt_token_ids=ids), params)
            self._count += 1
        while self._engine.has_unfinished_requests():
            for output in self._engine.step():
                number = int(output.request_id) - first
                ids = [token for part in output.outputs for token in part.token_ids]
                timeline.take(str(number), len(ids))
                answers[number] += ids
        return _figures(timeline, answers)


def _figures(timeline: Timeline, answers: list[list[int]]) -> dict[str, Any]:
    return {
        "first_ms": [1000 * timeline.moments[str(number)][0] for number in range(len(answers))],
        "answers": answers,
        **timeline.figures(),
    }
