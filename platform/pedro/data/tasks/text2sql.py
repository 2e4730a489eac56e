"""Text-to-SQL in the form of jkkummerfeld/text2sql-data (Finegan-Dollak et al., 2018): WikiSQL and Advising.

Their queries hold variables and an alias for every table; here values are put in, aliases that are not needed are
dropped, and texts stand in single quotes. Neither file has a schema: WikiSQL's columns are those that the questions
of a table (of any split) ask about, in alphabetical order; Advising has one database, learnt from the rows.
The hub's WikiSQL has the tables, so its rows carry a database on which queries can be run.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pedro.data.tasks.parsers import parse_sql
from pedro.data.tasks.sources import HubSource, Part, Record, read_array
from pedro.data.tasks.task import Task, TaskRow, Wording

AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
OPERATORS = ("=", ">", "<")
TABLE = "t"  # what WikiSQL's only table is called
COLUMN = re.compile(r"(?:TABLEalias0\.)?(\S+?)_FIELD(?=[\s)]|$)")
ONE_TABLE = re.compile(  # WikiSQL's queries are all of this form, give or take brackets and quotes
    r"SELECT (?:(?P<aggregate>MAX|MIN|COUNT|SUM|AVG) ?\(? ?)?(?P<wanted>\S+)_FIELD(?: ?\))? FROM TABLE"
    r"(?: AS TABLEalias0)?(?: WHERE (?P<where>.+?))? ?;?",
    re.IGNORECASE,
)
CONDITION = re.compile(r"(\S+)_FIELD (=|<|>) (.+)")
ALIASED = re.compile(r"\b(\w+?) AS \1alias(\d+)\b")
RESERVED = re.findall(  # words that sqlite takes for no name
    r"\w+",
    "add all alter and as autoincrement between case check collate commit constraint create default deferrable delete "
    "distinct drop else escape exists foreign from group having in index insert intersect into is isnull join limit "
    "not notnull null on or order primary references returning select set table then to transaction union unique "
    "update using values when where",
)


def read(path: Path) -> Iterator[Record]:
    """One record a question; `columns` of its table where the questions have one."""
    columns: dict[str, set[str]] = defaultdict(set)
    for entry in read_array(path):
        columns_of_query = set(COLUMN.findall(entry["sql"][0]))
        for sentence in entry["sentences"] if columns_of_query else ():
            columns[sentence["table-id"]] |= columns_of_query
    for entry in read_array(path):
        examples = {variable["name"]: variable["example"] for variable in entry["variables"]}
        for sentence in entry["sentences"]:
            given = {name: value for name, value in sentence["variables"].items() if value}
            values = {**examples, **given}
            yield {
                "question": _fill(sentence["text"], values),
                "sql": [_statement(query, values) for query in entry["sql"]],
                "columns": sorted(map(column_name, columns.get(sentence.get("table-id", ""), ()))),
                "split": sentence["question-split"],
            }


def column_name(name: str) -> str:
    """A column as a plain SQL identifier: `STATE/TERRITORY` is state_territory."""
    plain = re.sub(r"[\W_]+", "_", name.lower()).strip("_")
    return f"c_{plain}" if not plain or plain[0].isdigit() or plain in RESERVED else plain


def _statement(template: str, values: dict[str, str]) -> str:
    """The query with its values, as one would write it."""
    plain = " ".join(template.replace("TABLEalias0.", "").split())
    match = ONE_TABLE.fullmatch(plain)
    if match is None:
        return _many_tables(template, values)
    conditions = []
    for condition in re.split(r" AND (?=\S+_FIELD )", match["where"]) if match["where"] else ():
        parts = CONDITION.fullmatch(condition)
        if parts is None:
            raise ValueError(f"condition {condition!r}")
        conditions.append((column_name(parts[1]), parts[2], _fill(parts[3].strip('"'), values)))
    return _one_table(column_name(match["wanted"]), (match["aggregate"] or "").upper(), conditions)


def _one_table(wanted: str, aggregate: str, conditions: list[tuple[str, str, str]]) -> str:
    """WikiSQL's form of a query: (column, operator, value) of each condition; values are texts."""
    chosen = f"{aggregate}( {wanted} )" if aggregate else wanted
    texts = [f"{column} {operator} '" + value.replace("'", "''") + "'" for column, operator, value in conditions]
    return f"SELECT {chosen} FROM {TABLE}" + (f" WHERE {' AND '.join(texts)}" if texts else "")  # noqa: S608


