"""Runs sequences through one call of the runner: rows in, one token each out.

Greedy sequences touch no tensor if the runner already returned the likeliest token.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from pedro.engine.beam import BeamSequence
from pedro.engine.modulation import PreemptedState
from pedro.engine.runner import DecodeRow, PrefillRow, Runner
from pedro.engine.sampler import Logprob, SampleRow, greedy, sample
from pedro.engine.sequence import Output, Sequence, SequenceState
from pedro.engine.token_mask import likeliest
from pedro.errors import DeadlineError

if TYPE_CHECKING:
    from pedro.adapter_kinds import Adapter
    from pedro.engine.model_executor import Logits
    from pedro.engine.prefix_cache import PrefixCache
    from pedro.engine.schedule import PrefillGroup

NewToken = tuple[Sequence, int, Logprob | None]  # the token is -1 if there is none; beams use only that
Drafts = Mapping[Sequence, list[int]]  # tokens that may come next, of sequences that answer without beams or shapes


def prefill_row(sequence: Sequence, adapter: Adapter | None) -> PrefillRow:
    """The prefill row of a sequence, under `adapter` if that acts on its prompt. Rows saved at a preemption, or vectors
    cached with a prefix, replace the adapter."""
    state, sequence.preempted_state = sequence.preempted_state, None
    prompt_ids, conditioning_length = sequence.request.prompt_ids, sequence.conditioning_length
    prefix, start = sequence.prefix, 0
    if state is None and prefix is not None and prefix.rows is not None:
        state = PreemptedState(prefix.rows, adapter if adapter is not None and adapter.must_stay else None)
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
        places=places_of(sequence),
        num_cached=sequence.num_cached,
        borrowed=sequence.borrowed,
    )


def places_of(sequence: Sequence) -> tuple[int, ...]:
    """The kept blocks that it begins with."""
    return () if sequence.prefix is None else sequence.prefix.places


def first_tokens(runner: Runner, logits: Logits, groups: tuple[PrefillGroup, ...]) -> list[list[NewToken]]:
    """The first token of every answer, each from its group's one row of logits.

    All slots of a beam search then have the prompt. Other answers of a group get it before their next token (`settle`),
    since many copies at once would delay everything else.
    """
    rows = [row for row, group in enumerate(groups) for _ in group]
    sequences = [sequence for group in groups for sequence in group]
    plain = [i for i, sequence in enumerate(sequences) if not isinstance(sequence, BeamSequence)]
    made: dict[Sequence, NewToken] = {
        one[0]: one for one in _choose(logits, [sequences[i] for i in plain], [rows[i] for i in plain])
    }
    for row, sequence in zip(rows, sequences, strict=True):
        if isinstance(sequence, BeamSequence):
            made[sequence] = (sequence, _advance(sequence, logits.values[row : row + 1])[0], None)
    for group in groups:
        leader, *others = group
        if leader.width > 1:
            runner.copy(leader.slot, leader.slots[1:], leader.length, places_of(leader))
        for sequence in others:
            sequence.prompt_in = leader
        leader.lends_to = others
    return [[made[sequence] for sequence in group] for group in groups]


def output_of(
    sequence: Sequence,
    token_id: int,
    text: str,
    logprobs: list[Logprob] | None,
    prompt_logprobs: list[Logprob | None] | None,
) -> Output:
    """A step's output of an answer that continues."""
    return Output(
        request_id=sequence.request.id,
        index=sequence.index,
        token_ids=[token_id],
        text=text,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        prompt_tokens=len(sequence.request.prompt_ids),
        cached_tokens=sequence.cached_tokens,
        completion_tokens=len(sequence.output_ids),
    )


def late(sequence: Sequence) -> DeadlineError:
    """The error of an answer whose deadline has passed."""
    return DeadlineError(
        f"the deadline of {sequence.request.deadline_s:g} s passed after {len(sequence.output_ids)} tokens of "
        "answer; allow more time or request fewer tokens"
    )


def settle(runner: Runner, prefixes: PrefixCache, sequences: Iterable[Sequence]) -> None:
    """Have the slots of `sequences` hold their prompts, but for what they can read where it is kept."""
    for sequence in sequences:
        leader, sequence.prompt_in = sequence.prompt_in, None
        if leader is not None and sequence.state is not SequenceState.FINISHED:
            prefixes.follow(sequence, leader)
            runner.copy(leader.slot, [sequence.slot], len(sequence.request.prompt_ids), places_of(sequence))


