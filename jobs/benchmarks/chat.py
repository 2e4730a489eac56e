"""Text of real length on a real language model: MT-Bench's two turns, and a prompt of 2,048 tokens.

Answers are greedy, in float32, and end where the model ends them. The server, with no adapter and with a different
PEDRO adapter in each conversation, stands beside transformers' `generate()` on the same weights, in turn, round by
round; the bare model's answers are compared with `generate()`'s to the letter.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.report import BenchmarkReport, Target, exactly
from jobs.benchmarks.stats import Ratio, paired_ratio
from pedro.data import general_text
from pedro.data.tasks import get_task

if TYPE_CHECKING:
    from jobs.benchmarks.chat_contenders import Contender, Generate, Held, Turns
    from jobs.benchmarks.engine_process import Log

MT_BENCH = "MT-Bench"
ASKED = "What is the following text about?\n\n"
TIE = 1e-3  # logits that are closer may change places with the order of a sum
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class Sizes:
    """Rounds that count, conversations at once, tokens of an answer, of the long prompt and of the answer to it."""

    rounds: int = 5
    batches: tuple[int, ...] = (1, 8)
    new: int = 256
    prompt: int = 2048
    after_prompt: int = 64

    @property
    def length(self) -> int:
        """Room for the longest prompt and its answer: two of MT-Bench's questions have at most 1,200 tokens."""
        return max(self.prompt + self.after_prompt, 1200 + 2 * self.new) + 16


QUICK = Sizes(rounds=1, batches=(2,), new=16, prompt=512, after_prompt=8)


@dataclass(frozen=True)
class Difference:
    """The first token of an answer that is not `generate()`'s, and how far the two likeliest logits are apart there."""

    texts: str
    batch: int
    round: int
    conversation: int
    turn: int
    token: int
    margin: float


class ChatComparison:
    """`generate()` and servers, by what they answer with: "none", and "pedro" where there are adapters."""

    def __init__(self, generate: Generate, servers: Mapping[str, Contender], sizes: Sizes, log: Log) -> None:
        self.report = BenchmarkReport("chat", asdict(sizes))
        self._generate, self._sizes, self._log = generate, sizes, log
        self._contenders: dict[str, Contender] = {"generate": generate, **servers}
        self._differences: list[Difference] = []

    def run(self, data: Path) -> BenchmarkReport:
        """Every case. Raises DataError where `data` has no mt_bench/question.jsonl."""
        sizes, rounds = self._sizes, range(self._sizes.rounds + 1)
        questions = mt_bench(data)
        for batch in sizes.batches:
            self._case(MT_BENCH, [list(itertools.islice(questions, batch)) for _ in rounds], sizes.new)
        prompts = [[(long_prompt(self._generate, sizes.prompt, number),)] for number in rounds]
        self._case(f"{sizes.prompt:,}-token prompt", prompts, sizes.after_prompt)
        self.report.facts["differences"] = [asdict(difference) for difference in self._differences]
        unlike = sum(difference.margin > TIE for difference in self._differences)
        name = f"answers unlike generate()'s where two logits are more than {TIE:g} apart"
        self.report.targets.append(Target(name, 0, exactly(unlike), at_most=True))
        return self.report

    def _case(self, texts: str, rounds: Sequence[Sequence[Turns]], new: int) -> None:
        """The same conversations by all contenders in turn; the first round warms up and does not count."""
        held: dict[str, list[Held]] = {name: [] for name in self._contenders}
        for number, conversations in enumerate(rounds):
            for name in list(held)[:: -1 if number % 2 else 1]:
                done = self._contenders[name].converse(conversations, new if number else WARM_UP_TOKENS)
                if number:
                    held[name].append(done)
            said = f"  {texts}, {len(conversations)} at once, round {number} of {len(rounds) - 1}"
            self._log(said + "".join(f", {name} {r[-1].figures()['tok_s']:.1f}" for name, r in held.items() if r))
        equal, compared = self._compare(texts, held["generate"], held["none"])
        _add_rows(self.report, texts, len(rounds[0]), held, f"{equal}/{compared}")

    def _compare(self, texts: str, theirs: Sequence[Held], ours: Sequence[Held]) -> tuple[int, int]:
        """How many answers are equal, of how many to equal prompts."""
        equal = compared = 0
        for number, (their, our) in enumerate(zip(theirs, ours, strict=True), start=1):
            for conversation, replies in enumerate(zip(their.replies, our.replies, strict=True)):
                for turn, (known, found) in enumerate(zip(*replies, strict=True), start=1):
                    compared += 1
                    if known.text == found.text:
                        equal += 1
                        continue
                    at = self._generate.first_difference(known, found)
                    margin = self._generate.margin([*known.prompt_ids, *known.token_ids[:at]])
                    place = (texts, len(their.replies), number, conversation, turn, at, round(margin, 6))
                    self._differences.append(Difference(*place))
                    break  # what follows has another answer before it
        return equal, compared


