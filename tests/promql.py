"""Evaluates the part of PromQL that our alert rules use, and the rules, on series that a test lays on a time line.

Reference: https://prometheus.io/docs/prometheus/latest/querying/ (operators, functions) and, for `rate`, `increase`
and `predict_linear`, promql/functions.go. Where there is a `promtool`, a test compares. What is beyond this part is an
error. Knows nothing of our metrics.
"""

from __future__ import annotations

import bisect
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

LOOKBACK_S = 300.0
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
TOKEN = re.compile(
    r"\s*(?:(?P<number>\d+(?:\.\d+)?(?![\w.]))|(?P<range>\[\d+[smhd]\])|(?P<word>[a-zA-Z_]\w*)"
    r'|(?P<text>"[^"]*")|(?P<sign>==|!=|>=|<=|=~|!~|[-+*/<>=(){},]))'
)
LEVELS = (("or",), ("and", "unless"), ("==", "!=", ">", "<", ">=", "<="), ("+", "-"), ("*", "/"))
SUMS: dict[str, Callable[[list[float]], float]] = {"sum": math.fsum, "min": min, "max": max}
Labels = tuple[tuple[str, str], ...]
"""Sorted, the name of the metric apart."""
Vector = dict[Labels, float]
Value = Vector | float


@dataclass
class Readings:
    """Of one series: when, and what. None says that it has ended (Prometheus's staleness marker)."""

    times: list[float] = field(default_factory=list)
    values: list[float | None] = field(default_factory=list)

    def add(self, at: float, value: float | None) -> None:
        self.times.append(at)
        self.values.append(value)

    def between(self, after: float, until: float) -> list[tuple[float, float | None]]:
        """Those after one moment and until another."""
        inside = slice(bisect.bisect_right(self.times, after), bisect.bisect_right(self.times, until))
        return list(zip(self.times[inside], self.values[inside], strict=True))


@dataclass
class Series:
    """Readings by metric, then by labels."""

    of: dict[str, dict[Labels, Readings]] = field(default_factory=dict)

    def scrape(self, at: float, values: Mapping[tuple[str, Labels], float]) -> None:
        """Enter what one scrape gave; what was there before and is not now has ended."""
        for (name, labels), value in values.items():
            self.of.setdefault(name, {}).setdefault(labels, Readings()).add(at, value)
        for name, known in self.of.items():
            for labels, readings in known.items():
                if (name, labels) not in values and readings.values[-1] is not None:
                    readings.add(at, None)


@dataclass(frozen=True)
class Node:
    """A part of an expression: what it is, its words, its parts."""

    kind: str
    words: tuple[Any, ...] = ()
    parts: tuple[Node, ...] = ()


def parse(text: str) -> Node:
    """The tree of an expression. Raises ValueError for what is not read here."""
    tokens, at = [], 0
    text = text.strip()
    while at < len(text):
        found = TOKEN.match(text, at)
        if found is None:
            raise ValueError(f"{text[at:][:20]!r} is not read here")
        assert found.lastgroup is not None
        tokens.append((found.lastgroup, found[found.lastgroup]))
        at = found.end()
    parser = _Parser(tokens)
    tree = parser.expression(0)
    if parser.tokens:
        raise ValueError(f"{parser.tokens[0][1]!r} is more than was expected")
    return tree


class _Parser:
    def __init__(self, tokens: list[tuple[str, str]]) -> None:
        self.tokens = tokens

    def expression(self, level: int) -> Node:
        """Operators of `LEVELS[level]` and tighter ones; all bind to the left."""
        if level == len(LEVELS):
            return self._term()
        left = self.expression(level + 1)
        while self.tokens and self.tokens[0][1] in LEVELS[level]:
            operator = self._take()
            on = self._names() if self._next("on") else None
            left = Node("binary", (operator, on), (left, self.expression(level + 1)))
        return left

    def _term(self) -> Node:
        kind, word = self.tokens[0]
        if kind == "number":
            self._take()
            return Node("number", (float(word),))
        if word == "(":
            self._take()
            inner = self.expression(0)
            self._expect(")")
            return inner
        if kind != "word":
            raise ValueError(f"{word!r} is not expected here")
        self._take()
        if word in SUMS:
            by = self._names() if self._next("by") else ()
            (inner,) = self._arguments()
            return Node("sum", (word, by), (inner,))
        if self.tokens and self.tokens[0][1] == "(":
            return Node("call", (word,), tuple(self._arguments()))
        return self._selector(word)

    def _selector(self, name: str) -> Node:
        matchers = []
        if self._next("{"):
            while not self._next("}"):
                label, operator, text = self._take(), self._take(), self._take()
                matchers.append((label, operator, text.strip('"')))
                self._next(",")
        if self.tokens and self.tokens[0][0] == "range":
            span = self._take()[1:-1]
            return Node("range", (name, tuple(matchers), float(span[:-1]) * UNITS[span[-1]]))
        return Node("instant", (name, tuple(matchers)))

    def _arguments(self) -> list[Node]:
        self._expect("(")
        found = [self.expression(0)]
        while self._next(","):
            found.append(self.expression(0))
        self._expect(")")
        return found

    def _names(self) -> tuple[str, ...]:
        self._expect("(")
        names = []
        while not self._next(")"):
            names.append(self._take())
            self._next(",")
        return tuple(names)

    def _next(self, word: str) -> bool:
        """Take the word if it is the next one."""
        if self.tokens and self.tokens[0][1] == word:
            self._take()
            return True
        return False

    def _expect(self, word: str) -> None:
        if not self._next(word):
            raise ValueError(f"expected {word!r}, got {self.tokens[:1]}")

    def _take(self) -> str:
        if not self.tokens:
            raise ValueError("the expression ends too early")
        return self.tokens.pop(0)[1]


