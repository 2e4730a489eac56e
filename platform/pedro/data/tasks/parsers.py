"""Finds the answer in what a model wrote: a class, a letter, a number, a span, SQL.

Each parser takes the text, the row and the wording, and gives "" where it finds no answer, or finds two: a guess
would make a rambling model look better than it is.
"""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pedro.data.tasks.task import TaskRow, Wording

ANSWER_IS = re.compile(r"\banswer(?:\s+is)?\s*(?::|-(?=\s))?\s*(?:\*\*|\"|')?\s*(?=\S)", re.IGNORECASE)
LETTER = re.compile(r"^\W*\(?([A-Z])(?:[).:*\]]|\s*$|\s*\n)")
NUMBER = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
FENCE = re.compile(r"```(?:\w+)?\s*\n(.*?)(?:```|\Z)", re.DOTALL)
MARKS = " \t\r\n*_`\"'"


def parse_label(text: str, _row: TaskRow, wording: Wording) -> str:
    """The class that the text names: after "answer is" (the last one), at its start, or the only one in it."""
    labels = list(dict.fromkeys(wording.labels.values()))
    said = [label for match in ANSWER_IS.finditer(text) if (label := _starts_with(text[match.end() :], labels))]
    return (said[-1] if said else "") or _starts_with(text, labels) or _only(text, labels)


def parse_choice(text: str, row: TaskRow, _wording: Wording) -> str:
    """The letter of a choice: after "answer is" (the last one), at the text's start, or the choice's own words.

    `row.extra["choices"]` are the choices' texts in the order of their letters.
    """
    choices = list(row.extra.get("choices", ()))
    letters = [chr(ord("A") + index) for index in range(len(choices))]
    said = [match.end() for match in ANSWER_IS.finditer(text)]
    for start in [*reversed(said), 0]:
        match = LETTER.match(text[start:])
        if match and match[1] in letters:
            return match[1]
    plain = text.strip(MARKS).rstrip(".").casefold()
    spelled = [
        letter
        for letter, choice in zip(letters, choices, strict=True)
        if plain == str(choice).strip().rstrip(".").casefold()
    ]
    return spelled[0] if len(spelled) == 1 else ""


def parse_number(text: str, _row: TaskRow, _wording: Wording) -> str:
    """The number after "####", else after "answer is", else the last one, without its thousands' commas."""
    _, marked, after = text.rpartition("####")
    said = [text[match.end() :] for match in ANSWER_IS.finditer(text)]
    for candidate in ([after] if marked else []) + said[::-1]:
        match = NUMBER.search(candidate.partition("\n")[0])
        if match:
            return number(match[0])
    numbers = NUMBER.findall(text)
    return number(numbers[-1]) if numbers else ""


def number(text: str) -> str:
    """A number as one string, however it is written: "$1,200.50" and "1200.5" are the same. "" if it is none."""
    try:
        value = Decimal(text.replace(",", "").replace("$", "").strip().rstrip("."))
    except InvalidOperation:
        return ""
    return f"{value.normalize():f}" if value else "0"


def parse_span(text: str, _row: TaskRow, _wording: Wording) -> str:
    """The first line that is not blank, without "Answer:" before it."""
    line = next((line for line in text.splitlines() if line.strip()), "")
    return re.sub(r"^\W*(?:the\s+)?answer(?:\s+is)?\s*[:\-]?\s+", "", line, flags=re.IGNORECASE).strip(MARKS)


def parse_reasoned(text: str, row: TaskRow, _wording: Wording) -> str:
    """BIG-Bench Hard's: what follows the last "the answer is", else the first line; a letter where one is wanted."""
    after = re.split(r"the answer is:?\s*", text, flags=re.IGNORECASE)
    plain = (after[-1] if len(after) > 1 else text).strip().partition("\n")[0].strip(MARKS)
    if re.fullmatch(r"\([A-Z]\)", row.accepted[0]):
        letter = re.match(r"\(?([A-Z])(?:\)|\.|:|\s*$)", plain)
        return f"({letter[1]})" if letter else ""
    return " ".join(plain.rstrip(".").split())


def parse_sql(text: str, _row: TaskRow, _wording: Wording) -> str:
    """The first statement, out of a fenced block if there is one, without what is said before and after it."""
    fenced = FENCE.search(text)
    code = fenced[1] if fenced else text
    start = re.search(r"\b(?:SELECT|WITH)\b", code, re.IGNORECASE)
    if start is None:
        return ""
    statement = _first_statement(code[start.start() :])
    return " ".join((statement if fenced else statement.partition("\n\n")[0]).split())


def parse_text(text: str, _row: TaskRow, _wording: Wording) -> str:
    """All of it."""
    return text.strip()


def _first_statement(code: str) -> str:
    """Up to the first semicolon that stands in no quotes."""
    match = re.match(r"(?:'[^']*'|\"[^\"]*\"|[^;'\"])*", code)
    return match[0] if match else ""


def _starts_with(text: str, labels: list[str]) -> str:
    """The label at the start; the longest if several fit."""
    plain = text.lstrip(MARKS + "([:-").casefold()
    fits = [label for label in labels if re.match(re.escape(label.casefold()) + r"(?!\w)", plain)]
    return max(fits, key=len, default="")


def _only(text: str, labels: list[str]) -> str:
    """The label that occurs if no other does; one within a longer one does not count."""
    left, named = text.casefold(), []
    for label in sorted(labels, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(label.casefold())}(?!\w)"
        if re.search(pattern, left):
            named.append(label)
            left = re.sub(pattern, " ", left)
    return named[0] if len(named) == 1 else ""
