"""Compares SQL queries: as text after normalisation, and by what they return from a sqlite database.

Queries are a model's output, so they run read-only, may do nothing but select, and are stopped after a number of
steps.
"""

from __future__ import annotations

import re
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

from pedro.errors import DataError

TOKEN = re.compile(r"'(?:[^']|'')*'|\"[^\"]*\"|`[^`]*`|\[[^\]]*\]|<>|!=|==|<=|>=|\|\||\w+(?:\.\d+)?|[^\s\w]")
SAME = {"<>": "!=", "==": "="}
MAX_STEPS = 20_000_000  # of sqlite's virtual machine: seconds
MAX_ROWS = 100_000
ALLOWED = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
TableContent = Mapping[str, Any]


def normalise_sql(query: str) -> str:
    """One spelling for what differs in looks alone: case (of texts too, as WikiSQL's script), spacing, quotes, the
    final semicolon, the names of aliases, `<>` and `==`, ASC and INNER, which say what is so without them.
    """
    tokens = [_plain(token) for token in TOKEN.findall(query)]
    while tokens and tokens[-1] == ";":
        tokens.pop()
    tokens = [token for index, token in enumerate(tokens) if not _idle(tokens, index)]
    aliases: dict[str, str] = {}
    for before, token in pairwise(tokens):
        if before == "as" and token.isidentifier():
            aliases.setdefault(token, f"alias{len(aliases)}")
    return " ".join(aliases.get(token, token) for token in tokens)


def _plain(token: str) -> str:
    if token[0] in "'\"":
        return "'" + token[1:-1].replace("''", "'").casefold() + "'"
    if token[0] in "`[" and len(token) > 1:
        return token[1:-1].lower()
    return SAME.get(token, token.lower())


def _idle(tokens: list[str], index: int) -> bool:
    following = tokens[index + 1] if index + 1 < len(tokens) else ""
    return tokens[index] == "asc" or (tokens[index] == "inner" and following == "join")


def execution_match(query: str, reference: str, database: str | Path | Mapping[str, TableContent]) -> bool | None:
    """Whether both return the same rows, in order if the reference asks for one. None if the reference does not run.

    `database` is a sqlite file, or tables: {name: {"columns", "types", "rows"}}. Raises DataError if it is no
    database.
    """
    with closing(_connect(database)) as connection:
        wanted = _run(connection, reference)
        if wanted is None:
            return None
        answer = _run(connection, query) if query else None
    if answer is None:
        return False
    if re.search(r"\border\s+by\b", reference, re.IGNORECASE):
        return answer == wanted
    return Counter(answer) == Counter(wanted)


def _connect(database: str | Path | Mapping[str, TableContent]) -> sqlite3.Connection:
    if isinstance(database, Mapping):
        connection = sqlite3.connect(":memory:")
        for name, table in database.items():
            _create(connection, name, table)
        return connection
    path = Path(database)
    if not path.is_file():
        raise DataError(f"database: {str(path)!r} is not there; give a sqlite file", param="database")
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)


def _create(connection: sqlite3.Connection, name: str, table: TableContent) -> None:
    kinds = ["REAL" if kind in ("real", "number") else "TEXT" for kind in table["types"]]
    columns = ", ".join(f'"{column}" {kind}' for column, kind in zip(table["columns"], kinds, strict=True))
    marks = ", ".join("?" * len(kinds))
    connection.execute(f'CREATE TABLE "{name}" ({columns})')
    connection.executemany(f'INSERT INTO "{name}" VALUES ({marks})', table["rows"])  # noqa: S608 - a task's own name


def _run(connection: sqlite3.Connection, query: str) -> list[tuple[Any, ...]] | None:
    """The rows, or None if the query is wrong, forbidden or endless."""
    try:
        with _guarded(connection):
            return connection.execute(query).fetchmany(MAX_ROWS)
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError):
        return None


@contextmanager
def _guarded(connection: sqlite3.Connection) -> Iterator[None]:
    steps = 0

    def count() -> int:
        nonlocal steps
        steps += 1000
        return int(steps > MAX_STEPS)

    def allow(action: int, *_: Any) -> int:
        return sqlite3.SQLITE_OK if action in ALLOWED else sqlite3.SQLITE_DENY

    connection.set_authorizer(allow)
    connection.set_progress_handler(count, 1000)
    try:
        yield
    finally:
        connection.set_progress_handler(None, 0)
        connection.set_authorizer(None)