def evaluate(node: Node, series: Series, at: float) -> Value:
    """What an expression gives at a moment: a vector, or a number."""
    if node.kind == "number":
        return float(node.words[0])
    if node.kind == "instant":
        return _instant(node, series, at)
    if node.kind == "sum":
        return _sum(node, _vector(evaluate(node.parts[0], series, at)))
    if node.kind == "call":
        return _call(node, series, at)
    if node.kind == "binary":
        operator, on = node.words
        left, right = (evaluate(part, series, at) for part in node.parts)
        if operator in ("and", "or", "unless"):
            return _sets(operator, on, _vector(left), _vector(right))
        return _arithmetic(operator, on, left, right)
    raise ValueError(f"{node.kind} stands alone")


def _instant(node: Node, series: Series, at: float) -> Vector:
    found: Vector = {}
    for labels, readings in _selected(node, series):
        past = readings.between(at - LOOKBACK_S, at)
        if past and (value := past[-1][1]) is not None:
            found[labels] = value
    return found


def _selected(node: Node, series: Series) -> Iterable[tuple[Labels, Readings]]:
    name, matchers = node.words[:2]
    for labels, readings in series.of.get(name, {}).items():
        if all(_matches(dict(labels).get(label, ""), *rest) for label, *rest in matchers):
            yield labels, readings


def _matches(value: str, operator: str, text: str) -> bool:
    if operator in ("=", "!="):
        return (value == text) is (operator == "=")
    return bool(re.fullmatch(text, value)) is (operator == "=~")


def _sum(node: Node, vector: Vector) -> Vector:
    how, by = node.words
    groups: dict[Labels, list[float]] = {}
    for labels, value in vector.items():
        groups.setdefault(tuple(pair for pair in labels if pair[0] in by), []).append(value)
    return {labels: SUMS[how](values) for labels, values in groups.items()}


def _call(node: Node, series: Series, at: float) -> Vector:
    (name,), parts = node.words, node.parts
    if name == "absent":
        if _vector(evaluate(parts[0], series, at)):
            return {}
        matchers = parts[0].words[1]
        return {tuple(sorted((label, text) for label, operator, text in matchers if operator == "=")): 1.0}
    if name == "histogram_quantile":
        quantile = evaluate(parts[0], series, at)
        assert isinstance(quantile, float)
        return _quantile(quantile, _vector(evaluate(parts[1], series, at)))
    functions: dict[str, Callable[..., float | None]] = {
        "rate": lambda samples, start: _extrapolated(samples, start, at, per_second=True),
        "increase": lambda samples, start: _extrapolated(samples, start, at, per_second=False),
        "min_over_time": lambda samples, _: min(value for _, value in samples),
        "max_over_time": lambda samples, _: max(value for _, value in samples),
    }
    if name == "predict_linear":
        ahead = evaluate(parts[1], series, at)
        functions[name] = lambda samples, _: _predicted(samples, at, ahead)
    if name not in functions or parts[0].kind != "range":
        raise ValueError(f"{name} is not read here")
    start, found = at - parts[0].words[2], {}
    for labels, readings in _selected(parts[0], series):
        inside = [reading for reading in readings.between(start, at) if reading[1] is not None]
        value = functions[name](inside, start) if inside else None
        if value is not None:
            found[labels] = value
    return found


def _extrapolated(
    samples: Sequence[tuple[float, float]], start: float, end: float, *, per_second: bool
) -> float | None:
    """`extrapolatedRate` of promql/functions.go, for counters."""
    if len(samples) < 2:
        return None
    (first, low), (last, high) = samples[0], samples[-1]
    gain = high - low
    for (_, before), (_, after) in itertools.pairwise(samples):
        if after < before:  # it began anew
            gain += before
    spacing = (last - first) / (len(samples) - 1)
    to_start, to_end = first - start, end - last
    if to_start >= spacing * 1.1:
        to_start = spacing / 2
    if gain > 0 and low >= 0:
        to_start = min(to_start, (last - first) * low / gain)
    if to_end >= spacing * 1.1:
        to_end = spacing / 2
    gain *= (last - first + to_start + to_end) / (last - first)
    return gain / (end - start) if per_second else gain


