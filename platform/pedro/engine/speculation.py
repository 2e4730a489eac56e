"""Drafts an answer's next tokens by looking up its last tokens in its prompt and in itself (prompt lookup).

A draft goes through the model in the same step as the token before it, one row per token; `steps` keeps the tokens that
the model agrees with, so that answers do not change. These rows need no special treatment: PEDRO's vectors were
generated during prefill and scale every later token alike, so each row uses its slot's, as it would in a step of its
own.

This file decides which drafts are worth their rows. It touches no tensors. Prompt lookup is Saxena's
(github.com/apoorvumang/prompt-lookup-decoding); the settings have the names of vLLM's method "ngram".
"""

from __future__ import annotations

import math
import time
from array import array
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.engine.config import EngineConfig
    from pedro.engine.sequence import Sequence

SPECULATIONS = ("off", "ngram")
MOST_ROWS = 64  # of drafts per step: beyond this a CPU is compute-bound
NEWS = 0.25  # weight of the newest measurement
REMEASURED = 32  # steps with drafts after which one without drafts is timed again
FIRST_ROW = 0.05  # assumed cost of a row beside one other, until measured
MOST_COST, TOO_DEAR = 1.5, 0.95
FORGETTING = 0.98  # per step, of a cost that was too high, so that drafts are tried again
EARNED, RICH, CREDIT = 0.01, 8.0, 4.0  # tokens: credit per generated token, maximum and initial credit
KEPT = 0.8  # weight of an answer's earlier drafts in predicting its next
MOST_PAUSE = 64
NO_DRAFTS = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}


class DraftCosts:
    """The cost of a draft row, in tokens that a step would generate in its time, by the number of rows per step.

    If a step of n rows without drafts takes t and another row takes c, a draft pays off if more than n c / t of its
    tokens are right: few while a step is memory-bound, all if it is compute-bound.
    """

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # seconds of a step without drafts, by number of rows
        self._cost: dict[int, float] = {}  # by the number of rows, rounded to a power of two
        self._since: dict[int, int] = {}  # steps with drafts since the last one without, by number of rows

    def of(self, rows: int) -> float | None:
        """The cost of a row beside `rows`; None if the next step must have no drafts, to time one without."""
        if rows not in self._plain or self._since.get(rows, 0) >= REMEASURED:
            return None
        return self._cost.get(rows.bit_length(), first_cost(rows))

    def record(self, rows: int, drafted: int, seconds: float) -> None:
        """A step of `rows` rows and `drafted` more took `seconds`."""
        plain, kind = self._plain.get(rows), rows.bit_length()
        if not drafted:
            self._plain[rows] = seconds if plain is None else plain + NEWS * (min(seconds, 2 * plain) - plain)
            self._since[rows] = 0
            if self._cost.get(kind, 0.0) > TOO_DEAR:
                self._cost[kind] *= FORGETTING
        elif plain:
            cost = min(MOST_COST, max(0.0, (seconds - plain) / drafted * rows / plain))
            before = self._cost.get(kind, first_cost(rows))
            self._cost[kind] = before + NEWS * (cost - before)
            self._since[rows] = self._since.get(rows, 0) + 1

    def of_search(self, rows: int, seconds: float) -> float:
        """The cost of searching for drafts in a step of `rows` rows, in tokens. At most a tenth of the step's: the
        thread may have been preempted."""
        plain = self._plain.get(rows)
        return rows * min(0.1, seconds / plain) if plain else 0.0


