"""Drafts by prompt lookup beside none: the same answers, in one run. Rates are by the clock and by the time on
processors, which busy neighbours disturb less.

What a draft costs is measured at size S, whose weights are made so that each token has one that follows it: the prompt
then says how much of the answer can be found in it. How often real drafts are right is measured on a real backbone, if
it is here. Adapters are PEDRO's, a tenant a row; beside real weights they are as before training, so that answers are
the backbone's.
"""

from __future__ import annotations

import itertools
import json
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

from jobs.benchmarks.bench_engine import BenchEngine, SilentTokenizer, take, use_threads
from jobs.benchmarks.model_sizes import FIRST_TOKEN_ID, MODEL_SIZES, PROMPT_TOKENS, ModelSize, bench_folder, make_model
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.timeline import Timeline
from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.data.demo import CHAT_TENANTS
from pedro.engine import Request, SamplingParams
from pedro.errors import BackboneError
from pedro.methods import get_method
from pedro.methods.adapter_files import save_adapter

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

NEW = 64  # tokens of an answer at size S
MOST_NEW = 96  # and of one in words, where the model does not end it
SPAN = 12  # tokens of an answer that stand together in the prompt
PAYS, HARMS = 1.3, 0.98
EXTRACTIVE = ("spans", "copied", "quoted")  # cases of which much stands in the prompt
SUBJECTS = (
    *("a lighthouse", "two brothers", "a lost dog", "the sea", "an old clock", "a market", "snow", "a violin"),
    *("a train journey", "a baker", "the moon", "a letter", "a garden", "a river", "a painter", "a bridge"),
    *("an island", "a school play", "a storm", "a map", "a farmer", "a library", "a kite", "a mountain"),
)
ROUND = len(SUBJECTS)  # prompts of a case before they begin again


