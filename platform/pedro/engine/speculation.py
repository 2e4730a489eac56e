"""Guesses what an answer says next by looking its last tokens up in its prompt and in itself (prompt lookup).

A guess, the draft, goes through the model in the step of the token before it, a row a token; `steps` keeps what the
model agrees with, so that answers stay as they are. Nothing else is special about those rows: PEDRO's vectors were made
when the prompt was read and scale every later token alike, so each row takes its slot's, as it would in its own step.

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
MOST_ROWS = 64  # of a step's drafts: by then a CPU computes for as long as it reads weights
NEWS = 0.25  # weight of the newest measurement
REMEASURED = 32  # steps with drafts, after which one without them tells anew what that takes
FIRST_ROW = 0.05  # what a row adds to a step of one, until it is known
MOST_COST, TOO_DEAR = 1.5, 0.95
FORGETTING = 0.98  # of what was too dear, a step: it is tried again
EARNED, RICH, CREDIT = 0.01, 8.0, 4.0  # tokens: what each token made earns, and the account's bound and beginning
KEPT = 0.8  # of what an answer's former drafts say about its next
MOST_PAUSE = 64
NO_DRAFTS = {"drafts": 0, "draft_tokens": 0, "accepted_tokens": 0}


class DraftCosts:
    """What a row of a draft costs, in tokens that all rows would have made in its time, by how many rows a step has.

    With n rows and no drafts a step takes t, and a row more takes c: a draft pays where more than n c / t of its tokens
    are right. That is little while a step waits for memory, and all of it where the step computes.
    """

    def __init__(self) -> None:
        self._plain: dict[int, float] = {}  # seconds of a step without drafts, by its rows
        self._cost: dict[int, float] = {}  # by the rows' power of two
        self._since: dict[int, int] = {}  # steps with drafts since the last one without, by its rows

    def of(self, rows: int) -> float | None:
        """The cost of a row beside `rows`; None where the next step is to have none, to learn what that takes."""
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
        """What it cost to look for drafts in a step of `rows` rows, in tokens. No more than a tenth of the step's: the
        thread may have been kept from running."""
        plain = self._plain.get(rows)
        return rows * min(0.1, seconds / plain) if plain else 0.0


class DraftHistory:
    """The tokens of one answer and its prompt, to be searched, and how its drafts have fared.

    `until`: how many tokens the answer must have for its next draft.
    """

    def __init__(self, prompt_ids: list[int], typecode: str, until: float = 0) -> None:
        self.until = until
        self.start = 0  # tokens of the answer when the draft was made
        self._ids: array[int] = array(typecode, prompt_ids)
        self._prompt = len(prompt_ids)
        self._right, self._asked = 1.0, 2.0  # of the tokens that the model was asked about
        self._pause = 0  # tokens to wait after drafts that brought nothing

    def find(self, output_ids: list[int], shortest: int, longest: int) -> int:
        """Where the latest earlier occurrence of the last tokens ends: of `longest`, or fewer, but no fewer than
        `shortest`. -1 where they did not occur, as most often."""
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
        """`count` tokens from `start` on; past the end they go on as they have since then."""
        tokens = self._ids[start : start + count].tolist()
        return (tokens * -(-count // len(tokens)))[:count]

    @property
    def proven(self) -> bool:
        """Whether most of what was drafted was right."""
        return self._right > self._asked / 2

    def length(self, cost: float, most: int) -> int:
        """How long a draft to make: each token of it is to be right more often than `cost`. One token where even the
        first is not: it is asked seldom."""
        chance = self._right / self._asked
        if chance <= cost:
            return 1
        return most if cost <= 0 or chance >= 1 else min(most, int(math.log(cost) / math.log(chance)))

    def judge(self, drafted: int, right: int, cost: float) -> None:
        """Of a draft of `drafted` tokens the first `right` came true."""
        self._right = KEPT * self._right + right
        self._asked = KEPT * self._asked + min(drafted, right + 1)
        worth = right and self._right / self._asked > cost
        self._pause = 0 if worth else min(MOST_PAUSE, 2 * self._pause + 1)
        self.until = self.start + 1 + right + self._pause


class Speculator:
    """Makes the drafts of a step, and learns from what came of them. Used on the step thread.

    Drafts are paid from an account, in tokens: each token made earns a hundredth, what a draft wins is paid in, and
    what its rows cost is taken out, as is what the search took. So drafts that bring nothing cost a hundredth of the
    tokens at most. Where an answer's drafts were mostly right, the next one is paid when it is known what it won.
    """

    def __init__(self, config: EngineConfig, vocabulary: int) -> None:
        self._most = config.num_speculative_tokens
        self._shortest, self._longest = config.prompt_lookup_min, config.prompt_lookup_max
        self._rows = draft_rows(config)
        self._typecode = "H" if vocabulary <= 1 << 16 else "I"  # what is short is searched fast
        self.costs = DraftCosts()
        self._cost, self._searched_s = 0.0, 0.0  # of this step: what a row costs, and what the search took
        self._account = CREDIT
        self._counts = dict(NO_DRAFTS)

    def drafts(self, sequences: tuple[Sequence, ...]) -> dict[Sequence, list[int]]:
        """What to try in the next step, by sequence; nothing for those where nothing pays."""
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
        """Beams and answers with a mask have no drafts, others none while what would end them is barred."""
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
            assert history is not None, "made with the draft"
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
    """The cost of a row beside `rows` where nothing is known: each adds a share to the time of one."""
    return FIRST_ROW * rows / (1 + FIRST_ROW * (rows - 1))


def draft_rows(config: EngineConfig) -> int:
    """Rows of a step that drafts may take."""
    return 0 if config.speculate == "off" else min(MOST_ROWS, config.max_batch * config.num_speculative_tokens)


def _latest(text: bytes, length: int, size: int) -> int:
    """Where the last `length` bytes of `text` stood before, in tokens of `size` bytes; -1 for nowhere."""
    wanted, end = text[-length:], len(text) - size
    while (at := text.rfind(wanted, 0, end)) >= 0:
        if at % size == 0:
            return at // size
        end = at + length - 1
    return -1
