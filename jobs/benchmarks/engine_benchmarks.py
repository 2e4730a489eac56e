"""Which benchmarks there are that need nothing but the engine. A table; each subject is imported when it is run."""

from __future__ import annotations

import importlib
from functools import partial
from typing import TYPE_CHECKING

from jobs.benchmarks.command_line import Benchmark, Options

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import Log
    from jobs.benchmarks.report import BenchmarkReport

SERVING_COLUMNS = (
    *("engine", "adapters", "model", "batch", "tenants", "tok_s", "decode_tok_s", "ttft_ms"),
    *("ratio", "ratio_interval", "decode_ratio", "decode_ratio_interval"),
)
FAIRNESS_COLUMNS = (
    *("where", "case", "requests", "ttft_p50_ms", "ttft_p95_ms", "ratio", "ratio_interval", "p50_ratio"),
    *("token_p50_ms", "token_p95_ms", "token_ratio", "flood_tok_s", "flood_alone_tok_s"),
)


def _run(module: str, options: Options, log: Log) -> BenchmarkReport:
    report: BenchmarkReport = importlib.import_module(f"jobs.benchmarks.{module}").run(options, log)
    return report


def _entry(module: str, about: str, *columns: str) -> Benchmark:
    return Benchmark(about, partial(_run, module), columns)


