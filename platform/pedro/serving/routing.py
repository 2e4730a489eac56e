"""Which replica answers a call. Knows nothing of Ray, of streams or of what an adapter holds.

Each adapter has its own order of the replicas (rendezvous hashing), so that it is resident on few of them and a
replica that comes or goes moves only its own share. No replica takes more than a bounded share of the load
(Mirrokni, Thorup, Zadimoghaddam 2016, "Consistent Hashing with Bounded Loads"): what exceeds it goes to the next in
order, so a hot adapter spreads over as many replicas as its load asks for.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b

from pedro.refs import ModelRef

SHARE = 1.25  # of the mean load


def choose(ref: ModelRef | None, loads: Mapping[str, int]) -> str:
    """The replica for adapter version `ref`, given the unfinished calls of each replica (at least one).

    The bare backbone (None) is at home everywhere: it goes to the least loaded.
    """
    if ref is None:
        return min(loads, key=lambda replica: (loads[replica], random.random()))  # noqa: S311 (breaks ties)
    bound = math.ceil(SHARE * (sum(loads.values()) + 1) / len(loads))
    by_rank = sorted(loads, key=lambda replica: _rank(ref, replica), reverse=True)
    return next(replica for replica in by_rank if loads[replica] < bound)


@lru_cache(maxsize=65536)
def _rank(ref: ModelRef, replica: str) -> bytes:
    return blake2b(f"{replica}\n{ref}".encode(), digest_size=8).digest()
