"""What is read again of a prompt that begins as an earlier one, by what conditions an adapter and what it acts on.

A question behind a system prompt is new; then the chat goes on; then another question is asked of the same adapter
behind the same system prompt; then one of another adapter. All with the prefix cache, one request at a time, every
prompt ending as a chat template ends them. Scores of the same variants: `jobs/configs/smollm2_conditioning.yaml`.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING

from jobs.benchmarks.model_sizes import MODEL_SIZES, ModelSize, prompts
from jobs.benchmarks.random_adapters import INVOCATION, adapter_directories
from jobs.benchmarks.report import BenchmarkReport, ReportRow
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.workers.prefix import Prefix

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

KEPT_MB = 512
ENDING = [7, 8, 9, 10, 11, *INVOCATION]  # of every prompt; the longest tail that is scaled has as many tokens
SITUATIONS = ("cold", "next turn", "same system prompt", "another adapter")


@dataclass(frozen=True)
class Sizes:
    """Tokens of the system prompt, of a question with the prompt's ending, and of an answer."""

    system: int = 384
    said: int = 64
    new: int = 16
    rounds: int = 5

    @property
    def length(self) -> int:
        """Room for two turns."""
        return self.system + 2 * (self.said + self.new) + 16


QUICK = Sizes(system=64, said=24, new=4, rounds=2)


@dataclass(frozen=True)
class Variant:
    """An adapter's kind; `head`: its vectors are made from the system prompt alone."""

    adapters: str
    kind: str | None = None
    head: bool = False


VARIANTS = (
    Variant("none"),
    Variant("LoRA", "lora"),
    Variant("activated LoRA", "alora"),
    Variant("PEDRO, whole prompt", "pedro"),
    Variant("PEDRO, system turn", "pedro", head=True),
    Variant("PEDRO, answer, tail 1", "pedro-answer-1"),
    Variant("PEDRO, answer, tail 9", "pedro-answer-9"),
)


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each model: every variant in every round."""
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    report = BenchmarkReport("conditioning", {**asdict(sizes), "threads": options.threads})
    for name in options.models or (("tiny",) if options.quick else ("SmolLM2",)):
        size = MODEL_SIZES[name]
        kinds = sorted({variant.kind for variant in VARIANTS if variant.kind})
        both = {kind: adapter_directories(size, kind, 2) for kind in kinds}
        adapters = {f"{kind} {i}": str(path) for kind, paths in both.items() for i, path in enumerate(paths)}
        setup = {"size": name, "device": options.device, "threads": options.threads, "max_batch": 1}
        engine = Prefix({**setup, "length": sizes.length, "prefix_mb": KEPT_MB, "adapters": adapters})
        seen: dict[Variant, list[list[tuple[float, int]]]] = {variant: [] for variant in VARIANTS}
        for number in range(sizes.rounds + 1):  # the first only warms up
            for place, variant in enumerate(VARIANTS):
                asked = _ask(engine, variant, size, sizes, 1000 * (number * len(VARIANTS) + place))
                if number:
                    seen[variant].append(asked)
            log(f"  {name}, round {number} of {sizes.rounds}")
        report.rows += [_row(name, variant, sizes, rounds) for variant, rounds in seen.items()]
    return report


def _ask(engine: Prefix, variant: Variant, size: ModelSize, sizes: Sizes, seed: int) -> list[tuple[float, int]]:
    """For each situation the time to the first token in ms, and how many tokens of the prompt were not read again."""
    (system,) = prompts(size, 1, sizes.system, seed)
    said = [[*words, *ENDING] for words in prompts(size, 4, sizes.said - len(ENDING), seed + 1)]

    def answered(prompt: list[int], which: int = 0) -> tuple[tuple[float, int], list[int]]:
        order = {"prompts": [prompt], "new": sizes.new, "adapter": variant.kind and f"{variant.kind} {which}"}
        done = engine.run({**order, "conditioning_length": sizes.system if variant.head else None})
        return (done["first_ms"][0], done["cached"][0]), done["answers"][0]

    first, answer = answered([*system, *said[0]])
    turn, _ = answered([*system, *said[0], *answer, *said[1]])
    shared, _ = answered([*system, *said[2]])
    other, _ = answered([*system, *said[3]], 1)
    return [first, turn, shared, other]


def _row(model: str, variant: Variant, sizes: Sizes, rounds: list[list[tuple[float, int]]]) -> ReportRow:
    row: ReportRow = {"adapters": variant.adapters, "model": model, "tokens": sizes.system + sizes.said}
    cold = [asked[0][0] for asked in rounds]
    for place, situation in enumerate(SITUATIONS):
        times, name = [asked[place][0] for asked in rounds], situation.replace(" ", "_")
        row[f"{name}_ms"] = round(median(times), 1)
        if place:
            ratio = paired_ratio(times, cold)
            row[f"{name}_ratio"], row[f"{name}_ratio_interval"] = round(ratio.value, 4), ratio.interval
            row[f"{name}_cached"] = round(median(asked[place][1] for asked in rounds))
    return row