@dataclass(frozen=True)
class Subject:
    """What answers, and `asked(case, number)`: a prompt of that case."""

    name: str
    size: ModelSize
    make: Callable[[], PreTrainedModel]
    digest: str
    adapters: Callable[[int], list[str]]
    cases: tuple[str, ...]
    asked: Callable[[str, int], list[int]]
    new: int
    ends: tuple[int, ...] = ()


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each subject, each batch, each case: all rows with drafts beside all without."""
    use_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 15)
    settings: dict[str, Any] = {"rounds": rounds, "threads": options.threads, "prompt": PROMPT_TOKENS, "new": NEW}
    report = BenchmarkReport("speculation", {**settings, "most_new": MOST_NEW, "span": SPAN})
    for name in options.models or ("S",):
        _measure(
            made_up(MODEL_SIZES[name]), options.batches or ((2,) if options.quick else (1, 8, 32)), rounds, report, log
        )
    for name in options.backbones or (() if options.quick else ("smollm2-135m",)):
        try:
            subject = real(name)
        except BackboneError as error:
            report.skipped[name] = error.message
            continue
        _measure(subject, options.batches or (1, 8), rounds, report, log)
    return report


def _measure(subject: Subject, batches: tuple[int, ...], rounds: int, report: BenchmarkReport, log: Log) -> None:
    refs = subject.adapters(max(batches))
    longest = max(len(subject.asked(case, number)) for case in subject.cases for number in range(ROUND))
    setup: dict[str, Any] = {
        "max_batch": max(batches),
        "max_length": longest + subject.new + 8,
        "digest": subject.digest,
    }
    engines = {
        kind: BenchEngine(subject.size, model=subject.make(), tokenizer=SilentTokenizer(), speculate=kind, **setup)
        for kind in ("off", "ngram")
    }
    for engine in engines.values():
        engine.load(refs)
    for batch in batches:
        for case in subject.cases:
            seen: dict[str, list[tuple[float, float]]] = {kind: [] for kind in engines}
            before = engines["ngram"].engine.stats()["speculation"]
            for number in range(rounds + 1):  # the first only warms up
                asked = [subject.asked(case, number * batch + row) for row in range(batch)]
                answers = []
                for kind in list(engines)[:: 1 if number % 2 else -1]:
                    speeds, answer = _decode(engines[kind], subject, asked, refs)
                    seen[kind].append(speeds)
                    answers.append(answer)
                assert answers[0] == answers[1], f"{subject.name}, {case}: drafts changed an answer"
            counts = engines["ngram"].engine.stats()["speculation"]
            counts = {name: counts[name] - before[name] for name in counts}
            ratio, by_cpu = (
                paired_ratio(*([speeds[at] for speeds in seen[kind][1:]] for kind in ("ngram", "off"))) for at in (0, 1)
            )
            row: dict[str, Any] = {"model": subject.name, "batch": batch, "case": case, "adapters": "pedro"}
            row |= {f"{kind}_tok_s": round(median(wall for wall, _ in found[1:]), 1) for kind, found in seen.items()}
            row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
            row |= {"cpu_ratio": round(by_cpu.value, 4), "cpu_ratio_interval": by_cpu.interval, **counts}
            report.rows.append(row)
            least = PAYS if case in EXTRACTIVE else HARMS
            name = f"{subject.name}, B={batch}, {case}: drafts / none"
            report.targets += [Target(name, least, ratio), Target(f"{name}, by processor time", least, by_cpu)]
            log(f"  {name}: {ratio.value:.3f} {ratio.interval}, by processor time {by_cpu.value:.3f}, {counts}")
    for engine in engines.values():
        engine.close()


def _decode(
    engine: BenchEngine, subject: Subject, asked: list[list[int]], refs: list[str]
) -> tuple[tuple[float, float], dict[str, list[int]]]:
    """Tokens per second after all first tokens, of the clock and of this process, and the answers."""
    params = SamplingParams(max_tokens=subject.new, stop_token_ids=subject.ends, ignore_eos=not subject.ends)
    timeline, answers = Timeline(), {str(row): list[int]() for row in range(len(asked))}
    for row, (ids, ref) in enumerate(zip(asked, refs, strict=False)):
        engine.engine.add(Request(str(row), ids, tenant=ref, adapter=ref, params=params))
    begun, spent = 0, 0.0
    while engine.engine.has_work():
        outputs = engine.engine.step()
        take(outputs, timeline)
        for output in outputs:
            answers[output.request_id] += output.token_ids
        if not begun and all(answers.values()):
            begun, spent = sum(map(len, answers.values())), time.process_time()
    spent = time.process_time() - spent
    made = sum(map(len, answers.values())) - begun
    return (timeline.figures()["decode_tok_s"], made / spent), answers


def made_up(size: ModelSize) -> Subject:
    """A backbone in which token t is always followed by the same other one, so that prompts can say what of an answer
    stands in them: nothing ("free"), spans of it, or each two tokens of it, which went on otherwise ("misleading")."""
    size = replace(size, tied=False)  # read alike: the embedding is a table, the head a product
    rng = random.Random(0)  # noqa: S311
    tokens = list(range(FIRST_TOKEN_ID, size.vocab))
    rng.shuffle(tokens)
    after = dict(zip(tokens, [*tokens[1:], tokens[0]], strict=True))

    def make() -> PreTrainedModel:
        model = make_model(size)
        inside: Any = model
        embedding, head = inside.get_input_embeddings().weight.data, inside.get_output_embeddings().weight.data
        for layer in inside.model.layers:  # what they add would only be noise; it is computed all the same
            layer.self_attn.o_proj.weight.data.zero_()
            layer.mlp.down_proj.weight.data.zero_()
        head[torch.tensor(list(after.values()))] = embedding[torch.tensor(list(after))]
        return model

    def asked(case: str, number: int) -> list[int]:
        drawn = random.Random(number)  # noqa: S311
        last = tokens[drawn.randrange(len(tokens))]
        answer = [last]
        while len(answer) <= NEW:
            answer.append(after[answer[-1]])
        said = set(answer)
        others = [token for token in drawn.choices(tokens, k=2 * PROMPT_TOKENS) if token not in said] * 2
        noise = iter(others)
        cases: dict[str, list[list[int]]] = {
            "free": [],
            "spans": [[*answer[at : at + SPAN], next(noise)] for at in range(1, NEW + 1, SPAN)],
            "misleading": [[*answer[at : at + 2], next(noise)] for at in range(1, NEW)],
        }
        parts = cases[case]
        drawn.shuffle(parts)
        found = list(itertools.chain.from_iterable(parts))
        return [*itertools.islice(noise, PROMPT_TOKENS - 1 - len(found)), *found, last]

    def adapters(count: int) -> list[str]:
        return [str(path) for path in adapter_directories(size, "pedro", count)]

    return Subject(size.name, size, make, size.digest, adapters, ("spans", "free", "misleading"), asked, NEW)


def real(name: str) -> Subject:
    """A backbone in words: texts to be copied, questions to be answered by a sentence of a passage, stories. Raises
    BackboneError where it is not here."""
    backbone = resolve_backbone(name)
    tokenizer: Any = load_tokenizer(backbone)
    lines = demo_rows()

    def asked(case: str, number: int) -> list[int]:
        passage, question = lines[number % ROUND]
        text = {
            "copied": f"Write the following text again, word for word.\n\n{passage}",
            "quoted": f"{passage}\n\n{question} Answer with the sentence of the text that says it.",
            "free": f"Write a story about {SUBJECTS[number % ROUND]}.",
        }[case]
        messages = [{"role": "user", "content": text}]
        ids: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        return ids

    def adapters(count: int) -> list[str]:
        folder = bench_folder() / "speculation" / backbone.digest.removeprefix("sha256:")[:16]
        manifest = {"backbone": {"id": name, "digest": backbone.digest}, "method": {"name": "pedro", "options": {}}}
        paths = [folder / f"{number:05}" for number in range(count)]
        missing = [path for path in paths if not (path / "pedro_adapter.json").is_file()]
        tuned = get_method("pedro").apply(load_model(backbone), {}) if missing else None
        for path in missing:
            assert tuned is not None, "made where one is missing"
            save_adapter(tuned, path, manifest)
        return [str(path) for path in paths]

    size = MODEL_SIZES["tiny"]  # names nothing here: the model is given
    return Subject(
        name,
        size,
        lambda: load_model(backbone),
        backbone.digest,
        adapters,
        ("copied", "quoted", "free"),
        asked,
        MOST_NEW,
        (int(tokenizer.eos_token_id),),
    )


def demo_rows() -> list[tuple[str, str]]:
    """Passages of the demo's reader, the longest ones, each with a question about it."""
    (reader,) = (tenant for tenant in CHAT_TENANTS if tenant.adapter == "reader")
    pairs: dict[str, str] = {}
    for line in reader.test.read_text().splitlines():
        passage, _, question = json.loads(line)["prompt"].removeprefix("Passage: ").partition("\nQuestion: ")
        pairs.setdefault(passage, question)
    return sorted(pairs.items(), key=lambda pair: -len(pair[0]))[:ROUND]
