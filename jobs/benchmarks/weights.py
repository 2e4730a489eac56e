"""A backbone's weights in float32, int8 and int4, side by side: speed with PEDRO adapters, memory, and quality.

Speed: as many requests as adapters, every kind in every round; ratios are to float32. Where llama.cpp is given, it
answers the same prompts from the same weights in its own Q8_0 and Q4_1, without adapters and with a LoRA a request,
beside ours with the same LoRA. It decodes requests together only if they have the same adapters, so that the others'
first tokens come late: there all tokens over all time (`tok_s`) says more than the rate while decoding. Quality:
perplexity of real backbones on windows of WikiText-2 as the engine itself reads them; the ratio is to float32's, window
by window. And the score of an adapter that was trained on float32 weights (`task_score`), minus that on float32, row by
row.
"""

from __future__ import annotations

import gc
import math
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.bench_engine import BenchEngine, use_threads
from jobs.benchmarks.engine_process import EnginePool, EngineProcessError
from jobs.benchmarks.gguf_model import saved_gguf, saved_lora_gguf
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport
from jobs.benchmarks.stats import mean_of_groups, paired_ratio
from jobs.benchmarks.task_score import ROWS, right_answers
from pedro.backbone import context_length, load_model, load_tokenizer, resolve_backbone
from pedro.data.general_text import MOST_TOKENS, windows
from pedro.engine.panels import WEIGHTS
from pedro.errors import BackboneError

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

SHORT = 16  # tokens of a prompt where several requests decode together: what differs there is decoding
BATCHES: dict[str, tuple[int, ...]] = {"S": (1, 8, 32), "SmolLM2": (1, 8, 32)}
TOKENS = {"pedro-nano": MOST_TOKENS, "smollm2-135m": 1000}  # to be predicted: as many as take about a minute
QUICK_TOKENS, QUICK_ROWS = 500, 40
LORA = ", LoRA"
LLAMA_CPP = {"llama.cpp Q8_0": ("Q8_0", "int8"), "llama.cpp Q4_1": ("Q4_1", "int4")}  # and which of ours is beside it
FIGURES = {"tok_s": "tok", "decode_tok_s": "decode", "ttft_ms": "ttft"}
Figures = dict[str, float]


def run(options: Options, log: Log) -> BenchmarkReport:
    """Speed of each size and batch, then quality of each backbone; a backbone that is not here is skipped."""
    use_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 7)
    settings = {
        "rounds": rounds,
        "prompt": PROMPT_TOKENS,
        "prompt_in_batches": SHORT,
        "new": NEW_TOKENS,
        "threads": options.threads,
    }
    report = BenchmarkReport("weights", {**settings, "adapters": "PEDRO, one a request, unless a row says LoRA"})
    for name in options.models or (("S",) if options.quick else BATCHES):
        with EnginePool(log) as peers:
            _Speed(MODEL_SIZES[name], options, rounds, peers, log).measure(report)
        report.skipped |= peers.skipped
    if "llamacpp" not in options.peers:
        report.skipped["llama.cpp"] = "not asked for; give --peer llamacpp=/path/to/python"
    for backbone in options.backbones or (("pedro-nano",) if options.quick else TOKENS):
        tokens = QUICK_TOKENS if options.quick else TOKENS.get(backbone, MOST_TOKENS)
        asked = QUICK_ROWS if options.quick else ROWS
        try:
            _quality(backbone, tokens, asked, options.threads, report, log)
        except BackboneError as error:
            report.skipped[backbone] = error.message
    return report


