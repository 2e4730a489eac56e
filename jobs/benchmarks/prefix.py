"""Prompts that begin alike: the second turn's time to its first token, and what a cold request pays for it.

Chats have a system prompt of 2,048 tokens and turns that go on from the engine's own answers; every chat is new, so
that its first turn is cold. Shared prompts are asked by many at once, after one who came first. Cold prompts are all
distinct: the same engine with its prefix cache on and off, in turn, round by round. Peers have their own prefix caches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.engine_process import EnginePool, EngineProcessError, peer_environment
from jobs.benchmarks.gguf_model import saved_gguf
from jobs.benchmarks.model_sizes import MODEL_SIZES, ModelSize, prompts, saved_model
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, ReportRow, Target
from jobs.benchmarks.stats import paired_ratio

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

OFF = "ours, cache off"
PEERS = ("llamacpp", "vllm")
KEPT_MB = 1024
LONGEST_RATIO, LARGEST_COST = 0.15, 1.02


@dataclass(frozen=True)
class Sizes:
    """Tokens of a system prompt, of what is said and of an answer; turns of a chat; requests that share a prompt;
    tokens of cold prompts."""

    system: int = 2048
    said: int = 64
    new: int = 32
    turns: int = 8
    sharing: int = 16
    at_once: int = 8
    cold: tuple[int, ...] = (279, 2048)
    rounds: int = 7

    @property
    def length(self) -> int:
        """Room for a whole chat."""
        return self.system + self.turns * (self.said + self.new) + 16


SMALLER = {"SmolLM2": Sizes(turns=3, sharing=4, at_once=4, cold=(279,), rounds=3)}  # a round takes minutes
QUICK = Sizes(system=256, said=16, new=8, turns=3, sharing=4, at_once=2, cold=(128,), rounds=2)


@dataclass(frozen=True)
class Case:
    """Who answers, and with which adapter. `head`: vectors are made from the system prompt alone."""

    engine: str
    adapters: str = "none"
    kind: str | None = None
    head: bool = False
    asked_again: bool = False  # the second turn is the first one once more


OURS = (
    Case("ours"),
    Case("ours", "LoRA", "lora"),
    Case("ours", "(IA)³", "ia3"),
    Case("ours", "PEDRO on the system prompt", "pedro", head=True),
    Case("ours", "PEDRO, asked again", "pedro", asked_again=True),
)


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each model: chats, shared prompts, cold prompts."""
    settings: dict[str, Any] = {"threads": options.threads, "peers": sorted(options.peers)}
    report = BenchmarkReport("prefix", settings)
    for name in options.models or (("tiny",) if options.quick else ("S", "SmolLM2")):
        size, sizes = MODEL_SIZES[name], _sizes_of(name, options)
        settings[name] = asdict(sizes)
        with EnginePool(log) as pool:
            _start(pool, size, sizes, options)
            report.facts.setdefault("engines", {})[name] = pool.wait()
            _Measurement(pool, size, sizes, report, log).run()
        report.skipped |= pool.skipped
    for peer in PEERS:
        if peer not in options.peers:
            report.skipped[peer] = f"not asked for; give --peer {peer}=/path/to/python"
    return report


def _sizes_of(name: str, options: Options) -> Sizes:
    sizes = QUICK if options.quick else SMALLER.get(name, Sizes())
    return replace(sizes, rounds=options.rounds or sizes.rounds)


def _start(pool: EnginePool, size: ModelSize, sizes: Sizes, options: Options) -> None:
    kinds = sorted({case.kind for case in OURS if case.kind})
    setup = {"size": size.name, "threads": options.threads, "device": options.device, "length": sizes.length}
    setup |= {"max_batch": sizes.at_once}
    adapters = {kind: str(adapter_directories(size, kind, 1)[0]) for kind in kinds}
    for name, kept_mb in (("ours", KEPT_MB), (OFF, 0)):
        pool.start(name, "prefix", {**setup, "adapters": adapters, "prefix_mb": kept_mb})
    for peer in PEERS:
        if (python := options.peers.get(peer)) is not None:
            model = saved_gguf(size) if peer == "llamacpp" else saved_model(size)
            environment = peer_environment(python, options.threads) if peer == "vllm" else {}
            pool.start(peer, f"prefix-{peer}", {**setup, "model": str(model)}, python, **environment)


