"""Turns the moments at which tokens came into rates, the same way for every engine. Standard library only."""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from statistics import median

from jobs.benchmarks.stats import percentile


@dataclass
class Timeline:
    """When each request's tokens came, in seconds since the first request was handed over.

    tok_s: all new tokens / time from the first request's arrival to the last token.
    decode_tok_s: tokens that came after every request had its first one / the time from then to the last token, so
    that no prompt is read in the time that counts. ttft_ms: the median request's time to its first token.
    """

    started: float = field(default_factory=time.perf_counter)
    moments: dict[str, list[float]] = field(default_factory=dict)
    events: int = 0  # how often tokens came

    def take(self, request: str, count: int = 1, moment: float | None = None) -> None:
        """`count` tokens of `request` came, now unless told."""
        self.events += 1
        at = (time.perf_counter() if moment is None else moment) - self.started
        self.moments.setdefault(request, []).extend([at] * count)

    def figures(self) -> dict[str, float]:
        """tok_s, decode_tok_s, ttft_ms and wall_s."""
        everything = [at for moments in self.moments.values() for at in moments]
        firsts = [moments[0] for moments in self.moments.values()]
        wall, began = max(everything), max(firsts)
        decoded = sum(at > began for at in everything)
        return {
            "tok_s": len(everything) / wall,
            "decode_tok_s": decoded / (wall - began) if decoded else 0.0,
            "ttft_ms": median(firsts) * 1000,
            "wall_s": wall,
        }

    def gaps_ms(self) -> list[float]:
        """Milliseconds between one token of a request and its next, of all requests."""
        return [(b - a) * 1000 for moments in self.moments.values() for a, b in itertools.pairwise(moments)]

    def tails(self) -> dict[str, float]:
        """ttft_p99_ms; and of the requests' times per token after their first one token_ms (median), token_p99_ms."""
        firsts = [moments[0] for moments in self.moments.values()]
        each = [(m[-1] - m[0]) / (len(m) - 1) for m in self.moments.values() if len(m) > 1]
        return {
            "ttft_p99_ms": percentile(firsts, 0.99) * 1000,
            "token_ms": median(each) * 1000 if each else 0.0,
            "token_p99_ms": percentile(each, 0.99) * 1000 if each else 0.0,
        }
