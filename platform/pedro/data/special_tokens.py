"""Content never makes special tokens; only a template does.

Whoever writes a prompt would else end the system's turn by spelling `<|im_end|>`. Where content spells a special
token, and only there, a marker is put inside the spelling before the template sees it. It comes out of the rendered
text again, which then remembers where it stood: at such a cut the tokenizer must not join what is on its two sides.
Text that spells none has exactly the ids that the tokenizer gives it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from pedro.errors import DataError

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

MARKERS = "".join(map(chr, range(0xE000, 0xE100)))  # of the private use area: letters to nobody, split by tokenizers
_known: WeakKeyDictionary[Any, tuple[int, SpecialTokens]] = WeakKeyDictionary()


class Prompt(str):
    """A rendered prompt. At `cuts` (places between characters) the tokenizer must not see one special token."""

    cuts: tuple[int, ...] = ()

    @classmethod
    def cut(cls, text: str, cuts: Iterable[int]) -> Prompt:
        made = cls(text)
        made.cuts = tuple(sorted(cuts))
        return made


class SpecialTokens:
    """The special tokens of one tokenizer, as text may spell them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        added = [token for token in tokenizer.added_tokens_decoder.values() if token.special]
        spelled = {token.content for token in added} | {str(token) for token in tokenizer.all_special_tokens}
        self._each = _overlapping(spelled)
        self._begins = {text[:end] for text in spelled for end in range(1, len(text))}
        self._ends = {text[start:] for text in spelled for start in range(1, len(text))}
        self._longest = max(map(len, spelled), default=0)
        self._normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
        folded = {self._fold(token.content) for token in added if token.normalized} if self._normalizer else set()
        self._each_folded = _overlapping(folded)

    def mark(self, value: Any, marker: str) -> Any:
        """Any JSON of a client, with `marker` inside whatever spells a special token."""
        if isinstance(value, str):
            return insert(value, self.cuts(value), marker)
        if isinstance(value, Mapping):
            return {self.mark(key, marker): self.mark(part, marker) for key, part in value.items()}
        return [self.mark(part, marker) for part in value] if isinstance(value, list | tuple) else value

    def cuts(self, text: str) -> list[int]:
        """Where to cut a text of a tenant so that it spells no special token, by itself or with what is beside it."""
        if self._each is None:
            return []
        positions = {match.start() + self._inside(match[1]) for match in self._each.finditer(text)}
        positions.update(self._edges(text))
        if self._spells_when_normalized(text):
            positions.update(range(1, len(text)))
        return sorted(positions)

    def unmark(self, text: str, marker: str) -> Prompt:
        """The rendered text without markers, cut where a special token would else be read from content."""
        parts = text.split(marker)
        plain = "".join(parts)
        at, cuts = 0, set()
        for part in parts[:-1]:
            at += len(part)
            cuts.add(at)
        return self.keep(plain, cuts)

    def keep(self, text: str, cuts: Iterable[int]) -> Prompt:
        """The text with those of the cuts that are needed: where it has none, it is encoded as any other."""
        needed = set(cuts)
        if needed and self._each is not None and not self._spells_when_normalized(text):
            spans = [match.span(1) for match in self._each.finditer(text)]
            needed = {cut for start, end in spans for cut in range(start + 1, end) if cut in needed}
        return Prompt.cut(text, needed)

    def _edges(self, text: str) -> Iterable[int]:
        """Cuts at the ends of a text that begins or ends with a part of a special token: a neighbour may complete it.

        Inside surrounding white space, which templates strip.
        """
        bare = text.strip()
        start = text.find(bare)
        end = start + len(bare)
        if any(bare[-size:] in self._begins for size in range(1, min(self._longest, len(bare) + 1))):
            yield end
        if any(bare[:size] in self._ends for size in range(1, min(self._longest, len(bare) + 1))):
            yield start

    def _spells_when_normalized(self, text: str) -> bool:
        """Whether the tokenizer's normalisation (case, full width) would make special tokens of other characters."""
        if self._each_folded is None:
            return False
        return len(self._each_folded.findall(self._fold(text))) > len(self._each_folded.findall(text))

    def _fold(self, text: str) -> str:
        return self._normalizer.normalize_str(text).lstrip("▁ ") if self._normalizer else text

    @staticmethod
    def _inside(token: str) -> int:
        if len(token) == 1:
            raise DataError(
                f"messages: {token!r} is a special token of the backbone, one character that cannot be text; "
                "leave it out, or set special_tokens_in_content",
                param="messages",
            )
        return 1