def _predicted(samples: Sequence[tuple[float, float]], at: float, ahead: Value) -> float | None:
    """Least squares, as seen `ahead` seconds from now."""
    assert isinstance(ahead, float)
    if len(samples) < 2:
        return None
    times = [when - at for when, _ in samples]
    mean_t, mean_v = math.fsum(times) / len(times), math.fsum(value for _, value in samples) / len(samples)
    spread = math.fsum((time - mean_t) ** 2 for time in times)
    slope = math.fsum((time - mean_t) * (value - mean_v) for time, (_, value) in zip(times, samples, strict=True))
    return mean_v + slope / spread * (ahead - mean_t)


def _quantile(quantile: float, vector: Vector) -> Vector:
    """`bucketQuantile` of promql/quantile.go."""
    groups: dict[Labels, list[tuple[float, float]]] = {}
    for labels, value in vector.items():
        bound = float(dict(labels)["le"])
        groups.setdefault(tuple(pair for pair in labels if pair[0] != "le"), []).append((bound, value))
    found: Vector = {}
    for labels, buckets in groups.items():
        buckets.sort()
        rank = quantile * buckets[-1][1]
        if not buckets[-1][1] or len(buckets) < 2:
            found[labels] = math.nan
            continue
        at = next(number for number, (_, count) in enumerate(buckets) if count >= rank)
        if at == len(buckets) - 1:
            found[labels] = buckets[-2][0]
            continue
        low, below = buckets[at - 1] if at else (0.0, 0.0)
        bound, count = buckets[at]
        found[labels] = low + (bound - low) * (rank - below) / (count - below)
    return found


def _sets(operator: str, on: tuple[str, ...] | None, left: Vector, right: Vector) -> Vector:
    there = {_key(labels, on) for labels in right}
    if operator == "or":
        here = {_key(labels, on) for labels in left}
        return {**left, **{labels: value for labels, value in right.items() if _key(labels, on) not in here}}
    return {labels: value for labels, value in left.items() if (_key(labels, on) in there) is (operator == "and")}


def _arithmetic(operator: str, on: tuple[str, ...] | None, left: Value, right: Value) -> Value:
    """Between numbers and vectors. A comparison keeps what it holds for, with the left side's value."""
    compares = operator in LEVELS[2]
    if isinstance(left, float) and isinstance(right, float):
        if compares:
            raise ValueError("a comparison of two numbers is not read here")
        return float(_apply(operator, left, right))
    if isinstance(right, float):
        pairs = [(labels, value, right) for labels, value in _vector(left).items()]
    elif isinstance(left, float):
        if compares:
            raise ValueError("a number on the left of a comparison is not read here")
        pairs = [(labels, left, value) for labels, value in right.items()]
    else:
        others = {_key(labels, on): value for labels, value in right.items()}
        pairs = [
            (_key(labels, on) if on is not None and not compares else labels, value, others[_key(labels, on)])
            for labels, value in left.items()
            if _key(labels, on) in others
        ]
    if compares:
        return {labels: value for labels, value, other in pairs if _apply(operator, value, other)}
    return {labels: float(_apply(operator, value, other)) for labels, value, other in pairs}


def _apply(operator: str, left: float, right: float) -> float | bool:
    if operator == "/":
        return left / right if right else (math.nan if not left or math.isnan(left) else math.inf * left)
    operations: dict[str, Callable[[float, float], float | bool]] = {
        "+": lambda a, b: a + b,
        "-": lambda a, b: a - b,
        "*": lambda a, b: a * b,
        "==": lambda a, b: a == b,
        "!=": lambda a, b: a != b,
        ">": lambda a, b: a > b,
        "<": lambda a, b: a < b,
        ">=": lambda a, b: a >= b,
        "<=": lambda a, b: a <= b,
    }
    return operations[operator](left, right)


def _key(labels: Labels, on: tuple[str, ...] | None) -> Labels:
    return labels if on is None else tuple(pair for pair in labels if pair[0] in on)


def _vector(value: Value) -> Vector:
    if isinstance(value, float):
        raise ValueError("a number stands where a vector should")
    return value


def fired(rules: Iterable[Mapping[str, Any]], series: Series, until: float, every: float = 30.0) -> dict[str, float]:
    """The alerts that fire between 0 and `until`, with the moment at which each first does."""
    since: dict[tuple[str, Labels], float] = {}
    found: dict[str, float] = {}
    trees = [(rule["alert"], parse(rule["expr"]), _seconds(rule.get("for", "0s"))) for rule in rules]
    at = 0.0
    while at <= until:
        for name, tree, for_s in trees:
            holds = _vector(evaluate(tree, series, at))
            for key in [key for key in since if key[0] == name and key[1] not in holds]:
                del since[key]
            for labels in holds:
                began = since.setdefault((name, labels), at)
                if at - began >= for_s:
                    found.setdefault(name, at)
        at += every
    return found


def _seconds(span: str) -> float:
    return float(span[:-1]) * UNITS[span[-1]]
