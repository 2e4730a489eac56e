"""The rows of the file on which an adapter was tested, as prompts to ask again, each with the answer that it wants.

The file is looked up among this home's data sets by the digest in its name, wherever else a specification points.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from pedro.data.lines import scan
from pedro.data.row_shapes import ParsedLine
from pedro.errors import PedroError
from pedro.refs import ModelRef
from pedro.registry import CHAMPION, Registry
from pedro.training.storage import DATASET, fetch, join
from sources.stores import ask_registry
from sources.view import sees, without_places

if TYPE_CHECKING:
    from pedro.config import Settings
    from pedro.registry import Version

MOST_ROWS = 200


@dataclass(frozen=True)
class TestRow:
    """A prompt that is one message, and the answer that is wanted."""

    __test__ = False  # pytest's

    line: int
    prompt: str
    wanted: str


def rows_of(settings: Settings, model: str) -> tuple[list[TestRow], str]:
    """The first rows of a model's test file that one message can ask; or why there are none."""
    try:
        asked = ModelRef.parse(model)
    except PedroError:
        return [], ""  # the backbone
    if not sees(settings, asked.name):
        return [], f"{model} is not in this home's registry"
    versions, problem = ask_registry(settings, lambda registry: Registry.versions(registry, asked.name), ())
    version = next((each for each in reversed(versions) if _is(each, asked)), None)
    if version is None:
        return [], problem or f"{model} is not in this home's registry"
    data: dict[str, Any] = (version.spec or {}).get("data") or {}
    location = str(data.get("test") or "")
    found = DATASET.search(location)
    if found is None:
        return [], f"{version.ref} was made without a test file of this home"
    stored = join(settings.storage, "datasets", location[found.start() + len("/datasets/") :])
    try:
        return list(islice(_plain(settings, stored, data.get("fields") or {}), MOST_ROWS)), ""
    except PedroError as error:
        return [], f"the test file of {version.ref} cannot be read: {without_places(settings, error.message)}"
    except OSError as error:
        return [], f"the test file of {version.ref} cannot be read: {error.strerror or type(error).__name__}"


def _is(version: Version, asked: ModelRef) -> bool:
    if asked.version is not None:
        return version.version == asked.version
    return (asked.alias or CHAMPION) in version.aliases


def _plain(settings: Settings, stored: str, fields: dict[str, str]) -> Iterator[TestRow]:
    for line in scan(fetch(stored, settings.cache), fields):
        for example in line.examples if isinstance(line, ParsedLine) else ():
            first = example.messages[0]
            if example.plain and len(example.messages) == 1 and first.get("role") == "user":
                yield TestRow(example.line, str(first["content"]), example.completion)