class DraftHistory:
    """The searchable tokens of one answer and its prompt, and the success of its drafts.

    `until`: how many tokens the answer must have for its next draft.
    """

    def __init__(self, prompt_ids: list[int], typecode: str, until: float = 0) -> None:
        self.until = until
        self.start = 0  # tokens of the answer when the draft was made
        self._ids: array[int] = array(typecode, prompt_ids)
        self._prompt = len(prompt_ids)
        self._right, self._asked = 1.0, 2.0  # of the drafted tokens that were checked
        self._pause = 0  # tokens to wait after drafts without success

    def find(self, output_ids: list[int], shortest: int, longest: int) -> int:
        """The end of the latest earlier occurrence of the last tokens: `longest` of them, or fewer, but at least
        `shortest`. -1 if they did not occur, which is the usual case."""
        ids, size = self._ids, self._ids.itemsize
        ids.extend(output_ids[len(ids) - self._prompt :])
        text = ids.tobytes()
        at = _latest(text, shortest * size, size)
        if at < 0:
            return -1
        for more in range(min(longest, len(ids) - 1), shortest, -1):
            longer = _latest(text, more * size, size)
            if longer >= 0:
                return longer + more
        return at + shortest

    def read(self, start: int, count: int) -> list[int]:
        """`count` tokens from `start` on; past the end, repeats the tokens since `start`."""
        tokens = self._ids[start : start + count].tolist()
        return (tokens * -(-count // len(tokens)))[:count]

    @property
    def proven(self) -> bool:
        """Whether most of what was drafted was right."""
        return self._right > self._asked / 2

    def length(self, cost: float, most: int) -> int:
        """The length of the next draft: each of its tokens should be right with a probability above `cost`. One token
        if even the first is not; such drafts are made rarely."""
        chance = self._right / self._asked
        if chance <= cost:
            return 1
        return most if cost <= 0 or chance >= 1 else min(most, int(math.log(cost) / math.log(chance)))

    def judge(self, drafted: int, right: int, cost: float) -> None:
        """Of a draft of `drafted` tokens the first `right` were correct."""
        self._right = KEPT * self._right + right
        self._asked = KEPT * self._asked + min(drafted, right + 1)
        worth = right and self._right / self._asked > cost
        self._pause = 0 if worth else min(MOST_PAUSE, 2 * self._pause + 1)
        self.until = self.start + 1 + right + self._pause


class Speculator:
    """Makes the drafts of a step, and learns from their results. Used on the step thread.

    Drafts are paid from a credit, in tokens: each generated token earns a hundredth, accepted draft tokens are added,
    and the cost of draft rows and of the search is subtracted. So useless drafts cost at most a hundredth of the
    tokens. If an answer's drafts were mostly right, the next one is charged only after its result is known.
    """

    def __init__(self, config: EngineConfig, vocabulary: int) -> None:
        self._most = config.num_speculative_tokens
        self._shortest, self._longest = config.prompt_lookup_min, config.prompt_lookup_max
        self._rows = draft_rows(config)
        self._typecode = "H" if vocabulary <= 1 << 16 else "I"  # small items are faster to search
        self.costs = DraftCosts()
        self._cost, self._searched_s = 0.0, 0.0  # of this step: the cost of a row, and the time of the search
        self._account = CREDIT
        self._counts = dict(NO_DRAFTS)

    def drafts(self, sequences: tuple[Sequence, ...]) -> dict[Sequence, list[int]]:
        """The next step's drafts by sequence; none for sequences where none pays off."""
        cost = self.costs.of(sum(sequence.width for sequence in sequences))
        most = min(self._most, self._rows // len(sequences))
        made: dict[Sequence, list[int]] = {}
        if cost is None or cost > TOO_DEAR or not most or self._account <= 0:
            return made
        self._cost, account, began = cost, self._account, time.perf_counter()
        for sequence in sequences:
            history, done = sequence.drafting, len(sequence.output_ids)
            if history is None:
                history = sequence.drafting = self._begun(sequence)
            if done < history.until:
                continue
            at = history.find(sequence.output_ids, self._shortest, self._longest)
            if at < 0:
                continue
            length = min(history.length(cost, most), sequence.tokens_left - 1)
            if not history.proven and cost * length > account:
                length = int(account / cost)
            if length > 0:
                history.start = done
                made[sequence] = history.read(at, length)
                account -= 0 if history.proven else cost * length
        self._searched_s = time.perf_counter() - began
        return made

    def _begun(self, sequence: Sequence) -> DraftHistory:
        """Beams and answers with a mask have no drafts, nor do others before `min_tokens`."""
        never = sequence.width > 1 or sequence.request.new_mask is not None
        return DraftHistory(
            sequence.request.prompt_ids, self._typecode, math.inf if never else sequence.params.min_tokens
        )

    def record(self, sequences: tuple[Sequence, ...], drafts: Mapping[Sequence, list[int]], seconds: float) -> None:
        """The step took `seconds`, and its sequences have their tokens."""
        rows, drafted = sum(sequence.width for sequence in sequences), sum(map(len, drafts.values()))
        spent = self._cost * drafted + self.costs.of_search(rows, self._searched_s)
        self._searched_s = 0.0
        self.costs.record(rows, drafted, seconds)
        won = 0
        for sequence, draft in drafts.items():
            history = sequence.drafting
            assert history is not None, "created with the draft"
            right = max(0, len(sequence.output_ids) - history.start - 1)
            history.judge(len(draft), right, self._cost)
            won += right
        self._counts["drafts"] += len(drafts)
        self._counts["draft_tokens"] += drafted
        self._counts["accepted_tokens"] += won
        self._account = min(RICH, self._account + EARNED * len(sequences) + won - spent)

    def stats(self) -> dict[str, int]:
        """Drafts so far, their tokens, and how many of these became part of an answer."""
        return dict(self._counts)


def first_cost(rows: int) -> float:
    """The assumed cost of a row beside `rows` before any measurement: each adds a fixed share of the time of one."""
    return FIRST_ROW * rows / (1 + FIRST_ROW * (rows - 1))


def draft_rows(config: EngineConfig) -> int:
    """Rows of a step available to drafts."""
    return 0 if config.speculate == "off" else min(MOST_ROWS, config.max_batch * config.num_speculative_tokens)


def _latest(text: bytes, length: int, size: int) -> int:
    """The earlier position of the last `length` bytes of `text`, in tokens of `size` bytes; -1 if there is none."""
    wanted, end = text[-length:], len(text) - size
    while (at := text.rfind(wanted, 0, end)) >= 0:
        if at % size == 0:
            return at // size
        end = at + length - 1
    return -1