class _Measurement:
    """One model, on processes that are ready."""

    def __init__(self, pool: EnginePool, size: ModelSize, sizes: Sizes, report: BenchmarkReport, log: Log) -> None:
        self._pool, self._size, self._sizes, self._report, self._log = pool, size, sizes, report, log
        self._peers = [Case(peer) for peer in PEERS if pool.has(peer)]
        self._seeds = iter(range(1, 2**31, 1000))

    def run(self) -> None:
        """All that is measured of it."""
        self._chats()
        self._shared()
        for tokens in self._sizes.cold:
            self._cold(tokens)

    def _chats(self) -> None:
        cases = [*OURS, Case(OFF), *self._peers]
        firsts: dict[Case, list[list[float]]] = {case: [] for case in cases}  # ms of each turn, by round
        for number, order in self._rounds(cases):
            for case in order:
                times = self._chat(case)
                if times is not None and number:
                    firsts[case].append(times)
            shown = (f"{c.engine} {c.adapters} {t[-1][0]:.0f}/{t[-1][1]:.0f} ms" for c, t in firsts.items() if t)
            self._log(f"  {self._size.name} chats, round {number} of {self._sizes.rounds}: " + ", ".join(shown))
        for case, rounds in firsts.items():
            if rounds:
                self._chat_row(case, rounds)
        bare = [turns[1] for turns in firsts[OURS[0]]]
        for peer in self._peers:
            if len(firsts[peer]) == len(bare):
                ratio = paired_ratio(bare, [turns[1] for turns in firsts[peer]])
                name = f"{self._size.name} chat, second turn's time to first token: ours / {peer.engine}"
                self._report.targets.append(Target(name, 1.0, ratio, at_most=True))

    def _chat_row(self, case: Case, rounds: Sequence[Sequence[float]]) -> None:
        ratio = paired_ratio([turns[1] for turns in rounds], [turns[0] for turns in rounds])
        row = self._row("chat", case) | {"tokens": self._sizes.system}
        row |= {name: round(median(turns[at] for turns in rounds), 2) for name, at in (("first_ms", 0), ("ms", 1))}
        row |= {"last_ms": round(median(turns[-1] for turns in rounds), 2)}
        row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval, "rounds": len(rounds)}
        self._report.rows.append(row)
        if case.engine == "ours":
            name = f"{self._size.name} chat, {case.adapters}: second turn's time to first token / the first's"
            self._report.targets.append(Target(name, LONGEST_RATIO, ratio, at_most=True))

    def _chat(self, case: Case) -> list[float] | None:
        """The time to each turn's first token in ms; None where the engine cannot do it."""
        sizes, seed = self._sizes, next(self._seeds)
        (chat,) = prompts(self._size, 1, sizes.system, seed)
        times: list[float] = []
        for turn in range(2 if case.asked_again else sizes.turns):
            if not (case.asked_again and turn):
                chat = [*chat, *prompts(self._size, 1, sizes.said, seed + turn + 1)[0]]
            done = self._ask(case, [chat])
            if done is None:
                return None
            times.append(done["first_ms"][0])
            if not case.asked_again:
                chat = [*chat, *done["answers"][0]]
        return times

    def _shared(self) -> None:
        cases = [Case("ours"), Case("ours", "LoRA", "lora"), Case(OFF), *self._peers]
        seen: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
        for number, order in self._rounds(cases):
            for case in order:
                seed = next(self._seeds)
                (system,) = prompts(self._size, 1, self._sizes.system, seed)
                tails = prompts(self._size, self._sizes.sharing + 1, self._sizes.said, seed + 1)
                asked = [[*system, *tail] for tail in tails]
                done = self._ask(case, asked[:1]) and self._ask(case, asked[1:])
                if done is not None and number:
                    seen[case].append(done)
        for case, rounds in seen.items():
            if rounds:
                row = self._row("shared prompt", case) | {"tokens": self._sizes.system, "rounds": len(rounds)}
                row |= {"ms": round(median(median(done["first_ms"]) for done in rounds), 2)}
                row |= {"tok_s": round(median(self._rate(done) for done in rounds), 1)}
                if seen[Case(OFF)]:
                    ratio = paired_ratio(*([self._rate(done) for done in seen[c]] for c in (case, Case(OFF))))
                    row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
                self._report.rows.append(row)

    def _cold(self, tokens: int) -> None:
        for adapters, kind in (("none", None), ("LoRA", "lora"), ("PEDRO", "pedro")):
            cases = [Case("ours", adapters, kind), Case(OFF, adapters, kind)]
            seen: dict[Case, list[dict[str, Any]]] = {case: [] for case in cases}
            for number, order in self._rounds(cases, of_each=2):
                for case in order:
                    done = self._ask(case, prompts(self._size, 1, tokens, next(self._seeds)))
                    if done is not None and number:
                        seen[case].append(done)
            on, off = (seen[case] for case in cases)
            for what, figures in (
                ("time to first token", [[done["first_ms"][0] for done in rounds] for rounds in (on, off)]),
                ("whole answer", [[1000 * done["wall_s"] for done in rounds] for rounds in (on, off)]),
            ):
                ratio = paired_ratio(*figures)
                row = self._row(f"cold, {what}", cases[0]) | {"tokens": tokens, "ms": round(median(figures[0]), 2)}
                row |= {"off_ms": round(median(figures[1]), 2), "rounds": len(on)}
                self._report.rows.append(row | {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval})
                name = f"{self._size.name} cold prompt of {tokens}, {adapters}, {what}: cache on / off"
                self._report.targets.append(Target(name, LARGEST_COST, ratio, at_most=True))

    def _rounds(self, cases: Sequence[Case], of_each: int = 1) -> Iterator[tuple[int, list[Case]]]:
        """The number of each round and the order of its cases; the first only warms up."""
        for number in range(of_each * self._sizes.rounds + 1):
            yield number, list(cases)[:: -1 if number % 2 else 1]

    def _ask(self, case: Case, asked: list[list[int]]) -> dict[str, Any] | None:
        if not self._pool.has(case.engine):
            return None
        order = {"prompts": asked, "new": self._sizes.new, "adapter": case.kind}
        order |= {"conditioning_length": self._sizes.system if case.head else None}
        try:
            return self._pool.run(case.engine, order)
        except EngineProcessError as error:
            if case not in self._peers:
                raise
            self._pool.skip(case.engine, str(error))
            return None

    def _rate(self, done: dict[str, Any]) -> float:
        return self._sizes.sharing * self._sizes.new / float(done["wall_s"])

    def _row(self, what: str, case: Case) -> ReportRow:
        return {"case": what, "engine": case.engine, "adapters": case.adapters, "model": self._size.name}
