"""When the learning rate rises, holds, falls and ends (warm-up, stable, decay).

The rate holds until the decay begins, so a run can be ended well at any time: the decay lasts a share of all tokens,
whenever it begins. It begins by a budget of tokens, by a budget of seconds, or at once on demand.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """`tokens` and `seconds` are budgets, decay included; at least one is given. `decay` is its share of all tokens."""

    lr: float
    warmup_tokens: int
    decay: float = 0.25
    tokens: int | None = None
    seconds: float | None = None

    def rate(self, tokens: int, decay_from: int | None) -> float:
        """The learning rate after `tokens` tokens: linear up, flat, linear down to 0."""
        up = min(1.0, (tokens + 1) / self.warmup_tokens)
        if decay_from is None:
            return self.lr * up
        return self.lr * up * max(0.0, 1 - (tokens - decay_from) / self.decay_tokens(decay_from))

    def decay_tokens(self, decay_from: int) -> int:
        """How many tokens a decay takes that begins here."""
        return max(1, round(decay_from * self.decay / (1 - self.decay)))

    def decay_is_due(self, tokens: int, seconds: float, tokens_per_second: float) -> bool:
        """Whether the decay must begin now to end within the budgets."""
        end = tokens + self.decay_tokens(tokens)
        if self.tokens is not None and end >= self.tokens:
            return True
        if self.seconds is None or tokens_per_second <= 0:
            return False
        return seconds + self.decay_tokens(tokens) / tokens_per_second >= self.seconds

    def is_over(self, tokens: int, decay_from: int | None) -> bool:
        return decay_from is not None and tokens >= decay_from + self.decay_tokens(decay_from)