def mt_bench(data: Path) -> itertools.cycle[Turns]:
    """MT-Bench's questions for ever: the first of every category, then the second of each. Raises DataError."""
    groups: dict[str, list[Turns]] = {}
    for row in get_task("mt_bench").rows("test", data):
        groups.setdefault(row.group, []).append(row.extra["turns"])
    mixed = itertools.chain.from_iterable(itertools.zip_longest(*groups.values()))
    return itertools.cycle([turns for turns in mixed if turns is not None])


def long_prompt(generate: Generate, tokens: int, number: int) -> str:
    """A question about a passage of general text, as long as fits into a prompt of `tokens`."""
    ids = generate.tokenizer(general_text.FILE.read_text(), add_special_tokens=False).input_ids
    start = number * tokens // 2 % max(1, len(ids) - tokens)

    def said(count: int) -> str:
        return ASKED + generate.tokenizer.decode(ids[start : start + count])

    count = tokens
    while (over := len(generate.prompt_ids([{"role": "user", "content": said(count)}])) - tokens) > 0:
        count -= over
    return said(count)


def _add_rows(report: BenchmarkReport, texts: str, batch: int, held: Mapping[str, Sequence[Held]], equal: str) -> None:
    """A row a contender, with ratios to `generate()` of the same round, and the targets of the case."""
    figures = {name: [one.figures() for one in rounds] for name, rounds in held.items()}

    def ratio(name: str, key: str, other: str = "generate") -> Ratio:
        return paired_ratio([f[key] for f in figures[name]], [f[key] for f in figures[other]])

    for name, rounds in held.items():
        replies = [reply for one in rounds for turns in one.replies for reply in turns]
        served = name != "generate"
        row: dict[str, Any] = {"texts": texts, "engine": "server" if served else name, "batch": batch}
        row |= {"adapters": name if served else "none", "answers": len(replies)}
        row |= {"prompt_tokens": round(median(reply.prompt_tokens for reply in replies))}
        row |= {"answer_tokens": sum(len(reply.moments) for reply in replies)}
        row |= {key: round(median(f[key] for f in figures[name]), 2) for key in ("tok_s", "ttft_ms", "tpot_ms")}
        for key, figure in (("ratio", "tok_s"), ("ttft_ratio", "ttft_ms"), ("tpot_ratio", "tpot_ms")):
            found = ratio(name, figure)
            row |= {key: round(found.value, 4), f"{key}_interval": found.interval}
        report.rows.append(row | ({"equal": equal} if name == "none" else {}))
    label = f"{texts}, {batch} at once: "
    for what, figure in (("tokens per second", "tok_s"), ("time to first token", "ttft_ms")):
        name = f"{label}server / generate() {what}"
        report.targets.append(Target(name, 1.0, ratio("none", figure), at_most=figure == "ttft_ms"))
    if "pedro" in held:
        slower = ratio("pedro", "tpot_ms", "none")
        report.targets.append(Target(f"{label}PEDRO / no adapter time per token", 1.03, slower, at_most=True))
