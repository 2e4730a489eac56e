"""Answers as HTML: tokens shaded by how improbable they were, and the words in which two answers differ.

Every text is escaped; colours are translucent, so that they stand on a light and on a dark page.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Iterable, Sequence
from difflib import SequenceMatcher
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sources.playground import SeenToken

BOX = "white-space: pre-wrap; overflow-wrap: anywhere; font-family: monospace; font-size: 0.875rem; line-height: 1.6"
IMPROBABLE = "230, 159, 0"  # orange
ONLY_HERE = "background: rgba(0, 158, 115, 0.3); text-decoration: none"
ONLY_THERE = "background: rgba(213, 94, 0, 0.25)"


def tokens_html(tokens: Iterable[SeenToken]) -> str:
    """Each token with its probability and the likeliest others in its tooltip."""
    return f'<div style="{BOX}">{"".join(map(_token, tokens))}</div>'


def difference_html(before: str, after: str) -> str:
    """`after`, its own words marked, and struck out those that only `before` has."""
    one, other = _words(before), _words(after)
    parts = []
    for kind, begun, ended, start, end in SequenceMatcher(None, one, other, autojunk=False).get_opcodes():
        if kind == "equal":
            parts.append(html.escape("".join(other[start:end])))
            continue
        if gone := "".join(one[begun:ended]):
            parts.append(f'<del style="{ONLY_THERE}">{html.escape(gone)}</del>')
        if new := "".join(other[start:end]):
            parts.append(f'<ins style="{ONLY_HERE}">{html.escape(new)}</ins>')
    return f'<div style="{BOX}">{"".join(parts)}</div>'


def _token(token: SeenToken) -> str:
    others = [f"{html.escape(repr(text))} {_share(logprob)}" for text, logprob in token.others]
    title = "&#10;".join([f"{html.escape(repr(token.text))} {_share(token.logprob)}", *others])
    shade = f"rgba({IMPROBABLE}, {0.75 * (1 - math.exp(min(0.0, token.logprob))):.2f})"
    return f'<span title="{title}" style="background: {shade}">{html.escape(token.text)}</span>'


def _share(logprob: float) -> str:
    return f"{math.exp(min(0.0, logprob)):.1%}"


def _words(text: str) -> Sequence[str]:
    """Words and what stands between them, so that nothing is lost."""
    return re.findall(r"\s+|\w+|[^\w\s]", text)
