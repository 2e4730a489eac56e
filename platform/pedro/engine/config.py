"""Sizes and limits of an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pedro.engine.kv_budget import KVBudget, KVMemory
from pedro.engine.panels import WEIGHTS
from pedro.engine.runner import KERNELS
from pedro.engine.speculation import SPECULATIONS, draft_rows
from pedro.errors import ConfigError


@dataclass(frozen=True)
class EngineConfig:
    """Sizes and limits. `max_length` is prompt and answer together; None means the backbone's context."""

    max_batch: int = 16  # sequences that run concurrently, if their keys and values fit
    max_length: int | None = None
    prefill_tokens: int = 2048  # prompt tokens of one step while others wait; of one prefill, twice that if none runs
    prefill_stall: float = 1.25  # decode steps' worth of time a step may spend on prefill while others wait
    adapter_bytes: int = 256 << 20
    kv_memory: KVMemory = None  # for running sequences: bytes, or a share of free memory up to 1.0; None: default
    sharers: int = 1  # processes like this one that divide the default share of the machine's free memory
    prefix_bytes: int = 0  # of cached prompts and answers, for prompts that begin alike; 0 disables the cache
    share_bare_prefixes: bool = False  # tenants reuse each other's prefixes on which no adapter acted
    loaders: int = 4  # adapters that load concurrently
    max_waiting: int = 1024
    max_waiting_per_tenant: int = 256
    preempt_after: int = 1024  # weighted tokens by which a running tenant may be ahead of a waiting one
    head_room_s: float = 10.0  # how long after a tenant's last request capacity is reserved for its next one
    tenant_weights: dict[str, float] = field(default_factory=dict)
    threads: int | None = None  # at most, for the native kernel; None: all available cores
    kernel: str = "auto"  # native: the compiled CPU kernel; torch: the model's own modules; auto: native if possible
    weights: str = "float32"  # of the backbone, in the native kernel: unchanged, or quantised to int8 or int4
    speculate: str = "off"  # ngram: drafts are looked up in prompt and answer and verified several tokens per step
    num_speculative_tokens: int = 8  # per draft, at most
    prompt_lookup_max: int = 3  # trailing tokens that are looked up, at most
    prompt_lookup_min: int = 2  # at least

    def __post_init__(self) -> None:
        wrong = [
            f"engine.{name}: expected > 0, got {getattr(self, name)!r}"
            for name in (
                "max_batch",
                "sharers",
                "prefill_tokens",
                "adapter_bytes",
                "loaders",
                "max_waiting",
                "max_waiting_per_tenant",
                "preempt_after",
                "head_room_s",
                "prefill_stall",
                "num_speculative_tokens",
                "prompt_lookup_min",
            )
            if getattr(self, name) <= 0
        ]
        wrong += [
            f"engine.tenant_weights.{t}: expected > 0, got {w!r}" for t, w in self.tenant_weights.items() if w <= 0
        ]
        memory = self.kv_memory
        if memory is not None and (memory <= 0 or (isinstance(memory, float) and memory > 1)):
            wrong.append(f"engine.kv_memory: expected bytes, or a share above 0 and up to 1.0, got {memory!r}")
        if self.prefix_bytes < 0:
            wrong.append(f"engine.prefix_bytes: expected ≥ 0, got {self.prefix_bytes!r}")
        if self.threads is not None and self.threads < 1:
            wrong.append(f"engine.threads: expected > 0 or None, got {self.threads!r}")
        if self.kernel not in KERNELS:
            wrong.append(f"engine.kernel: expected one of {', '.join(KERNELS)}, got {self.kernel!r}")
        if self.weights not in WEIGHTS:
            wrong.append(f"engine.weights: expected one of {', '.join(WEIGHTS)}, got {self.weights!r}")
        if self.speculate not in SPECULATIONS:
            wrong.append(f"engine.speculate: expected one of {', '.join(SPECULATIONS)}, got {self.speculate!r}")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            least = self.prompt_lookup_min
            wrong.append(f"engine.prompt_lookup_max: expected ≥ {least} (_min), got {self.prompt_lookup_max!r}")
        if wrong:
            raise ConfigError("\n".join(wrong))

    def runner_options(self) -> dict[str, Any]:
        """The options that `Runner` takes besides its sizes."""
        return {
            "kernel": self.kernel,
            "threads": self.threads,
            "weights": self.weights,
            "draft_rows": draft_rows(self),
            "kv_budget": KVBudget(
                self.kv_memory,
                self.prefix_bytes + self.adapter_bytes,
                self.sharers if self.kv_memory is None else 1,
                whole=self.max_length is not None,
            ),
        }
