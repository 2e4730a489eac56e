"""Regular expressions of a PEFT config, tried in a process that can be killed.

PEFT matches `target_modules`, `exclude_modules`, the keys of `rank_pattern` and others against the name of every
module. A pattern like `(a+)+` may need years for it, and Python cannot stop a match once it has begun.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from pedro.errors import ConfigError

if TYPE_CHECKING:
    from peft import PeftConfig

LIMIT_S = 5.0  # of computing
WALL_S = 120.0  # a busy machine delays a pattern longer than that one takes
SPECIAL = re.compile(r"[()\[\]{}*+?|\\^$]")
TRY = r"""
import json, re, resource, signal, sys
limit_s, patterns, names = json.load(sys.stdin)
signal.setitimer(signal.ITIMER_PROF, limit_s)
resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
for index, pattern in enumerate(patterns):
    print(index, flush=True)
    for name in names:
        try:
            re.fullmatch(pattern, name)
            re.match(rf"(.*\.)?({pattern})$", name)
        except (re.error, OverflowError, RecursionError):
            break  # PEFT says what is wrong with it
"""


def check_patterns(config: PeftConfig, names: Iterable[str]) -> None:
    """Try the patterns of a PEFT config on the names of a model's modules.

    Raises ConfigError that names the field of one that computes for more than LIMIT_S seconds or takes a gigabyte.
    """
    found = [(field, text) for field, text in _texts(config) if SPECIAL.search(text)]
    if not found:
        return
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", TRY],
            input=json.dumps([LIMIT_S, [text for _, text in found], list(names)]),
            capture_output=True,
            text=True,
            timeout=WALL_S,
        )
        begun = done.stdout if done.returncode else None
    except subprocess.TimeoutExpired as error:
        begun = (error.stdout or b"0").decode()
    if begun is None:
        return
    field, text = found[int((begun.split() or ["0"])[-1])]
    raise ConfigError(
        f"{field}: {text[:100]!r} takes too long to match against the backbone's modules; give a list of their names, "
        "or a pattern without repeats inside repeats",
        param=field,
    )


def _texts(config: PeftConfig) -> Iterator[tuple[str, str]]:
    """Each text of a config that PEFT may read as a pattern, with its field."""
    for field in fields(config):
        value = getattr(config, field.name)
        if isinstance(value, str):
            yield field.name, value
        elif isinstance(value, (list, tuple, set, dict)):
            yield from ((field.name, each) for each in value if isinstance(each, str))