def _many_tables(template: str, values: dict[str, str]) -> str:
    """Advising's: texts in single quotes, values in place, no alias that is not needed."""
    query = _without_aliases(template)
    quoted = re.sub(r'"([^"]*)"', lambda match: "'" + _fill(match[1], values).replace("'", "''") + "'", query)
    pieces = re.split(r"('(?:[^']|'')*')", quoted)
    filled = "".join(piece if piece.startswith("'") else _fill(piece, values) for piece in pieces)
    return " ".join(filled.rstrip().rstrip(";").split())


def _without_aliases(query: str) -> str:
    """`COURSE AS COURSEalias0` is COURSE where no table is used twice."""
    aliased = ALIASED.findall(query)
    if len({table for table, _ in aliased}) != len(set(aliased)) or "DERIVED" in query:
        return query
    return re.sub(r"\b(\w+?)alias\d+\b", r"\1", ALIASED.sub(r"\1", query))


def _fill(text: str, values: dict[str, str]) -> str:
    if not values:
        return text
    names = "|".join(sorted(map(re.escape, values), key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{names})(?!\w)", lambda match: values[match[0]], text)


def from_hub(record: Record) -> Record:
    """Salesforce/wikisql's record, which holds the table and the query in parts."""
    table, parts = record["table"], record["sql"]
    names = _distinct([column_name(name) for name in table["header"]])
    conds = parts["conds"]
    triples = zip(conds["column_index"], conds["operator_index"], conds["condition"], strict=True)
    conditions = [(names[column], OPERATORS[operator], str(value)) for column, operator, value in triples]
    query = _one_table(names[parts["sel"]], AGGREGATES[parts["agg"]], conditions)
    database = {TABLE: {"columns": names, "types": table["types"], "rows": table["rows"]}}
    return {"question": record["question"], "sql": [query], "columns": names, "database": database}


def _distinct(names: list[str]) -> list[str]:
    """The second of two equal names gets a number."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return distinct


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    question = from_hub(record) if "table" in record else record
    columns = ", ".join(question["columns"])
    fields = {"question": question["question"].strip(), "table": f"Table: {TABLE} ({columns})\n" if columns else ""}
    extra: dict[str, Any] = {"database": question["database"]} if "database" in question else {}
    answers, told = tuple(question["sql"]), words.told(fields).strip()
    return TaskRow(words.prompt(fields, shots), answers[0], answers, extra=extra, system=told)


def _splits(file: str) -> dict[str, Part]:
    names = {"train": "train", "validation": "dev", "test": "test"}
    return {ours: Part((file,), only=("split", theirs)) for ours, theirs in names.items()}


WORDINGS = {
    "full": Wording("{table}Question: {question}\nSQL:"),
    "short": Wording("{question}"),
    "system": Wording("Question: {question}\nSQL:", system="Write the question as a query in SQL.\n{table}"),
}
WIKISQL_TASK = Task(
    name="wikisql",
    title="WikiSQL: questions to SQL, one table",
    metric="sql",
    licence="BSD-3-Clause",
    source="https://github.com/jkkummerfeld/text2sql-data",
    wordings=WORDINGS,
    make=make,
    parser=parse_sql,
    read=read,
    layouts=(_splits("wikisql.json.bz2"), _splits("wikisql.json")),
    hub=HubSource(
        "Salesforce/wikisql",
        {"train": "train", "validation": "validation", "test": "test"},
        revision="refs/convert/parquet",  # the repository itself holds a loading script, which datasets no longer runs
        rows={"train": 56355, "validation": 8421, "test": 15878},
    ),
    max_new_tokens=96,
    stops=("\nQuestion:",),
)
ADVISING_TASK = Task(
    name="advising",
    title="Advising: questions to SQL, many tables",
    metric="sql",
    licence="CC-BY-4.0",
    source="https://github.com/jkkummerfeld/text2sql-data",
    wordings=WORDINGS,
    make=make,
    parser=parse_sql,
    read=read,
    layouts=(_splits("advising.json"),),
    max_new_tokens=512,
    stops=("\nQuestion:",),
)