class _Speed:
    """One size: our engines in this process, llama.cpp's in others; one computes at a time."""

    def __init__(self, size: ModelSize, options: Options, rounds: int, peers: EnginePool, log: Log) -> None:
        self._size, self._rounds, self._peers, self._log = size, rounds, peers, log
        self._batches = options.batches or ((1, 8) if options.quick else BATCHES.get(size.name, (1, 8)))
        most, length = max(self._batches), PROMPT_TOKENS + NEW_TOKENS + 1
        setup: dict[str, Any] = {"max_batch": most, "threads": options.threads}
        self._engines = {kind: BenchEngine(size, weights=kind, max_length=length, **setup) for kind in WEIGHTS}
        self._refs = [str(directory) for directory in adapter_directories(size, "pedro", most)]
        for engine in self._engines.values():
            engine.load(self._refs)
        self._lora: list[str] = []
        if python := options.peers.get("llamacpp"):
            self._lora = [str(directory) for directory in adapter_directories(size, "lora", most)]
            files = [str(saved_lora_gguf(Path(directory), size)) for directory in self._lora]
            for name, (kind, ours) in LLAMA_CPP.items():
                self._engines[ours].load(self._lora)
                given = {"model": str(saved_gguf(size, kind)), "length": length, "lora": files}
                peers.start(name, "prefix-llamacpp", {**setup, **given}, str(python))

    def measure(self, report: BenchmarkReport) -> None:
        """A row for each engine and batch, and two for those that have LoRA, too; the engines are closed behind it."""
        report.facts.setdefault("peers", {})[self._size.name] = self._peers.wait()
        for batch in self._batches:
            seen: dict[str, list[Figures]] = {}
            for number in range(self._rounds + 1):  # the first only warms up
                asked = prompts(self._size, batch, PROMPT_TOKENS if batch == 1 else SHORT, number)
                for name, engine in self._engines.items():
                    figures = engine.answer(asked, self._refs[:batch], NEW_TOKENS).figures()
                    seen.setdefault(name, []).append(figures)
                for name, (_, ours) in LLAMA_CPP.items():
                    if self._peers.has(name) and (answered := self._ask(name, asked)) is not None:
                        seen.setdefault(name, []).append(answered)
                    if self._peers.has(name) and (answered := self._ask(name, asked, lora=True)) is not None:
                        seen.setdefault(name + LORA, []).append(answered)
                        figures = self._engines[ours].answer(asked, self._lora[:batch], NEW_TOKENS).figures()
                        seen.setdefault(ours + LORA, []).append(figures)
            report.rows += [self._row(name, batch, seen) for name in seen if len(seen[name]) > self._rounds]
        for engine in self._engines.values():
            engine.close()

    def _ask(self, name: str, asked: list[list[int]], lora: bool = False) -> Figures | None:
        order: dict[str, Any] = {"prompts": asked, "new": NEW_TOKENS, "cache": False}
        try:
            found = self._peers.run(name, {**order, "lora": list(range(len(asked)))} if lora else order)
        except EngineProcessError as error:
            self._peers.skip(name, str(error))
            return None
        return {**found, "ttft_ms": median(found["first_ms"])}

    def _row(self, name: str, batch: int, seen: dict[str, list[Figures]]) -> dict[str, Any]:
        row: dict[str, Any] = {"model": self._size.name, "batch": batch, "weights": name}
        if name in self._engines:
            row["weight_mb"] = round(self._engines[name].engine.stats()["weight_bytes"] / 2**20, 3)
        others = {"": "float32"}
        if (peer := name.removesuffix(LORA)) in LLAMA_CPP:
            others["ours_"] = LLAMA_CPP[peer][1] + name.removeprefix(peer)
        for figure, of in FIGURES.items():
            own = [figures[figure] for figures in seen[name][1:]]
            row[figure] = round(median(own), 2)
            for prefix, other in others.items():
                theirs = [figures[figure] for figures in seen[other][1:]]
                ratio = paired_ratio(theirs, own) if prefix else paired_ratio(own, theirs)
                row |= {f"{prefix}{of}_ratio": round(ratio.value, 4), f"{prefix}{of}_ratio_interval": ratio.interval}
        ours = ""
        if "ours_" in others:
            ours = f"; ours / its {row['ours_decode_ratio']:.2f}, of all time {row['ours_tok_ratio']:.2f}"
        ratios = f"{row['decode_ratio']:.2f} of float32, first token {row['ttft_ratio']:.2f}{ours}"
        self._log(f"  {self._size.name} B={batch} {name}: {row['decode_tok_s']:.0f} tok/s, {ratios}")
        return row


def _quality(name: str, tokens: int, asked: int, threads: int, report: BenchmarkReport, log: Log) -> None:
    """Raises BackboneError for a backbone that is not here."""
    backbone = resolve_backbone(name)
    tokenizer = load_tokenizer(backbone)
    rows = windows(tokenizer, tokens, context_length(backbone))
    plain: list[float] = []
    right: dict[str, list[bool]] = {}
    for kind in WEIGHTS:
        right[kind] = right_answers(name, kind, threads, asked)
        score = fmean(right[kind])
        differences = [now - was for now, was in zip(right[kind], right[WEIGHTS[0]], strict=True)]
        difference = mean_of_groups([differences])
        losses = _losses(name, rows, kind, threads)
        plain = plain or [sum(window) for window in losses]
        scored = sum(map(len, losses))
        nats = sum(map(sum, losses)) / scored
        changes = [(sum(window) - was) * len(losses) / scored for window, was in zip(losses, plain, strict=True)]
        change = mean_of_groups([changes])
        report.rows.append(
            {
                "model": name,
                "weights": kind,
                "perplexity": round(math.exp(nats), 4),
                "perplexity_ratio": round(math.exp(change.value), 5),
                "perplexity_ratio_interval": [round(math.exp(value), 5) for value in (change.low, change.high)],
                "scored": scored,
                "score": round(score, 4),
                "score_minus": round(difference.value, 4),
                "score_minus_interval": [round(difference.low, 4), round(difference.high, 4)],
                "asked": len(differences),
            }
        )
        read = f"perplexity {math.exp(nats):.3f}, {math.exp(change.value):.4f} of float32's"
        log(f"  {name} {kind}: {read}; {score:.3f} of the answers right")


def _losses(name: str, rows: list[dict[str, Any]], kind: str, threads: int) -> list[list[float]]:
    """Nats of each token to be predicted, window by window."""
    backbone = resolve_backbone(name)
    longest = max(len(row["input_ids"]) for row in rows) + 1
    size = MODEL_SIZES["tiny"]  # names nothing here: the model is given
    setup: dict[str, Any] = {"max_batch": 4, "max_length": longest, "threads": threads, "weights": kind}
    engine = BenchEngine(size, model=load_model(backbone), digest=backbone.digest, **setup)
    losses = []
    for row in rows:
        asked = engine.request(row["input_ids"], None, 1, prompt_logprobs=0)
        engine.engine.add(asked)
        found: list[float] = []
        while engine.engine.has_work():
            for output in engine.engine.step():
                if output.error is not None:
                    raise output.error
                found += [
                    -one.logprob for one in (output.prompt_logprobs or [])[row["prompt_len"] :] if one is not None
                ]
        losses.append(found)
    engine.close()
    del engine
    gc.collect()
    return losses
