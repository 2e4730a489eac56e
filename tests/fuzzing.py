"""How many inputs the property tests draw: a few, the same each time; `FUZZ=n` (`make fuzz`) draws n and other ones."""

from __future__ import annotations

import os
from typing import Any

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

FUZZ = int(os.environ.get("FUZZ", "0"))
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from(["\0", "a" * 5000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def tried(examples: int, times: int = 1) -> settings:
    """`examples` of a property in the fast tests, `times` FUZZ of it in a long search."""
    return settings(
        max_examples=FUZZ * times or examples,
        derandomize=not FUZZ,
        deadline=None,
        database=None,
        phases=[Phase.explicit, Phase.generate, *([Phase.shrink] if FUZZ else [])],
        suppress_health_check=list(HealthCheck),
    )
