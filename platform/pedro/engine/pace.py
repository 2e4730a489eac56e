"""How much of a prefill a step may do while others wait for their next token. Knows seconds and tokens, nothing else.

A prompt cannot be read token by token, since its last token makes its vectors; but it can be read in slices, layer by
layer, between decode steps. A slice is to last at most `stall` decode steps, by what both cost of late.
"""

from __future__ import annotations

NEWS = 0.25  # weight of the newest measurement
LEAST_TOKENS = 4


class Pace:
    """Running means of a decode step's seconds and of a prompt token's."""

    def __init__(self, stall: float) -> None:
        self._stall = stall
        self._step_s: float | None = None
        self._token_s: float | None = None

    def decoded(self, seconds: float) -> None:
        """A decode step took so long."""
        self._step_s = _mean(self._step_s, seconds)

    def prefilled(self, tokens: int, seconds: float) -> None:
        """So many tokens' worth of a prefill, through all layers, took so long."""
        if tokens > 0:
            self._token_s = _mean(self._token_s, seconds / tokens)

    def slice_tokens(self, most: int) -> int:
        """The next slice: at most `most` tokens' worth, and that until both costs are known."""
        if self._step_s is None or not self._token_s:
            return most
        return max(LEAST_TOKENS, min(most, int(self._stall * self._step_s / self._token_s)))


def _mean(before: float | None, now: float) -> float:
    return now if before is None else before + NEWS * (now - before)