def next_tokens(runner: Runner, sequences: tuple[Sequence, ...], drafts: Drafts) -> list[NewToken]:
    """One decode step: the next token of every sequence, and after a draft as many more as the model agrees with.
    All are settled."""
    singles: list[Sequence] = []
    beams: list[BeamSequence] = []
    for sequence in sequences:
        beams.append(sequence) if isinstance(sequence, BeamSequence) else singles.append(sequence)
    rows = [DecodeRow(s.slot, s.output_ids[-1], s.length - 1) for s in singles]
    for beam in beams:
        position = len(beam.request.prompt_ids) + beam.num_made - 1
        rows += [DecodeRow(slot, token_id, position) for slot, token_id in beam.last_tokens()]
    drafted = len(rows)
    for sequence, draft in drafts.items():
        rows += [DecodeRow(sequence.slot, token, sequence.length + at) for at, token in enumerate(draft)]
    logits = runner.decode(rows)
    if drafts:
        best = greedy(logits.values) if logits.best is None else logits.best
        if min(best) < 0:  # even masked out, non-finite keys of a draft would corrupt correct results
            for sequence, draft in drafts.items():
                runner.wipe(sequence.slot, sequence.length + len(draft), start=sequence.length)
            return next_tokens(runner, sequences, {})
        logits = logits._replace(best=best)
    made = _choose(logits, singles, None)
    if drafts:
        made += _confirmed(logits, {one[0]: one[1] for one in made}, drafts, drafted)
    moves, row = [], len(singles)
    for beam in beams:
        start = len(beam.request.prompt_ids)
        stop = start + beam.num_made
        finite, pairs = _advance(beam, logits.values[row : row + beam.width])
        made.append((beam, finite, None))
        moves.append((pairs, start, stop))
        row += beam.width
    for pairs, start, stop in moves:
        if pairs:
            runner.reorder(pairs, start, stop)
    return made


def _confirmed(logits: Logits, first: dict[Sequence, int], drafts: Drafts, row: int) -> list[NewToken]:
    """The tokens after the correct draft tokens, from the rows of logits from `row` on. `first`: the tokens before
    them.

    A row's logits equal those of a separate step, and are used only if all tokens before it were correct: the answer is
    the same, including its random numbers. Keys and values of wrong tokens are overwritten before they are read.
    """
    made: list[NewToken] = []
    starts = dict(zip(drafts, itertools.accumulate(map(len, drafts.values()), initial=row), strict=False))
    tokens, ahead = first, 0
    while sequences := [s for s, token in tokens.items() if drafts.get(s, [])[ahead : ahead + 1] == [token]]:
        ahead += 1
        chosen = _choose(logits, sequences, [starts[s] + ahead - 1 for s in sequences], drafts, ahead)
        tokens = {sequence: token for sequence, token, _ in chosen}
        made += chosen
    return made


def _choose(
    logits: Logits,
    sequences: list[Sequence],
    rows: list[int] | None,
    drafts: Drafts | None = None,
    ahead: int = 0,
) -> list[NewToken]:
    """A token for each of `sequences` from its row of logits (None: the first rows, in order), `ahead` draft tokens
    after its last token."""
    picky = [i for i, sequence in enumerate(sequences) if not sequence.plain]
    tokens = logits.best
    if tokens is None and len(picky) < len(sequences):
        tokens = greedy(logits.values)
    if tokens is None:
        made: list[NewToken] = [(sequence, -1, None) for sequence in sequences]
    elif rows is None:
        made = [(sequence, token, None) for sequence, token in zip(sequences, tokens, strict=False)]
    else:
        made = [(sequence, tokens[row], None) for sequence, row in zip(sequences, rows, strict=True)]
    if picky and tokens is not None:
        shaped = [i for i in picky if sequences[i].shaped]
        picky = [i for i in picky if not sequences[i].shaped]
        _hold_to_shape(made, shaped, logits, rows)
    if picky:
        indices = picky if rows is None else [rows[i] for i in picky]
        values = logits.values if indices == list(range(len(logits.values))) else logits.values[indices]
        samples = sample(values, [_sample_row(sequences[i], drafts, ahead) for i in picky])
        for i, one in zip(picky, samples, strict=True):
            made[i] = (sequences[i], -1 if sequences[i].fault else one.token_id, one.logprob)
    return made


def _hold_to_shape(made: list[NewToken], shaped: list[int], logits: Logits, rows: list[int] | None) -> None:
    """For those of `made` that are `shaped`, replaces the likeliest token by the likeliest that the shape allows. If
    the model follows the shape by itself, no full mask is computed."""
    places, masks = [], []
    for i in shaped:
        sequence, token, _ = made[i]
        if token >= 0 and not sequence.lets(token):
            bits = sequence.mask_bits()
            made[i] = (sequence, -1, None)
            if bits is not None:
                places.append(i)
                masks.append(bits)
    if places:
        native = logits.best is not None and logits.values.device.type == "cpu"
        found = likeliest(logits.values, places if rows is None else [rows[i] for i in places], masks, native)
        for i, token in zip(places, found, strict=True):
            made[i] = (made[i][0], token, None)


def _advance(beam: BeamSequence, logits: Any) -> tuple[int, list[tuple[int, int]]]:
    """A step of a beam search over its rows of logits: 0, or -1 if logits are not finite; pairs of slots to copy."""
    if min(greedy(logits)) < 0:
        return -1, []
    if beam.state is SequenceState.FINISHED:
        return 0, []
    return 0, beam.advance(logits)


def _sample_row(sequence: Sequence, drafts: Drafts | None, ahead: int) -> SampleRow:
    prompt, output = sequence.request.prompt_ids, sequence.output_ids
    if drafts is not None:
        output = [*output, *drafts[sequence][:ahead]]
    bits = sequence.mask_bits()
    return SampleRow(sequence.params, sequence.seed, sequence.index, prompt, output, sequence.barred, bits)
