"""Random JSON schemas whose answers always come to an end, for tests of answers that are held to one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

NAMES = ("id", "name", "größe", "is ok", 'q"uote', "tags", "a.b", "$x", "日本", "items", "type")
WORDS = ("red", "green", "", 'say "hi"', "back\\slash", "naïve", "\U0001f600", "line\nbreak", "  ")


def random_schema(seed: int) -> dict[str, Any]:
    """A schema of an object, of arrays, of choices among schemas or of one value; some refer to shared definitions."""
    draw = random.Random(seed)
    shared = {f"part{number}": _schema(draw, 1, ()) for number in range(draw.randrange(3))}
    schema = _schema(draw, 2, tuple(shared))
    return {**schema, **({"$defs": shared} if shared else {})}


def _schema(draw: random.Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    kinds: list[Callable[..., dict[str, Any]]] = [_string, _integer, _number, _constant, _pattern]
    if depth:
        kinds += [_object, _object, _object, _array, _array, _any_of]
    if shared:
        kinds.append(_reference)
    return draw.choice(kinds)(draw, depth - 1, shared)


def _string(draw: random.Random, *_: Any) -> dict[str, Any]:
    least = draw.randrange(4)
    return {"type": "string", "minLength": least, "maxLength": least + draw.randrange(8)}


def _pattern(draw: random.Random, *_: Any) -> dict[str, Any]:
    form = draw.choice(["pattern", "pattern", "format"])
    patterns = [r"^[A-Z]{2}-\d{3}$", r"^(yes|no)$", r"^\w{1,5}@\w{1,5}\.com$", r"^[^\"\\]{0,6}$"]
    return {"type": "string", form: draw.choice(["date", "uuid", "ipv4"] if form == "format" else patterns)}


def _integer(draw: random.Random, *_: Any) -> dict[str, Any]:
    low = draw.randrange(-2000, 2000)
    bounds = {draw.choice(["minimum", "exclusiveMinimum"]): low, "maximum": low + 2 + draw.randrange(5000)}
    return {"type": "integer", **bounds, **({"multipleOf": 2} if draw.random() < 0.2 else {})}


def _number(draw: random.Random, *_: Any) -> dict[str, Any]:
    return draw.choice([{"type": "boolean"}, {"type": "null"}, {"type": ["boolean", "null"]}, _integer(draw)])


def _constant(draw: random.Random, *_: Any) -> dict[str, Any]:
    values = [*draw.sample(WORDS, 3), draw.randrange(100), None, True, {"k": [1, "x"]}, 2.5]
    return {"const": draw.choice(values)} if draw.random() < 0.3 else {"enum": draw.sample(values, 3)}


def _object(draw: random.Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    names = draw.sample(NAMES, draw.randrange(1, 4))
    properties = {name: _schema(draw, depth, shared) for name in names}
    required = [name for name in names if draw.random() < 0.7]
    return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}


def _array(draw: random.Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    least = draw.randrange(2)
    bounds = {"minItems": least, "maxItems": least + draw.randrange(2)}
    if draw.random() < 0.2:
        parts = [_schema(draw, depth, shared) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "items": False, "minItems": 2, "maxItems": 2}
    return {"type": "array", "items": _schema(draw, depth, shared), **bounds}


def _any_of(draw: random.Random, depth: int, shared: tuple[str, ...]) -> dict[str, Any]:
    return {"anyOf": [_schema(draw, depth, shared) for _ in range(draw.randrange(1, 4))]}


def _reference(draw: random.Random, _: int, shared: tuple[str, ...]) -> dict[str, Any]:
    return {"$ref": f"#/$defs/{draw.choice(shared)}"}
