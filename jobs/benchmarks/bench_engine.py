"""Our engine over a random backbone, with the few moves that benchmarks make. Uses its public face only."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jobs.benchmarks.model_sizes import ModelSize, make_model
from jobs.benchmarks.timeline import Timeline
from pedro.engine import Engine, EngineConfig, Output, Request, SamplingParams
from pedro.process import configure_serving_process, set_torch_threads

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.model_protocols import TokenDecoder

IDLE_S = 0.0005
LOAD_TIMEOUT_S = 120


class SilentTokenizer:
    """A tokenizer whose tokens have no text: no engine turns tokens into text while it is measured."""

    eos_token_id: int | None = None

    def decode(self, _token_ids: list[int], /, **_options: Any) -> str:
        return ""


class BenchEngine:
    """An Engine on a random model of `size`; adapter refs are directories. `options` are those of EngineConfig.

    The process is configured as a replica of the server configures its own, PyTorch's threads among the rest.
    """

    def __init__(
        self,
        size: ModelSize,
        device: str = "cpu",
        dtype: str | None = None,
        model: PreTrainedModel | None = None,
        tokenizer: TokenDecoder | None = None,
        digest: str | None = None,
        **options: Any,
    ) -> None:
        many = {"adapter_bytes": 8 << 30, "max_waiting": 100_000, "max_waiting_per_tenant": 100_000}
        options = {"threads": _threads_asked_for(), **many, **options}
        made = model if model is not None else make_model(size, device, dtype)
        self.size = size
        self.engine = Engine(made, tokenizer or SilentTokenizer(), EngineConfig(**options), Path, digest or size.digest)
        configure_serving_process(torch.get_num_threads())
        if self.engine.stats()["kernel"] == "native":
            set_torch_threads(1)  # else its threads spin after each of its few calls, on cores that the kernel needs
        self._names = itertools.count()

    def request(
        self,
        prompt: list[int],
        ref: str | None,
        new: int,
        tenant: str | None = None,
        n: int = 1,
        conditioning_length: int | None = None,
        **params: Any,
    ) -> Request:
        """A request of exactly `new` tokens, of a tenant of its own unless named: a tenant with more than its share of
        an engine that others used a moment ago is held back, which is not what is measured here."""
        sampling = SamplingParams(max_tokens=new, ignore_eos=True, **params)
        name = str(next(self._names))
        return Request(
            name,
            prompt,
            tenant=tenant or name,
            adapter=ref,
            params=sampling,
            n=n,
            conditioning_length=conditioning_length,
        )

    def answer(
        self,
        asked: list[list[int]],
        refs: Sequence[str | None],
        new: int,
        beams: int = 1,
        tenants: Sequence[str] | None = None,
    ) -> Timeline:
        """All prompts at once, to their ends; `tenants` are the requests', by row."""
        extra: dict[str, Any] = {"num_beams": beams} if beams > 1 else {}
        names: Sequence[str | None] = tenants or [None] * len(asked)
        rows = zip(asked, refs, names, strict=True)
        requests = [self.request(ids, ref, new, tenant, **extra) for ids, ref, tenant in rows]
        timeline = Timeline()
        for request in requests:
            self.engine.add(request)
        self.drain(timeline)
        return timeline

    def drain(self, timeline: Timeline, between: Callable[[], bool] = lambda: False) -> None:
        """Step until nothing is left; `between` is called before each step and says whether more will come."""
        while (more := between()) or self.engine.has_work():
            outputs = self.engine.step()
            take(outputs, timeline)
            if self.engine.idle and not outputs and (more or self.engine.has_work()):
                time.sleep(IDLE_S)

    def load(self, refs: Sequence[str]) -> None:
        """Make the adapters resident before anything is timed."""
        if not set(refs) - set(self.resident()):
            return
        end = time.monotonic() + LOAD_TIMEOUT_S
        for ref in refs:
            self.engine.adapters.preload(ref)
        while set(refs) - set(self.resident()):
            failures = self.engine.adapters.take_failures()
            if failures:
                raise failures[0][1]
            if time.monotonic() > end:
                raise TimeoutError(f"{len(refs)} adapters were not resident within {LOAD_TIMEOUT_S} s")
            time.sleep(0.002)

    def resident(self) -> list[str]:
        """The refs that a request need not wait for."""
        return [ref for ref, entry in self.engine.adapters.residents().items() if entry.state.value == "ready"]

    def close(self) -> None:
        self.engine.close()


def take(outputs: Sequence[Output], timeline: Timeline) -> None:
    """Note the outputs' tokens. Raises the error of a request that failed: a figure without it would be a lie."""
    moment = time.perf_counter()
    for output in outputs:
        if output.error is not None:
            raise output.error
        if output.token_ids:
            timeline.take(f"{output.request_id}/{output.index}", len(output.token_ids), moment)


def use_threads(count: int) -> None:
    """Have matrix products use `count` threads in this process, whoever multiplies."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    torch.set_num_threads(count)


def _threads_asked_for() -> int | None:
    count = os.environ.get("OMP_NUM_THREADS", "")
    return int(count) if count.isdigit() else None
