"""Serves one frozen backbone to many tenants by continuous batching, without HTTP, Ray or a registry.

`Engine.step` is the outline: the scheduler decides who runs (no tensors), the runner runs them (no policy), the
sampler chooses tokens, the engine returns the outputs. `EngineThread` runs this loop on a thread for a server.
"""

from pedro.engine.config import EngineConfig
from pedro.engine.engine import Engine
from pedro.engine.engine_thread import EngineThread
from pedro.engine.request import Request, SamplingParams
from pedro.engine.sampler import Logprob
from pedro.engine.sequence import Output, Timing

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineThread",
    "Logprob",
    "Output",
    "Request",
    "SamplingParams",
    "Timing",
]
