"""A process that holds one engine and runs it when told: `python -m jobs.benchmarks.workers KIND`.

The first line on stdin is the set-up, each further one an order; each is answered by one line on stdout, with the
figures or {"error"}. What libraries print goes to stderr. The end of stdin ends it. Standard library only, so that any
Python can run it; what a kind needs, its module imports.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import traceback

KINDS = {
    "ours": ("jobs.benchmarks.workers.ours", "Ours"),
    "generate": ("jobs.benchmarks.workers.generate", "Generate"),
    "continuous": ("jobs.benchmarks.workers.generate", "ContinuousBatching"),
    "peft": ("jobs.benchmarks.workers.peft_generate", "PeftGenerate"),
    "http": ("jobs.benchmarks.workers.http_client", "HttpClient"),
    "tenant": ("jobs.benchmarks.workers.tenant_client", "TenantClient"),
    "train": ("jobs.benchmarks.workers.train", "OurTrainer"),
    "train-hf": ("jobs.benchmarks.workers.train", "HfTrainer"),
    "train-packing": ("jobs.benchmarks.workers.train_packing", "BothWays"),
    "train-together": ("jobs.benchmarks.workers.train_together", "Together"),
    "train-group": ("jobs.benchmarks.workers.train_group", "GroupWorker"),
    "train-quantised": ("jobs.benchmarks.workers.train_quantised", "QuantisedTrainer"),
    "replica": ("jobs.benchmarks.workers.replica", "Replica"),
    "roofline": ("jobs.benchmarks.workers.roofline", "Roofline"),
    "prefix": ("jobs.benchmarks.workers.prefix", "Prefix"),
    "prefix-llamacpp": ("jobs.benchmarks.workers.prefix_peers", "LlamaCpp"),
    "prefix-vllm": ("jobs.benchmarks.workers.prefix_peers", "Vllm"),
    "vllm": ("jobs.benchmarks.workers.vllm", "Vllm"),
}


def main(kind: str) -> None:
    """Serve orders until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, name = KINDS[kind]
    engine = None
    for line in sys.stdin:
        try:
            order = json.loads(line)
            if engine is None:
                engine = getattr(importlib.import_module(module), name)(order)
                result = {"ready": True, **getattr(engine, "facts", {})}
            else:
                result = {**engine.run(order), "peak_bytes": peak_bytes()}
        except Exception as error:  # noqa: BLE001 whatever a peer raises is the parent's to report
            traceback.print_exc()
            result = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:300]}
        print(json.dumps(result), file=answers)
        if engine is None:
            break
    answers.flush()
    os._exit(0)  # engines leave threads behind


def peak_bytes() -> int:
    """The most memory this process has used: the accelerator's where it used one, else its resident set."""
    import resource

    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main(sys.argv[1])
