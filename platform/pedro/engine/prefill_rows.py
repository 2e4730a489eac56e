"""From a sequence that starts to the row that the runner reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.engine.modulation import PreemptedState
from pedro.engine.runner import PrefillRow

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.sequence import Sequence


def prefill_row(sequence: Sequence, adapter: Adapter | None) -> PrefillRow:
    """Takes what was saved of a preempted sequence. Vectors that were kept with a prefix stand in for the adapter."""
    state, sequence.preempted_state = sequence.preempted_state, None
    prefix = sequence.prefix
    if state is None and prefix is not None and prefix.rows is not None:
        state = PreemptedState(prefix.rows, adapter if adapter is not None and adapter.low_rank else None)
    return PrefillRow(
        slot=sequence.slot,
        token_ids=sequence.prefill_ids,
        conditioning_length=sequence.conditioning_length,
        adapter=adapter if state is None else None,
        preempted_state=state,
        prompt_logprobs=None if sequence.resumes else sequence.params.prompt_logprobs,
        pooling=sequence.params.pooling,
        places=() if prefix is None else prefix.places,
        num_cached=sequence.num_cached,
    )
