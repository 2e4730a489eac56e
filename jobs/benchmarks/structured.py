"""What an answer held to a JSON schema costs: decoding with masks beside decoding without them, in one run.

The backbone's vocabulary is made up, bytes and random words, so that masks have as many tokens to tell apart as a real
one has; answers are cut at their length, which the schema alone would not end.
"""

from __future__ import annotations

import asyncio
import json
import random
import string
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from jobs.benchmarks.bench_engine import BenchEngine, use_threads
from jobs.benchmarks.model_sizes import MODEL_SIZES, NEW_TOKENS, PROMPT_TOKENS, ModelSize, prompts
from jobs.benchmarks.random_adapters import adapter_directories
from jobs.benchmarks.report import BenchmarkReport, Target
from jobs.benchmarks.stats import paired_ratio
from jobs.benchmarks.timeline import Timeline
from pedro.engine import Request, SamplingParams
from pedro.gateway.backend import AnswerShape
from pedro.serving.answer_shapes import AnswerShapes

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log
    from pedro.model_protocols import Tokenizer
    from pedro.serving.answer_shapes import NewMask

SCHEMA = {  # many objects, so that no answer of the benchmark is whole
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 40},
            "kind": {"enum": ["person", "place", "company", "product"]},
            "score": {"type": "number"},
            "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        },
        "required": ["name", "kind", "score", "tags"],
        "additionalProperties": False,
    },
}
CASES = ("free", "schema")
UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
LIMIT = 1 / 1.1  # at most 10 % slower


def run(options: Options, log: Log) -> BenchmarkReport:
    """Each model, each batch: PEDRO adapters, a tenant a row, all rows free or all held to the schema."""
    use_threads(options.threads)
    rounds = options.rounds or (2 if options.quick else 9)
    batches = options.batches or ((2,) if options.quick else (1, 8, 32))
    report = BenchmarkReport("structured", {"batches": batches, "rounds": rounds, "threads": options.threads})
    for name in options.models or (("S",) if options.quick else ("S", "SmolLM2")):
        size = MODEL_SIZES[name]
        tokenizer = random_vocabulary(size)
        shapes = AnswerShapes(tokenizer, size.vocab, (2,))
        new_mask = asyncio.run(shapes.new_mask(AnswerShape("json", json.dumps(SCHEMA), "response_format"), "bench"))
        length = PROMPT_TOKENS + NEW_TOKENS + 8
        engine = BenchEngine(size, options.device, max_batch=max(batches), max_length=length)
        refs = [str(path) for path in adapter_directories(size, "pedro", max(batches))]
        engine.load(refs)
        for batch in batches:
            seen: dict[str, list[float]] = {case: [] for case in CASES}
            for number in range(rounds + 1):  # the first only warms up
                for case in CASES if number % 2 else reversed(CASES):
                    speed = _decode(engine, refs[:batch], number, new_mask if case == "schema" else None)
                    if number:
                        seen[case].append(speed)
            ratio = paired_ratio(seen["schema"], seen["free"])
            for case, speeds in seen.items():
                row: dict[str, Any] = {"case": case, "engine": "ours", "adapters": "pedro", "model": name}
                row |= {"batch": batch, "decode_tok_s": round(median(speeds), 1)}
                if case == "schema":
                    row |= {"ratio": round(ratio.value, 4), "ratio_interval": ratio.interval}
                report.rows.append(row)
            log(f"  {name}, B={batch}: {median(seen['schema']):.0f} of {median(seen['free']):.0f} tok/s")
            if name == "S" and batch == 8:
                report.targets.append(Target("S, B=8: decoding, schema / free", LIMIT, ratio, at_most=False))
        engine.close()
        shapes.close()
    return report


def _decode(engine: BenchEngine, refs: list[str], seed: int, new_mask: NewMask | None) -> float:
    """Tokens per second after all first tokens. No token that could end an answer is likeliest by chance alone."""
    params = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=new_mask is None)
    timeline = Timeline()
    for number, (ids, ref) in enumerate(zip(prompts(engine.size, len(refs), PROMPT_TOKENS, seed), refs, strict=True)):
        engine.engine.add(Request(f"{seed}-{number}", ids, tenant=ref, adapter=ref, params=params, new_mask=new_mask))
    engine.drain(timeline)
    return timeline.figures()["decode_tok_s"]


def random_vocabulary(size: ModelSize) -> Tokenizer:
    """A tokenizer of `size.vocab` tokens: three special ones, all bytes, then words of 2 to 10 letters and signs."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    rng = random.Random(0)  # noqa: S311
    words = [UNKNOWN, BEGIN, END, *sorted(pre_tokenizers.ByteLevel.alphabet())][: size.vocab]
    known = set(words)
    letters, signs = string.ascii_letters + "Ġ", '":{}[],.0123456789Ġ'
    while len(words) < size.vocab:
        drawn = "".join(rng.choices(signs if rng.random() < 0.1 else letters, k=rng.randint(2, 10)))
        if drawn not in known:
            known.add(drawn)
            words.append(drawn)
    made = tokenizers.Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], unk_token=UNKNOWN))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    wrapped: Any = PreTrainedTokenizerFast(tokenizer_object=made, unk_token=UNKNOWN, bos_token=BEGIN, eos_token=END)
    return cast("Tokenizer", wrapped)
