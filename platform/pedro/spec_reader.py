"""Reads specs: YAML that people write, within bounds, as frozen pydantic models.

`read_yaml` refuses what is too large, too deep, multiplied by anchors, or has a key twice. `load_spec` lays `key=value`
overrides over what was read and reports every mistake at once. Precedence: defaults < YAML < `key=value`.
"""

from __future__ import annotations

import difflib
import re
import stat
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from pedro.config import SHOWN
from pedro.errors import ConfigError

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_VALUES = 100_000
"""Values in all, counting what stands behind an anchor again at each alias."""
PLAIN_WORDS = {  # pydantic's words: ours
    r"^Value error, ": "",
    r"Input should be": "expected",
    r"a valid tuple": "a list",
    r"a valid dictionary( or instance of \w+)?": "a mapping (key: value)",
    r"^(Tuple|List|Dictionary) should have at least (\d+) items? after validation, not \d+": r"expected at least \2",
}


class Frozen(BaseModel):
    """The base of every specification: immutable, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Spec = TypeVar("Spec", bound=BaseModel)


def load_spec(path: str | Path, overrides: Iterable[str], kind: type[Spec]) -> Spec:
    """Read YAML at `path`, lay `a.b=value` overrides over it, and validate it as `kind`.

    Raises one ConfigError that lists every mistake with its field, value and remedy.
    """
    fields = read_yaml(path)
    if not isinstance(fields, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, got {type(fields).__name__}", param=str(path))
    for override in overrides:
        _override(fields, override)
    return validate_spec(fields, kind, source=str(path))


def validate_spec(fields: dict[str, Any], kind: type[Spec], source: str = "spec") -> Spec:
    """`fields` as `kind`, or one ConfigError that lists every mistake."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = mistakes(error, kind)
        head = f"{source}: {len(problems)} mistake{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n  ".join([head, *problems]), param=str(error.errors()[0]["loc"])) from error


def mistakes(error: ValidationError, kind: type[BaseModel]) -> list[str]:
    """What is wrong with what should have been a `kind`: one line a mistake, with field, value and remedy."""
    items = error.errors(include_url=False)
    locations = [item["loc"] for item in items]

    def follows(item: Any) -> bool:
        """Whether a list is too short only because what stands in it is wrong."""
        at = item["loc"]
        return item["type"] == "too_short" and any(len(p) > len(at) and p[: len(at)] == at for p in locations)

    return [_explain(item, kind) for item in items if not follows(item)]


def _override(fields: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"{override!r}: expected key=value, for instance training.lr=1e-3", param=override)
    *parents, leaf = key.split(".")
    if len(parents) >= MAX_DEPTH:
        raise ConfigError(f"{override[:SHOWN]!r}: nested more than {MAX_DEPTH} deep", param=key[:SHOWN])
    for parent in parents:
        fields = fields.setdefault(parent, {})
        if not isinstance(fields, dict):
            raise ConfigError(f"{override!r}: {parent!r} is not a section, so nothing can be set inside it", param=key)
    fields[leaf] = _scalar(value)


def _scalar(text: str) -> Any:
    try:
        value = parse_yaml(text)
    except ValueError as error:
        raise ConfigError(f"{text[:SHOWN]!r}: not a YAML value: {error}", param=text[:SHOWN]) from error
    if isinstance(value, str):  # YAML 1.1 reads 1e-3 as text; everybody means the number
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _explain(item: Any, kind: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"]) or "spec"
    if item["type"] == "extra_forbidden":
        known = _fields(kind, item["loc"][:-1])
        close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}"
        return f"{path}: unknown key; {hint}"
    if item["type"] == "missing":
        return f"{path}: required, but not given"
    message: str = item["msg"]
    for theirs, ours in PLAIN_WORDS.items():
        message = re.sub(theirs, ours, message)
    if not item["loc"]:  # of the whole: its message names the fields
        return message
    if isinstance(item["input"], dict):  # of a whole section: its message says which values do not go together
        return f"{path}: {message}"
    given = repr(item["input"])
    return f"{path}: {message}, got {given if len(given) <= SHOWN else given[:SHOWN] + '…'}"


def _fields(kind: Any, path: tuple[Any, ...]) -> list[str]:
    """The keys that the section at `path` takes; a number in a path is a place in a list."""
    for part in path:
        if isinstance(part, str):
            field = kind.model_fields.get(part) if hasattr(kind, "model_fields") else None
            kind = field.annotation if field else None
        while kind is not None and not hasattr(kind, "model_fields"):  # X of tuple[X, ...] and of X | None
            kind = next(iter(get_args(kind)), None)
    return list(kind.model_fields) if hasattr(kind, "model_fields") else []


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
