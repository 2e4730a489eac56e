"""Measures the engine beside its peers and against its own targets, and the platform around it: `python -m jobs.bench`.

One subject a file. Every engine runs in a process of its own (`workers`), all stay up, and one computes at a time, so
that rounds interleave. Most need the standard library, torch, transformers and peft, and run on a bare GPU box;
`server_benchmarks` needs Ray and a registry; `workers.vllm` also runs in a Python that has none of our dependencies.
"""
