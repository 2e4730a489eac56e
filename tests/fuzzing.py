"""How many inputs the property tests draw: a few, the same each time; `FUZZ=n` (`make fuzz`) draws n and other ones.

`FUZZ_OUT=FILE` keeps what a search of the gateway counted there, beside what earlier ones of the same code did.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path
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


def keep(row: dict[str, Any], code: dict[str, str | None]) -> None:
    """Add what a search counted to the file that is asked for; `code` is its state when the search began."""
    if not (name := os.environ.get("FUZZ_OUT")):
        return
    from jobs.benchmarks.report import BenchmarkReport, Target, exactly
    from pedro.provenance import check_unchanged

    path = Path(name)
    check_unchanged(code, path, allow_dirty=False)
    before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    rows = [*(before["rows"] if before.get("code") == code["code"] else []), row]
    routes: Counter[str] = Counter()
    for one in rows:
        routes.update(one["routes"])
    report = BenchmarkReport("fuzz", {"fuzz": FUZZ}, rows=rows)
    report.facts = {"requests": sum(one["requests"] for one in rows), "routes": len(routes)}
    report.facts["fewest_of_a_route"] = min(routes.values())
    failed = sum(one["unexpected_5xx"] for one in rows)
    report.targets = [
        Target("requests", 10_000, exactly(report.facts["requests"])),
        Target("answers of 500 and above that are the server's fault", 0, exactly(failed), at_most=True),
        Target("seconds of the slowest answer", 5, exactly(max(one["slowest_s"] for one in rows)), at_most=True),
    ]
    report.save(path, code)