def special_tokens(tokenizer: Tokenizer) -> SpecialTokens:
    """Those of `tokenizer`, looked up once."""
    size = len(tokenizer)
    known = _known.get(tokenizer)
    if known is None or known[0] != size:
        known = _known[tokenizer] = size, SpecialTokens(tokenizer)
    return known[1]


def as_text(tokenizer: Tokenizer, text: str) -> Prompt:
    """A text whose spellings of special tokens are to be read as text."""
    special = special_tokens(tokenizer)
    return special.keep(text, special.cuts(text))


def marked(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], template: str, tools: Sequence[Any] = ()
) -> tuple[Sequence[Mapping[str, Any]], Sequence[Any], str]:
    """Messages and tools for a template, and the marker that is in them: "" where nothing spells a special token.

    A message's `role` alone is left as it is: templates make control tokens of it. Raises DataError where a special
    token cannot be kept from them.
    """
    special = special_tokens(tokenizer)
    said = [{key: part for key, part in message.items() if key != "role"} for message in messages]
    texts = [*_texts(said), *_texts(tools)]
    if not any(map(special.cuts, texts)):
        return messages, tools, ""
    marker = next((marker for marker in MARKERS if not any(marker in text for text in (template, *texts))), None)
    if marker is None:
        raise DataError("messages: hold every private-use character from U+E000 on; leave those out", param="messages")
    kept = [
        {key: part if key == "role" else special.mark(part, marker) for key, part in message.items()}
        for message in messages
    ]
    return kept, special.mark(tools, marker), marker


def unmarked(tokenizer: Tokenizer, text: str, marker: str) -> Prompt:
    """What the template made of marked messages. Raises DataError where it wrote the marker in other words."""
    if not marker:
        return Prompt(text)
    if json.dumps(marker)[1:-1] in text:
        raise DataError(
            "messages: spell a special token of the backbone, and its chat template writes ASCII alone; leave it out",
            param="messages",
        )
    return special_tokens(tokenizer).unmark(text, marker)


def encode_cut(tokenizer: Tokenizer, text: str, cuts: Sequence[int]) -> list[int]:
    """The ids of `text`, no token reaching across a cut; each side is read as if the other stood beside it.

    A marker is tokenised along and its ids are left out. Where a tokenizer joins it to its neighbours, or tells no
    offsets, the parts are tokenised apart.
    """
    positions = {cut + number for number, cut in enumerate(cuts)}  # of the markers, once they are in
    if tokenizer.is_fast:
        for marker in [marker for marker in MARKERS if marker not in text][:4]:
            made = tokenizer(insert(text, cuts, marker), add_special_tokens=False, return_offsets_mapping=True)
            held = [not positions.isdisjoint(range(start, end)) for start, end in made.offset_mapping]
            alone = {start for start, end in made.offset_mapping if end == start + 1 and start in positions}
            if alone == positions and not any(
                holds and end > start + 1 for holds, (start, end) in zip(held, made.offset_mapping, strict=True)
            ):
                return [token for token, holds in zip(made.input_ids, held, strict=True) if not holds]
    edges = [0, *cuts, len(text)]
    parts = [text[start:end] for start, end in pairwise(edges) if start < end]
    return [token for part in parts for token in tokenizer(part, add_special_tokens=False).input_ids]


def insert(text: str, cuts: Sequence[int], marker: str) -> str:
    """`text` with the marker at each cut."""
    edges = [0, *cuts, len(text)]
    return marker.join(text[start:end] for start, end in pairwise(edges))


def _texts(value: Any) -> Iterator[str]:
    """Every text in a client's JSON."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, part in value.items():
            yield from _texts(key)
            yield from _texts(part)
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _texts(part)


def _overlapping(spelled: set[str]) -> re.Pattern[str] | None:
    """Finds every place where one of the texts begins, the longest as group 1; None for none."""
    texts = sorted(filter(None, spelled), key=len, reverse=True)
    return re.compile(f"(?=({'|'.join(map(re.escape, texts))}))") if texts else None
