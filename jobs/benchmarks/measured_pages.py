"""Pages of the documentation with parts that are written from results.

What stands between `<!-- measured: NAME -->` and `<!-- end -->` is replaced; all else is written by hand.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

DOCS, RESULTS = Path(__file__).parents[2] / "docs", Path(__file__).parents[1] / "results"
BLOCK = re.compile(r"(<!-- measured: (\w+) -->\n).*?(\n<!-- end -->)", re.DOTALL)


def filled(page: str, parts: Mapping[str, Callable[[], str]]) -> str:
    """The page with each part written anew. KeyError for a part that `parts` has not."""
    return BLOCK.sub(lambda found: found[1] + parts[found[2]]() + found[3], page)


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *lines))
