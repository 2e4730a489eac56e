"""Compiles untrusted answer shapes in a process that is killed if it exceeds its limits.

`python -m pedro.serving.shape_worker` is the process. Shapes that pass are compiled again by a replica for its
tokenizer, within the same limits. Needs llguidance, but no tensors.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher, LLParserLimits, grammar_from

from pedro.bounded_worker import BoundedWorker, Message, serve
from pedro.errors import PedroError

if TYPE_CHECKING:
    from pedro.gateway.backend import AnswerShape

CPU_S = 1.0  # CPU time, for one shape
WALL_S = 10.0  # wall time, which is longer on a busy machine
MEMORY_BYTES = 1 << 30  # address space
GRAMMAR, REFUSED = b"g", b"r"
SPACE = r" |\n[ \t]{0,24}"  # JSON's: without a limit a model may write blanks forever
OPTIONS: Any = {
    "item_separator": ",",
    "key_separator": ":",
    "whitespace_pattern": SPACE,
    "coerce_one_of": False,
    "lenient": False,
}
SPACED = 'start: " " @inner'
MAX_REASON = 300  # characters
MAX_PLACES = 2000  # parts of a schema searched for the invalid one


def limits() -> LLParserLimits:
    """Limits for one shape: of its grammar, and of memory and time per step of an answer."""
    return LLParserLimits(
        initial_lexer_fuel=1_000_000,  # 20 ms
        step_lexer_fuel=50_000,  # 4 ms
        step_max_items=50_000,  # 3 ms
        max_lexer_states=10_000,  # 2 kB each
        max_grammar_size=100_000,
        verbose_errors=False,
    )


class ShapeWorker:
    """Compiles a shape to its grammar, or reports why it is invalid. Thread-safe: one shape at a time."""

    def __init__(self) -> None:
        self._worker = BoundedWorker(__name__)

    def grammar(self, shape: AnswerShape, spaced: bool = False) -> str:
        """A shape in llguidance's form, `spaced` with a leading space. Raises PedroError if it is invalid."""
        kind, text, param = shape
        try:
            answer, content = self._worker.ask(json.dumps([kind, text, spaced]).encode(), WALL_S)
        except (TimeoutError, EOFError):
            raise too_much(param) from None
        if answer == GRAMMAR:
            return content.decode()
        place, reason = json.loads(content)
        at = f" at {place}" if place else ""
        raise PedroError(f"{param}: cannot be compiled{at}: {reason}", param=param + place, code="invalid_shape")

    def close(self) -> None:
        """End the process."""
        self._worker.close()


def too_much(param: str) -> PedroError:
    """The error of a shape that exceeds its limits."""
    return PedroError(
        f"{param}: exceeds the time or memory limit of a shape; simplify it",
        param=param,
        code="shape_bounds",
    )


def _answer(request: bytes) -> Message:
    signal.setitimer(signal.ITIMER_PROF, CPU_S)  # its signal ends the process in any state
    try:
        kind, text, spaced = json.loads(request)
        try:
            grammar = _grammar(kind, text)
            if spaced:
                lark = kind in ("choice", "grammar")
                inner = {"lark_grammar": grammar} if lark else json.loads(grammar)["grammars"][0]
                grammar = json.dumps({"grammars": [{"lark_grammar": SPACED}, {**inner, "name": "inner"}]})
        except ValueError as error:
            return _refused("", str(error))
        reason = LLMatcher.validate_grammar(grammar, None, limits=limits())
        if not reason:
            return GRAMMAR, grammar.encode()
        return _refused(*(_fault(json.loads(text), reason) if kind == "json" else ("", reason)))
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _refused(place: str, reason: str) -> Message:
    return REFUSED, json.dumps([place, " ".join(reason.split())[:MAX_REASON]]).encode()


def _grammar(kind: Any, text: str) -> str:
    if kind == "json":
        return LLMatcher.grammar_from_json_schema(text, overrides=OPTIONS)
    return grammar_from(kind, text)


def _fault(schema: Any, reason: str) -> tuple[str, str]:
    """The innermost part of a schema that is invalid by itself, and its error."""
    root = schema if isinstance(schema, dict) else {}
    shared = {name: root[name] for name in ("$defs", "definitions", "$schema") if name in root}
    found = "", reason
    for count, (place, part) in enumerate(_parts(schema, "")):
        if count >= MAX_PLACES:
            break
        if place.startswith((f"{found[0]}.", f"{found[0]}[")):
            told = LLMatcher.validate_grammar(_grammar("json", json.dumps({**shared, **part})), None, limits=limits())
            if told:
                found = place, told
    return found


def _parts(schema: Any, place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The schemas within a schema with their paths, outer ones first."""
    if not isinstance(schema, dict):
        return
    for key, value in schema.items():
        at = f"{place}.{key}"
        if key in ("properties", "patternProperties", "$defs", "definitions") and isinstance(value, dict):
            inner = [(f"{at}.{name}", part) for name, part in value.items()]
        elif key in ("anyOf", "oneOf", "allOf", "prefixItems") and isinstance(value, list):
            inner = [(f"{at}[{number}]", part) for number, part in enumerate(value)]
        elif key in ("items", "additionalProperties", "not", "contains"):
            inner = [(at, value)]
        else:
            continue
        for inside, part in inner:
            if isinstance(part, dict):
                yield inside, part
                yield from _parts(part, inside)


if __name__ == "__main__":
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    serve(_answer, MEMORY_BYTES)
