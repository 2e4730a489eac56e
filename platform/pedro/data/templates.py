"""Runs the Jinja templates of prompts as transformers does, in a sandbox.

Standard library and Jinja only, so that a process which does nothing else starts at once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from pedro.errors import DataError

if TYPE_CHECKING:
    from jinja2 import Template

MAX_TEMPLATE_CHARS = 200_000
THE_DAY = datetime(2024, 7, 26)  # Llama 3's own, where it is not told the date
_ASKS_FOR_DATE = re.compile(r"strftime_now\s+is\s+(not\s+)?defined")


class TooLongError(Exception):
    """A template wrote more than it may."""


def render(template: str, variables: Mapping[str, Any], max_chars: int | None = None) -> str:
    """What the template makes of the variables.

    Raises DataError where it cannot be read or refuses them, TooLongError where it writes more than `max_chars`.
    """
    from jinja2 import TemplateError

    compiled = _compile(template)
    try:
        if max_chars is None:
            return compiled.render(variables)
        return _within(max_chars, compiled.generate(variables))
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError) as error:
        reason = str(error)[:300]
    except RecursionError:
        reason = "it calls itself without end"
    raise DataError(f"messages: the prompt format refuses them: {reason}", param="messages")


def _within(max_chars: int, parts: Iterable[str]) -> str:
    written, size = [], 0
    for part in parts:
        size += len(part)
        if size > max_chars:
            raise TooLongError
        written.append(part)
    return "".join(written)


@lru_cache(maxsize=256)
def _compile(source: str) -> Template:
    """A template as transformers compiles chat templates (utils/chat_template_utils.py), in Jinja's sandbox.

    `strftime_now` gives one fixed day: a prompt that holds today's date would differ from the trained one. A template
    that asks whether there is such a function is told no, and writes the day of its own choice.
    """
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}...{% endgeneration %}` marks answers for transformers; here it is just its content."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's own declaration

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, Generation]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = raise_exception
    if not _ASKS_FOR_DATE.search(source):
        environment.globals["strftime_now"] = THE_DAY.strftime
    if len(source) > MAX_TEMPLATE_CHARS:
        raise DataError(
            f"prompt_format: the template has {len(source):,} characters, more than {MAX_TEMPLATE_CHARS:,}; "
            "give a shorter one",
            param="prompt_format",
        )
    try:
        return environment.from_string(source)
    except (TemplateError, SyntaxError, RecursionError, ValueError) as error:
        reason = str(error)[:300] or type(error).__name__
        raise DataError(f"prompt_format: the template cannot be read: {reason}", param="prompt_format") from None


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON, by transformers' signature; Jinja's own filter escapes for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
