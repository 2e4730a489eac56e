"""Measures the engine beside its peers, and against its own targets. Knows nothing of Ray, HTTP servers or registries.

One subject a file. Every engine runs in a process of its own (`workers`), all stay up, and one computes at a time, so
that rounds interleave. Standard library, torch, transformers, peft: it runs on a bare GPU box; `workers.vllm` also runs
in a Python that has none of our dependencies.
"""
