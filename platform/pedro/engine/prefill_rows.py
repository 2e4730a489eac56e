"""From a sequence that starts to the row that the runner reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pedro.engine.runner import PrefillRow

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.sequence import Sequence


def prefill_row(sequence: Sequence, adapter: Adapter | None) -> PrefillRow:
    """Takes what was saved of a preempted sequence."""
    preempted_state, sequence.preempted_state = sequence.preempted_state, None
    return PrefillRow(
        slot=sequence.slot,
        token_ids=sequence.prefill_ids,
        conditioning_length=sequence.conditioning_length,
        adapter=adapter if preempted_state is None else None,
        preempted_state=preempted_state,
        prompt_logprobs=None if sequence.resumes else sequence.params.prompt_logprobs,
        pooling=sequence.params.pooling,
        prefix=sequence.prefix,
    )
