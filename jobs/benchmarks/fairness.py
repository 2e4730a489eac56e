"""What a flood by one tenant costs another that asks one short request at a time; see fairness_http for HTTP.

The quiet tenant waits a random while after each answer. Its times to the first token, from the moment it asks, are
taken alone and beside each flood in turn, in one run. Aim: the 95th percentile beside a flood at most 1.2 times that
alone. The time per token is reported without an aim: alone a step holds one row, beside others it holds several.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.bench_engine import IDLE_S, BenchEngine, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, ReportRow, Target, exactly
from jobs.benchmarks.stats import percentile, percentile_ratio

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from pedro.engine import Output

SLOTS = 32
THINK_S = 0.15  # the mean of the quiet tenant's pauses
WARM_S, LONE_S = 1.5, 5.0  # a flood's head start, and how long it is measured alone
LIMIT = 1.2
KEEPS = 0.25  # what a flood must at least make of its throughput alone


@dataclass(frozen=True)
class Flood:
    """Requests that one tenant keeps up at once: each answer's end brings the next request."""

    name: str
    streams: int
    prompt: int
    new: int
    n: int = 1

    def smaller(self) -> Flood:
        """For a quick run."""
        return Flood(self.name, max(1, self.streams // 4), self.prompt // 8, self.new // 8, min(self.n, 8))


FLOODS = (
    Flood("64 streams of 480 tokens", 64, 64, 480),
    Flood("4 requests of n = 32", 4, PROMPT_TOKENS, 240, 32),
    Flood("64 long prompts", 64, 2000, 16),
)


@dataclass
class Seen:
    """What one case gave: the quiet tenant's times, and the flood's tokens in `seconds`."""

    first_ms: list[float] = field(default_factory=list)
    token_ms: list[float] = field(default_factory=list)
    tokens: int = 0
    seconds: float = 0.0

    def add(self, other: Seen) -> None:
        self.first_ms += other.first_ms
        self.token_ms += other.token_ms
        self.tokens += other.tokens
        self.seconds += other.seconds

    def answered(self, asked: float, moments: Sequence[float]) -> None:
        """The quiet tenant asked at `asked` and its tokens came at `moments`."""
        self.first_ms.append((moments[0] - asked) * 1000)
        if len(moments) > 1:
            self.token_ms.append((moments[-1] - moments[0]) / (len(moments) - 1) * 1000)


def run(options: Options, log: Log) -> BenchmarkReport:
    """The engine in process."""
    use_threads(options.threads)
    size = MODEL_SIZES[(options.models or ("S",))[0]]
    rounds = options.rounds or (1 if options.quick else 3)
    asks = 8 if options.quick else 25
    floods = [flood.smaller() for flood in FLOODS] if options.quick else list(FLOODS)
    slots = (options.batches or (8 if options.quick else SLOTS,))[0]
    settings = {"model": size.name, "slots": slots, "rounds": rounds, "requests": asks, "think_s": THINK_S}
    report = BenchmarkReport(
        "fairness", {**settings, "prompt": PROMPT_TOKENS, "new": NEW_TOKENS, "threads": options.threads}
    )
    length = max(PROMPT_TOKENS + NEW_TOKENS, *(flood.prompt + flood.new for flood in floods))
    length = min(size.context, length + 8)
    engine = BenchEngine(size, options.device, max_batch=slots, max_length=length)
    quiet, flooding = (str(path) for path in adapter_directories(size, "pedro", 2))
    engine.load([quiet, flooding])
    scale = 0.2 if options.quick else 1.0
    lone = {flood.name: _segment(engine, flooding, flood, None, 0, scale) for flood in floods}  # nobody asked yet
    seen = {"alone": Seen(), **{flood.name: Seen() for flood in floods}}
    for number in range(rounds + 1):  # the first warms up
        for flood in (None, *floods):
            made = _segment(engine, flooding, flood, quiet, asks if number else 2, scale, number)
            name = flood.name if flood else "alone"
            if number:
                seen[name].add(made)
                log(f"  round {number} of {rounds}, {name}: {line(made)}")
    engine.close()
    add_rows(report, "engine", seen, lone, LIMIT)
    return report


def line(seen: Seen) -> str:
    """A case in a few words."""
    first = f"first token p50 {median(seen.first_ms):.1f}, p95 {percentile(seen.first_ms, 0.95):.1f} ms"
    return f"{first}; a token {median(seen.token_ms):.1f} ms; the flood {seen.tokens / seen.seconds:.0f} tok/s"


def add_rows(
    report: BenchmarkReport, where: str, seen: dict[str, Seen], lone: dict[str, Seen], limit: float | None
) -> None:
    """A row and targets for each case, beside the first, which is without a flood and told where there is a limit."""
    alone = next(iter(seen.values()))
    for name, case in seen.items():
        if case is alone and limit is None:
            continue
        row: ReportRow = {"where": where, "case": name, "requests": len(case.first_ms)}
        for key, times in (("ttft", case.first_ms), ("token", case.token_ms)):
            row |= {f"{key}_{mark}_ms": round(percentile(times, s), 2) for mark, s in (("p50", 0.5), ("p95", 0.95))}
        if case is not alone:
            half, most = (percentile_ratio(case.first_ms, alone.first_ms, share) for share in (0.5, 0.95))
            slower = percentile_ratio(case.token_ms, alone.token_ms, 0.5)
            row |= {"ratio": round(most.value, 3), "ratio_interval": most.interval, "p50_ratio": round(half.value, 3)}
            row |= {"p50_interval": half.interval, "token_ratio": round(slower.value, 3)}
            if limit is not None:
                row |= {"flood_tok_s": round(case.tokens / case.seconds, 1)}
                report.targets.append(Target(f"{where}, {name}: first token p95 / alone", limit, most, at_most=True))
            if name in lone:
                by_itself = lone[name].tokens / lone[name].seconds
                kept = exactly(row["flood_tok_s"] / by_itself)
                row |= {"flood_alone_tok_s": round(by_itself, 1)}
                report.targets.append(Target(f"{where}, {name}: the flood's tokens/s / by itself", KEEPS, kept))
        report.rows.append(row)


def _segment(
    engine: BenchEngine, flooding: str, flood: Flood | None, quiet: str | None, asks: int, scale: float, seed: int = 0
) -> Seen:
    """The flood, if any, and `asks` requests of the quiet tenant, if it asks; then all is cancelled."""
    seen, tenant = Seen(), _Quiet(engine, quiet, asks, seed)
    pump = _Flood(engine, flooding, flood, seed)
    pump.start()
    end = time.perf_counter() + scale * (WARM_S if flood else 0)
    pump.step_until(lambda: time.perf_counter() >= end, ())
    tenant.start()
    pump.tokens, began = 0, time.perf_counter()
    end = began + scale * LONE_S
    pump.step_until(lambda: tenant.done if quiet else time.perf_counter() >= end, (tenant,) if quiet else ())
    seen.tokens, seen.seconds = pump.tokens, time.perf_counter() - began
    pump.stop()
    for asked, moments in tenant.answers:
        seen.answered(asked, moments)
    return seen


class _Quiet:
    """Asks, reads the answer, pauses, and asks again."""

    def __init__(self, engine: BenchEngine, ref: str | None, asks: int, seed: int) -> None:
        self.answers: list[tuple[float, list[float]]] = []
        self._engine, self._ref = engine, ref
        self._prompts = prompts(engine.size, asks, PROMPT_TOKENS, seed)
        self._rng = random.Random(seed)  # noqa: S311
        self._id, self._moments = "", []  # type: ignore[var-annotated]
        self._due = 0.0

    def start(self) -> None:
        """Ask for the first time soon."""
        self._due = time.perf_counter() + self._rng.expovariate(1 / THINK_S)

    @property
    def done(self) -> bool:
        return not self._prompts and not self._id

    def turn(self) -> None:
        """Ask if it is time. What a step in flight holds up counts: `_due` is when the request came."""
        if not self._id and self._prompts and time.perf_counter() >= self._due:
            request = self._engine.request(self._prompts.pop(), self._ref, NEW_TOKENS, tenant="quiet")
            self._id, self._moments = request.id, []
            self._engine.engine.add(request)

    def take(self, output: Output, now: float) -> None:
        """Note an output of its own; at the answer's end, when it asks again."""
        if output.request_id != self._id:
            return
        if output.error is not None:
            raise output.error
        self._moments.append(now)
        if output.finish_reason is not None:
            self.answers.append((self._due, self._moments))
            self._id, self._due = "", now + self._rng.expovariate(1 / THINK_S)


class _Flood:
    """Keeps the flood's requests up and steps the engine."""

    def __init__(self, engine: BenchEngine, ref: str, flood: Flood | None, seed: int) -> None:
        self.tokens = 0
        self._engine, self._ref, self._flood = engine, ref, flood
        self._rng = random.Random(seed)  # noqa: S311
        self._unfinished: dict[str, int] = {}

    def start(self) -> None:
        for _ in range(self._flood.streams if self._flood else 0):
            self._ask()

    def step_until(self, done: Callable[[], bool], tenants: Sequence[_Quiet]) -> None:
        """Step, with a new request of the flood for each that ends, until `done`."""
        while not done():
            for tenant in tenants:
                tenant.turn()
            outputs = self._engine.engine.step()
            now = time.perf_counter()
            for output in outputs:
                if output.request_id in self._unfinished:
                    self._take(output)
                for tenant in tenants:
                    tenant.take(output, now)
            if self._engine.engine.idle and not outputs:
                time.sleep(IDLE_S)

    def stop(self) -> None:
        """End what is unfinished."""
        for name in list(self._unfinished):
            self._engine.engine.cancel(name)
        while self._engine.engine.has_work():
            self._engine.engine.step()

    def _ask(self) -> None:
        assert self._flood is not None, "asked for only where there is one"
        prompt: list[int] = prompts(self._engine.size, 1, self._flood.prompt, self._rng.randrange(1 << 30))[0]
        sampling: dict[str, Any] = {"temperature": 1.0, "seed": 1} if self._flood.n > 1 else {}
        request = self._engine.request(prompt, self._ref, self._flood.new, tenant="flood", n=self._flood.n, **sampling)
        self._unfinished[request.id] = self._flood.n
        self._engine.engine.add(request)

    def _take(self, output: Output) -> None:
        if output.error is not None:
            raise output.error
        self.tokens += len(output.token_ids)
        if output.finish_reason is not None:
            self._unfinished[output.request_id] -= 1
            if not self._unfinished[output.request_id]:
                del self._unfinished[output.request_id]
                self._ask()
