"""Reads YAML that people write, within bounds: size, depth, what anchors expand to, no key twice."""

from __future__ import annotations

import stat
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from pedro.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Values in all, counting what stands behind an anchor again at each alias."""


def read_yaml(path: str | Path) -> Any:
    """The one document of a YAML file. Raises ConfigError for what is not a regular file, too large, or not YAML."""
    path = Path(path)
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            what = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or pipe"
            raise ConfigError(f"{path}: is {what}; give a YAML file", param=str(path))
        if status.st_size > MAX_BYTES:
            raise ConfigError(
                f"{path}: has {status.st_size:,} bytes, and a spec may have {MAX_BYTES:,}; is it a data file?",
                param=str(path),
            )
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigError(f"{path}: cannot be read ({reason})", param=str(path)) from error
    try:
        return parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}", param=str(path)) from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML document. Raises ValueError, in one line that says where and what, for text that is none."""
    try:
        return yaml.load(text, Loader=_BoundedLoader)  # noqa: S506 - a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error


class _BoundedLoader(yaml.SafeLoader):
    """PyYAML's SafeLoader, which refuses duplicate keys and documents that are deep or that anchors multiply."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0
        self._values = 0
        self._values_of: dict[int, int] = {}  # of each complete node that has an anchor

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """One node and all below it."""
        event = self.peek_event()  # type: ignore[no-untyped-call]
        before = self._values
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _refused(f"nested more than {MAX_DEPTH} deep", event.start_mark)
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(event, yaml.AliasEvent):
            if id(node) not in self._values_of:
                raise _refused(f"the anchor {event.anchor!r} contains itself", event.start_mark)
            self._values += self._values_of[id(node)]
        else:
            self._values += 1
            if event.anchor is not None:
                self._values_of[id(node)] = self._values - before
        if self._values > MAX_VALUES:
            raise _refused(f"more than {MAX_VALUES:,} values, those of anchors counted at each alias", event.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """A mapping; a key that appears twice is an error, not a choice."""
        seen: dict[Hashable, yaml.Mark] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if (key := self.construct_object(key_node)) in seen:
                where = f"line {seen[key].line + 1}"
                raise _refused(f"the key {key!r} appears twice (first in {where})", key_node.start_mark)
            seen[key] = key_node.start_mark
        return super().construct_mapping(node, deep)

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        """Any value; an impossible date or number is reported with its position."""
        try:
            return super().construct_object(node, deep)
        except (ValueError, OverflowError, LookupError) as error:
            if not isinstance(node, yaml.ScalarNode):
                raise
            raise _refused(f"{node.value[:50]!r} is no value ({error})", node.start_mark) from error


def _refused(what: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=what, problem_mark=mark)
