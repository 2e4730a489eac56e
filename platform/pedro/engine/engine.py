"""The engine: schedule, run, accept. The caller resolves a ref to an adapter and its files.

`step` is called by one thread; `add`, `cancel` and the rest by any. The lock guards bookkeeping and is never held
while the model runs or an adapter loads.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pedro.engine.adapter_pool import AdapterPool
from pedro.engine.beam import BeamSequence
from pedro.engine.kv_budget import fits
from pedro.engine.prefix_cache import PrefixCache
from pedro.engine.request import Request, RequestProcessor
from pedro.engine.runner import Runner
from pedro.engine.sampler import Logprob
from pedro.engine.schedule import LONE_TOKENS, SHED, PrefillBudget, PrefillChunk, PrefillGroup, SchedulerLimits
from pedro.engine.scheduler import Scheduler
from pedro.engine.sequence import Output, Sequence, SequenceState
from pedro.engine.speculation import NO_DRAFTS, Speculator
from pedro.engine.steps import first_tokens, late, next_tokens, output_of, prefill_row, settle
from pedro.errors import PedroError, RateLimitError, UnavailableError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from pedro.adapter_kinds import Adapter
    from pedro.engine.adapter_state import PooledAdapter
    from pedro.engine.config import EngineConfig
    from pedro.engine.tensor_parallel import TensorParallel
    from pedro.model_protocols import TokenDecoder

log = logging.getLogger(__name__)
PromptLogprobs = list[Logprob | None] | None


class Engine:
    """Serves one backbone to many tenants in one continuous batch, and owns the model.

    `load(ref)` gives the directory of the adapter that `ref` names; it may block, and runs on a loader thread.
    `split`: the ranks with the other parts of the backbone, if `model` is only one of them.
    Raises BackboneError if the architecture is not supported, or not with `config.weights`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: TokenDecoder,
        config: EngineConfig,
        load: Callable[[str], Path],
        backbone_digest: str,
        split: TensorParallel | None = None,
    ) -> None:
        self.config = config
        self._processor = RequestProcessor(model, tokenizer, config)
        make_runner = partial(Runner, model) if split is None else split.make_runner
        self._runner = make_runner(config.max_batch, self._processor.context, **config.runner_options())
        sizes = self._runner.cache.blocks, self._runner.cache.block
        self._processor.limit(*sizes)
        self.max_length = self._processor.max_length
        self._speculator = Speculator(config, self._processor.vocab_size) if config.speculate != "off" else None
        self._scheduler = Scheduler(SchedulerLimits.of(config, *sizes))
        self._scheduler.foresee = self._foresee
        self._prefixes = PrefixCache(self._runner, config.prefix_bytes, config.share_bare_prefixes)
        self.forget_prefixes = self._prefixes.forget
        self._prefill_budget = PrefillBudget(config.prefill_stall) if self._runner.splits_prefills else None
        if self._prefill_budget is not None:
            self._scheduler.lone_tokens = min(LONE_TOKENS, config.prefill_tokens)

        def fetch(ref: str) -> Adapter:
            return self._runner.read_adapter(load(ref), backbone_digest)

        self.adapters = AdapterPool(fetch, config.adapter_bytes, self._adapters_changed, config.loaders)
        self._lock = threading.Lock()
        self._live: dict[str, list[Sequence]] = {}  # unfinished sequences by request id
        self._held: dict[Sequence, PooledAdapter[Adapter]] = {}  # adapters acquired for sequences
        self._ended: list[Sequence] = []  # sequences whose slots and adapters are not released yet
        self._looked_at_adapters = True  # whether the pool is unchanged since the last step
        self._outbox: list[Output] = []
        names = ("steps", "prompt_tokens", "completion_tokens", "finished", "failed", "preempted")
        self._counts = dict.fromkeys(names, 0)
        self.idle = True  # whether the last step had nothing to run
        self.on_change: Callable[[], None] = lambda: None  # called when there may be new work, from any thread
        self._runner.on_lost(self._notify)

    def add(self, request: Request) -> None:
        """Queue a request. Its outputs come from `step`.

        Raises PedroError if the request can never run (too long, a token outside the vocabulary, an id in use) or its
        adapter just failed to load, and OverloadedError if the queue is full. If another tenant has more requests in a
        full queue, the newest of those ends with RateLimitError instead.
        """
        sequences = self._processor.process(request)
        with self._lock:
            if request.id in self._live:
                raise PedroError(f"request id: {request.id!r} is in use; give each request its own", param="id")
            for shed in self._scheduler.add(sequences):
                self._finish(shed, "error", error=RateLimitError(SHED))
            try:
                if request.adapter is not None:
                    self.adapters.add_waiters(request.adapter, len(sequences))
            except PedroError:
                for sequence in sequences:
                    self._scheduler.finish(sequence)
                raise
            self._live[request.id] = sequences
        self._notify()

    def cancel(self, request_id: str) -> None:
        """End a request; its sequences emit a last output "cancelled". Unknown and finished ids are ignored."""
        with self._lock:
            for sequence in list(self._live.get(request_id, ())):
                self._finish(sequence, "cancelled")
        self._notify()

    def step(self) -> list[Output]:
        """One step: schedule, run, return the outputs. Empty if nothing could run."""
        if self.lost is not None:
            self.fail_all(self.lost)
            return self.take_outputs()
        self._prefixes.keep()
        with self._lock:
            self._drop_failed_and_late()
            self._release_ended()  # before slots are reused
            if not self._looked_at_adapters:
                self._looked_at_adapters = True
                self._scheduler.unpark()
            self._prefixes.plan()
            plan = self._scheduler.schedule(self._admit)
            self.idle = not plan
        for sequence in plan.preempted:
            settle(self._runner, self._prefixes, (*sequence.lends_to, sequence))
        for sequence in plan.preempted:
            sequence.preempted_state = self._runner.save_state(sequence.slot)
            self._prefixes.answered(sequence)
            self._prefixes.keep()
            self._prefixes.release(sequence)
            self._runner.release(sequence.slot)
            sequence.slots = []
        if plan.prefill:
            self._run_prefill(plan.prefill)
        if plan.decode:
            self._run_decode(plan.decode)
        self._counts["steps"] += bool(plan)
        self._counts["preempted"] += len(plan.preempted)
        return self.take_outputs()

    def take_outputs(self) -> list[Output]:
        """The outputs since the last call. `step` returns them; if it raised, they can still be taken here."""
        with self._lock:
            self._release_ended()
            outputs, self._outbox = self._outbox, []
        return outputs

    def has_work(self) -> bool:
        """Whether any request is unfinished or an output has not been returned yet."""
        with self._lock:
            return bool(self._live or self._outbox)

    @property
    def lost(self) -> PedroError | None:
        """Why the engine can no longer run requests."""
        return self._runner.lost

    def next_deadline(self) -> float | None:
        """The earliest deadline of a request, on the monotonic clock."""
        with self._lock:
            return self._scheduler.next_deadline()

    def fail_all(self, error: PedroError) -> None:
        """End every request with `error`."""
        with self._lock:
            for sequences in list(self._live.values()):
                for sequence in list(sequences):
                    self._finish(sequence, "error", error=error)

    def stats(self) -> dict[str, Any]:
        """Running and waiting requests, totals since the start, metrics of the adapter pool, and what fits."""
        with self._lock:
            told = {
                **self._counts,
                "running": len(self._scheduler.running),
                "waiting": self._scheduler.num_waiting,
                "waiting_by_tenant": self._scheduler.waiting_by_tenant(),
                "slots": self.config.max_batch,
                **self._runner.stats(),
                "slots_free": self._scheduler.slots_free,
                "kv_blocks_used": self._scheduler.kv.used,
                "max_length": self.max_length,
                "context": self._processor.context,
                "prefixes": self._prefixes.stats(),
                "speculation": NO_DRAFTS if self._speculator is None else self._speculator.stats(),
                "adapters": self.adapters.stats(),
            }
            return {**told, "room": fits(told)}

    def close(self) -> None:
        """Stop loading adapters and remove the engine's hooks from the model."""
        self.adapters.close()
        self._runner.close()

    def _admit(self, sequence: Sequence) -> bool:
        """Acquire the adapter that the sequence's prefill needs; False while that loads."""
        ref = sequence.awaits
        if ref is not None and sequence not in self._held:
            entry = self.adapters.acquire(ref)
            if entry is None:
                return False
            self._held[sequence] = entry
            self.adapters.remove_waiter(ref)
        self._prefixes.look_up(sequence, self._adapter_of(sequence))
        return True

    def _foresee(self, sequence: Sequence) -> bool:
        """Set what the sequence would find cached if it started now; False while the adapter that it needs loads."""
        ref = sequence.awaits
        adapter = self._adapter_of(sequence) or (None if ref is None else self.adapters.ready(ref))
        if ref is not None and adapter is None:
            return False
        self._prefixes.foresee(sequence, adapter)
        return True

    def _adapter_of(self, sequence: Sequence) -> Adapter | None:
        entry = self._held.get(sequence)
        return None if entry is None else entry.adapter

    def _release_ended(self) -> None:
        """Release the slots and adapters of ended sequences. Only on the step thread: the model may be using them."""
        for sequence in self._ended:  # all before any slot is freed: copies made here may take its blocks
            settle(self._runner, self._prefixes, sequence.lends_to)
        for sequence in self._ended:
            self._prefixes.release(sequence)
            for slot in sequence.slots:
                self._runner.release(slot)
            sequence.slots = []
            self._release_adapter(sequence)
        self._ended.clear()

    def _release_adapter(self, sequence: Sequence) -> None:
        entry = self._held.pop(sequence, None)
        if entry is not None:
            self.adapters.release(entry)

    def _drop_failed_and_late(self) -> None:
        for ref, error in self.adapters.take_failures():
            for sequence in self._scheduler.waiting_for(ref):
                self._finish(sequence, "error", error=error)
        for sequence in self._scheduler.expired(time.monotonic()):
            self._finish(sequence, "error", error=late(sequence))

    def _run_prefill(self, part: PrefillChunk) -> None:
        leaders = [group[0] for group in part.groups]
        if all(sequence.state is SequenceState.FINISHED for sequence in part.sequences):
            with self._lock:
                if not part.begins:
                    self._runner.abandon()
                self._end_prefill(part.groups)
            return
        read = False
        try:
            if part.begins:
                self._runner.begin([prefill_row(sequence, self._adapter_of(sequence)) for sequence in leaders])
                self._prefixes.begun(part.sequences)
            budget = self._prefill_budget
            with nullcontext() if budget is None else budget.timed(part, self._scheduler):
                self._runner.advance(part.until)
            if not part.ends:
                return
            embeddings = self._runner.embeddings()
            logits, prompt_logprobs = self._runner.end()
            read = True
            made = first_tokens(self._runner, logits, part.groups)
        except Exception:  # any error in the model ends only these requests
            log.exception("prefill failed for requests %s", ", ".join(s.request.id for s in leaders))
            with self._lock:
                if not read:  # else the runner dropped it, and another prefill, paused for it, is in progress
                    self._runner.abandon()
                self._fail(part.sequences)
                self._end_prefill(part.groups)
            return
        with self._lock:
            self._end_prefill(part.groups)
            for group, logprobs, embedding in zip(made, prompt_logprobs, embeddings, strict=True):
                leader = group[0][0]
                prompt = len(leader.request.prompt_ids)
                alive = [one[0] for one in group if one[0].state is not SequenceState.FINISHED]
                self._prefixes.prefilled(group, counts=bool(alive))
                self._counts["prompt_tokens"] += alive[0].count_prompt() if alive else 0
                for one in group:
                    self._accept(*one, None if logprobs is None else logprobs[:prompt], embedding)

    def _run_decode(self, sequences: tuple[Sequence, ...]) -> None:
        began, speculator = time.perf_counter(), self._speculator
        try:
            settle(self._runner, self._prefixes, sequences)
            drafts = {} if speculator is None else speculator.drafts(sequences)
            made = next_tokens(self._runner, sequences, drafts)
        except Exception:  # as above
            log.exception("decoding failed for requests %s", ", ".join(s.request.id for s in sequences))
            with self._lock:
                self._fail(sequences)
            return
        seconds = time.perf_counter() - began
        if self._prefill_budget is not None:
            rows = sum(s.width for s in sequences) + sum(map(len, drafts.values()))
            self._prefill_budget.record_decode(seconds, rows)
            self._prefill_budget.keep_steps_short(self._scheduler)
        with self._lock:
            for one in made:
                self._accept(*one)
        if speculator is not None:
            speculator.record(sequences, drafts, seconds)

    def _end_prefill(self, groups: tuple[PrefillGroup, ...]) -> None:
        """The vectors are generated: release adapters that decoding does not need."""
        for sequence in itertools.chain.from_iterable(groups):
            entry = self._held.get(sequence)
            if sequence.state is SequenceState.FINISHED:
                self._ended.append(sequence)
            elif entry is not None and not (entry.adapter is not None and entry.adapter.must_stay):
                self._release_adapter(sequence)
        self._scheduler.prefilled(groups)

    def _accept(
        self,
        sequence: Sequence,
        token_id: int,
        logprob: Logprob | None = None,
        prompt_logprobs: PromptLogprobs = None,
        embedding: bytes | None = None,
    ) -> None:
        """Append its token to a running sequence; ignored if it has finished meanwhile."""
        if token_id < 0:
            log.error("request %s: %s", sequence.request.id, sequence.fault or "the model's logits are not finite")
            settle(self._runner, self._prefixes, sequence.lends_to)
            for slot in sequence.slots:
                self._runner.wipe(slot)
            self._fail((sequence,))
        if sequence.state is SequenceState.FINISHED:
            return
        if sequence.max_tokens == 0:
            self._finish(sequence, "length", prompt_logprobs=prompt_logprobs, embedding=embedding)
            return
        self._scheduler.charge(sequence, sequence.width)
        if isinstance(sequence, BeamSequence):
            sequence.prompt_logprobs = prompt_logprobs or sequence.prompt_logprobs
            if sequence.done:
                self._finish(sequence, "length")
            return
        self._counts["completion_tokens"] += 1
        text, reason = sequence.append(token_id)
        logprobs = None if logprob is None else [logprob]
        if reason is None:
            self._outbox.append(output_of(sequence, token_id, text, logprobs, prompt_logprobs))
        else:
            fields = {"logprobs": logprobs, "prompt_logprobs": prompt_logprobs}
            self._finish(sequence, reason, token_ids=[token_id], text=text, **fields)

    def _fail(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            if sequence.state is not SequenceState.FINISHED:
                error = UnavailableError("the engine failed on this request; try again", code="engine_error")
                self._finish(sequence, "error", error=sequence.fault or self.lost or error)

    def _finish(self, sequence: Sequence, reason: str, **fields: Any) -> None:
        """End a sequence in any state, with its last output."""
        was = sequence.state
        if was is SequenceState.WAITING and sequence.awaits is not None and sequence not in self._held:
            self.adapters.remove_waiter(sequence.awaits)
        self._scheduler.finish(sequence)
        if was is not SequenceState.PREFILLING:
            self._ended.append(sequence)
        if was is SequenceState.RUNNING and reason in ("stop", "length"):
            self._prefixes.answered(sequence)
        self._counts["failed" if fields.get("error") else "finished"] += 1
        outputs = sequence.last_outputs(reason, **fields)
        if isinstance(sequence, BeamSequence):  # only the tokens of its answers count, which are known now
            self._counts["completion_tokens"] += sum(output.completion_tokens for output in outputs)
        self._outbox += outputs
        siblings = self._live[sequence.request.id]
        siblings.remove(sequence)
        if not siblings:
            del self._live[sequence.request.id]

    def _adapters_changed(self) -> None:
        self._looked_at_adapters = False
        self._notify()

    def _notify(self) -> None:
        self.on_change()
