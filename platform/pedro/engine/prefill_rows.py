"""From a sequence that starts to the row that the runner reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.engine.modulation import PreemptedState
from pedro.engine.runner import PrefillRow

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.sequence import Sequence


def prefill_row(sequence: Sequence, adapter: Adapter | None) -> PrefillRow:
    """What a sequence has to read, under `adapter` as far as that acts on its prompt. What was saved of a preempted
    sequence, or vectors that were kept with a prefix, stand in for the adapter."""
    state, sequence.preempted_state = sequence.preempted_state, None
    prompt_ids, conditioning_length = sequence.request.prompt_ids, sequence.conditioning_length
    prefix, start = sequence.prefix, 0
    if state is None and prefix is not None and prefix.rows is not None:
        state = PreemptedState(prefix.rows, adapter if adapter is not None and adapter.low_rank else None)
    if state is not None:
        adapter, start = None, state.start
    elif adapter is not None:
        acts = adapter.start_in(prompt_ids, conditioning_length)
        conditioning_length = adapter.conditioned_by(prompt_ids[:conditioning_length])
        adapter, start = (None, 0) if acts is None else (adapter, acts)
    return PrefillRow(
        slot=sequence.slot,
        token_ids=sequence.prefill_ids,
        conditioning_length=conditioning_length,
        adapter=adapter,
        preempted_state=state,
        prompt_logprobs=None if sequence.resumes else sequence.params.prompt_logprobs,
        pooling=sequence.params.pooling,
        start=start,
        places=() if prefix is None else prefix.places,
        num_cached=sequence.num_cached,
    )
