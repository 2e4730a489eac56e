"""What an adapter is to the engine, whichever method trained it: the neutral kinds, and how a generator makes vectors.

A method's reader (`pedro.methods.reader`) makes them of what it saved; the engine executes them. Neither imports the
other.
"""

from pedro.adapter_kinds.generator import GeneratorWeights, generate_vectors, rational
from pedro.adapter_kinds.kinds import SITES, Adapter, Edit, Edits, Generator, LowRank, Start

__all__ = [
    "SITES",
    "Adapter",
    "Edit",
    "Edits",
    "Generator",
    "GeneratorWeights",
    "LowRank",
    "Start",
    "generate_vectors",
    "rational",
]