BENCHMARKS = {
    "serving": _entry("peers", "tokens per second beside generate(), peft and vLLM", *SERVING_COLUMNS),
    "tenants": _entry(
        "tenants",
        "1 to 10,000 registered adapters, resident and missing",
        *("case", "tenants", "draw", "hit_share", "tok_s", "ratio", "ratio_interval", "p99_ms"),
    ),
    "longprompt": _entry(
        "longprompt",
        "a 2 k-token prompt among decodes",
        *("case", "model", "batch", "tokens", "median_ms", "p99_ms", "longest_ms", "ratio", "ttft_ms"),
    ),
    "stall": _entry(
        "prefill_stall",
        "what --prefill-stall trades: throughput under Poisson arrivals, and streams beside a 2 k-token prompt",
        *("model", "batch", "prefill_stall", "static_tok_s", "tok_s", "ratio", "ratio_interval", "ttft_ms", "token_ms"),
        *("token_p99_ms", "stream_ms", "stream_p99_ms", "stream_ratio", "stream_ratio_interval", "long_ttft_ms"),
    ),
    "context": _entry(
        "context",
        "time to the first token by the prompt's length: PEDRO's poolers, LoRA, no adapter",
        *("adapters", "model", "tokens", "ttft_ms", "ratio", "ratio_interval", "decode_tok_s"),
    ),
    "prefix": _entry(
        "prefix",
        "chats and shared prompts with the prefix cache, and its cost to cold prompts, beside llama.cpp and vLLM",
        *("case", "engine", "adapters", "model", "tokens", "first_ms", "ms", "last_ms", "off_ms", "tok_s"),
        *("ratio", "ratio_interval"),
    ),
    "conditioning": _entry(
        "conditioning",
        "what is read again behind a known system prompt: PEDRO by what conditions it and what it scales, LoRA, aLoRA",
        *("adapters", "model", "tokens", "cold_ms", "next_turn_ms", "next_turn_ratio", "same_system_prompt_ms"),
        *("same_system_prompt_ratio", "another_adapter_ms", "another_adapter_ratio", "another_adapter_cached"),
    ),
    "structured": _entry(
        "structured",
        "decoding held to a JSON schema beside free decoding, PEDRO adapters, a tenant a row",
        *("case", "adapters", "model", "batch", "decode_tok_s", "ratio", "ratio_interval"),
    ),
    "speculation": _entry(
        "speculation",
        "drafts by prompt lookup beside none: answers that quote, and others",
        *("model", "batch", "case", "off_tok_s", "ngram_tok_s", "ratio", "ratio_interval"),
        *("cpu_ratio", "cpu_ratio_interval", "drafts", "draft_tokens", "accepted_tokens"),
    ),
    "weights": _entry(
        "weights",
        "float32, int8 and int4 backbones on the CPU kernel: speed, memory, perplexity",
        *("model", "batch", "weights", "weight_mb", "decode_tok_s", "decode_ratio", "decode_ratio_interval"),
        *("ours_decode_ratio", "ttft_ms", "ttft_ratio", "ours_ttft_ratio", "perplexity", "perplexity_ratio"),
    ),
    "arrivals": _entry(
        "arrivals",
        "Poisson arrivals against a static batch; prefill of many tenants against one's",
        *("case", "model", "batch", "tenants", "tok_s", "ttft_ms", "ratio", "ratio_interval"),
    ),
    "fairness": _entry(
        "fairness",
        "a quiet tenant's first token beside the floods of another",
        *FAIRNESS_COLUMNS,
    ),
    "contention": _entry(
        "contention",
        "one thread, several and auto beside 0, 1 and 2 busy processes: decoding and prefill",
        *("phase", "model", "batch", "neighbours", "threads", "tok_s", "ratio", "ratio_interval"),
    ),
    "coldstart": _entry("coldstart", "a fresh process to its first token", "case", "model", "seconds", "interval"),
    "memory": _entry(
        "memory_growth",
        "resident memory over 10,000 requests",
        "case",
        "model",
        "requests",
        "rss_mb",
        "growth_mb",
    ),
    "efficiency": _entry(
        "efficiency",
        "the paper's table 3: PEDRO, (IA)³, LoRA unmerged, beam 1 and 3",
        *("engine", "adapters", "model", "batch", "tenants", "beams", "tok_s", "decode_tok_s", "peak_gb"),
        *("ratio", "decode_ratio", "bandwidth_share"),
    ),
    "training": _entry(
        "training",
        "fine-tuning: PEDRO, (IA)³, LoRA, full in our trainer beside transformers' Trainer with peft",
        *("backbone", "trainer", "method", "tok_s", "step_ms", "peak_mb", "ratio", "ratio_interval"),
    ),
    "cotraining": _entry(
        "cotraining",
        "eight small fine-tunes of one backbone in one group beside one after the other",
        *("backbone", "method", "batch", "tok_s", "alone_tok_s", "ratio", "ratio_interval"),
    ),
    "packing": _entry(
        "packing",
        "training on packed rows beside padded ones, tokens per second",
        *("backbone", "data", "method", "padding", "tok_s", "padded_tok_s", "ratio", "ratio_interval"),
    ),
    "sharding": _entry(
        "sharding",
        "two workers on 300 M parameters: peak memory of ZeRO 0 and 3 beside what the dry run promises",
        *("stage", "method", "peak_mb", "promised_mb", "off", "ratio"),
        *("both_mb", "process_mb", "step_s", "loss"),
    ),
    "quantised": _entry(
        "quantised",
        "fine-tuning over a backbone in float32, bfloat16, int8 and nf4: time of a step, memory, loss",
        *("backbone", "method", "weights", "weights_mb", "loaded_mb", "peak_mb", "step_ms", "step_ratio", "loss"),
    ),
    "scaling": _entry(
        "scaling",
        "a thousand replicas and a million tenants, simulated with the router's placement from what scaleout measured",
        *("case", "zipf", "placement", "share", "hit_share", "loads_a_call", "wait_p50_ms", "wait_p99_ms"),
        *("answer_p50_s", "answer_p99_s", "load_p50", "load_p99", "hot_on", "held", "held_twice"),
    ),
    "published": _entry(
        "published",
        "SmolLM2-135M-Instruct on MMLU, BBH, GSM8K and WikiText-2 beside what its makers publish",
        *("task", "asked", "rows", "score", "interval", "published", "within", "seconds"),
    ),
}
