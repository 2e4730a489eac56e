"""`python -m jobs.pretrain`: from public text to a backbone directory. Prepares, trains, measures, publishes.

prepare   corpus -> tokenizer and ids in OUT/data (once); OUT/run.json says what with
train     until the budget of tokens or minutes is used; SIGTERM or Ctrl-C leaves a checkpoint to resume from
publish   OUT/final, the result JSON and the figure
"""

from __future__ import annotations

import argparse
import json
import math
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from jobs.benchmarks.command_line import ALLOW_DIRTY
from jobs.pretrain import corpus, publish
from jobs.pretrain.atomic_files import check_writable
from jobs.pretrain.prepare import RUN, PretrainData, prepare_data
from jobs.pretrain.pretrain_loop import PretrainSettings, PretrainState, pretrain
from jobs.pretrain.quality import measure_quality
from jobs.pretrain.schedule import Schedule
from jobs.pretrain.token_windows import Stream
from pedro.backbone import context_length, load_model, load_tokenizer, quiet, resolve_backbone
from pedro.errors import ConfigError, PedroError
from pedro.provenance import check_unchanged, code_state, provenance

if TYPE_CHECKING:
    from pedro.model_protocols import Tokenizer

BASELINE = "stories260K"
CONTEXT = 512
SEEDS = 2**63  # what torch takes
LOOK_CHARS = 12_000  # of each held-out text, for the curve


@dataclass(frozen=True)
class Preset:
    """A size. `rows` windows make a step."""

    why: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    lr: float
    rows: int
    micro_rows: int


PRESETS = {
    "tiny": Preset("for tests", 512, 32, 2, 4, 2, 64, 0.02, 4, 4),
    "cpu": Preset(
        "about the best that a CPU core can train in an hour and a half", 4096, 192, 4, 6, 3, 512, 0.02, 8, 8
    ),
    "gpu": Preset("what a GPU can train in ten minutes", 8192, 384, 7, 12, 6, 1024, 0.02, 128, 32),
}


def main(arguments: list[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.tokens is None and options.minutes is None:
        parser.error("give a budget: --tokens or --minutes")
    try:
        return run(options)
    except PedroError as error:
        raise SystemExit(f"error: {error.message}") from error
    except (OSError, SafetensorError) as error:
        raise SystemExit(f"error: {error}; check the path and the room on its disk") from error


def run(options: argparse.Namespace) -> int:
    """Prepare, train, measure, publish; 3 if it was stopped before its end. Raises PedroError before any training."""
    quiet()
    preset, data, out = PRESETS[options.preset], Path(options.data), Path(options.out)
    result_file, figure = check_outputs(options)
    texts = corpus.held_out(data)
    model, settings = build_model(preset, options), plan(preset, options)
    publish.check_size(model)
    prepared = prepare_data(data, out, decides(preset, options), preset.vocabulary, CONTEXT)
    state = _train(model, prepared, texts, settings, out, options)
    if not settings.schedule.is_over(state.tokens, state.decay_from):
        print(f"stopped at {state.tokens:,} tokens; run it again to resume, with --decay-now to end it with its decay")
        return 3
    result = describe_run(options, preset, model, prepared, texts, state)
    publish.publish(model, prepared.tokenizer, out / "final", result)
    publish.write_result(result, result_file)
    publish.draw(result, figure)
    print(json.dumps({name: found["bits_per_char"] for name, found in result["quality"].items()}))
    return 0


def check_outputs(options: argparse.Namespace) -> tuple[Path, Path]:
    """The files of the result and of its figure. Raises ConfigError if they or OUT cannot be written,
    and for a result among those that are committed although code has changed.
    """
    result = Path(options.result)
    check_unchanged(code_state(), result, options.allow_dirty)
    check_writable("out", Path(options.out) / RUN)
    check_writable("result", result)
    figure = result.with_suffix(".png")
    if figure == result:
        raise ConfigError(
            f"result: {options.result!r} is where the figure goes; give it another suffix, such as .json",
            param="result",
        )
    check_writable("result", figure)
    return result, figure


def decides(preset: Preset, options: argparse.Namespace) -> dict[str, Any]:
    """All that determines a run, except its budget: a run resumes only with the same."""
    return {
        "preset": options.preset,
        "seed": options.seed,
        "lr": options.lr or preset.lr,
        "decay": options.decay,
        "data": str(Path(options.data).resolve()),
    }


def build_model(preset: Preset, options: argparse.Namespace) -> torch.nn.Module:
    """The model from fresh weights of this seed, on the device."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=preset.vocabulary,
        hidden_size=preset.width,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        intermediate_size=preset.ffn,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=3,
    )
    model: torch.nn.Module = LlamaForCausalLM(config)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def plan(preset: Preset, options: argparse.Namespace) -> PretrainSettings:
    """How it trains; the warm-up takes 60 steps."""
    step = preset.rows * CONTEXT
    schedule = Schedule(
        lr=options.lr or preset.lr,
        warmup_tokens=60 * step,
        decay=options.decay,
        tokens=options.tokens,
        seconds=options.minutes * 60 if options.minutes is not None else None,
    )
    return PretrainSettings(
        schedule,
        preset.rows,
        preset.micro_rows,
        checkpoint_seconds=options.checkpoint_minutes * 60,
        compiled=options.compile,
    )


def _train(
    model: torch.nn.Module,
    prepared: PretrainData,
    texts: tuple[corpus.HeldOut, ...],
    settings: PretrainSettings,
    out: Path,
    options: argparse.Namespace,
) -> PretrainState:
    def look(model: torch.nn.Module) -> dict[str, float]:
        return bits_per_char(model, prepared.tokenizer, sample_texts(texts), CONTEXT)

    stream = Stream(prepared.ids, CONTEXT, options.seed)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{parameters:,} parameters, {len(prepared.ids):,} tokens an epoch, {stream.windows:,} windows", flush=True)
    with caught_signals() as signals:
        return pretrain(
            model,
            stream,
            settings,
            out,
            look,
            decay_now=options.decay_now,
            stopped=lambda: bool(signals),
            log=lambda line: print(line, flush=True),
        )


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """SIGTERM and SIGINT are only listed within; afterwards they do what they did before."""
    caught: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: caught.append(number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def sample_texts(texts: tuple[corpus.HeldOut, ...]) -> tuple[corpus.HeldOut, ...]:
    """A part of each text, small enough to be looked at often."""
    return tuple(replace(text, pieces=text.pieces[:: max(1, text.chars // LOOK_CHARS)]) for text in texts)


def bits_per_char(
    model: torch.nn.Module, tokenizer: Tokenizer, texts: tuple[corpus.HeldOut, ...], context: int
) -> dict[str, float]:
    return {text.name: measure_quality(model, tokenizer, text.pieces, context).bits_per_char for text in texts}


def describe_run(
    options: argparse.Namespace,
    preset: Preset,
    model: torch.nn.Module,
    prepared: PretrainData,
    texts: tuple[corpus.HeldOut, ...],
    state: PretrainState,
) -> dict[str, Any]:
    """The result: what was trained, on what, how it went, how well it predicts. Quality is that of the bf16 weights."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    baseline = resolve_backbone(BASELINE)
    theirs, their_tokenizer = load_model(baseline), load_tokenizer(baseline)
    quality = {t.name: measure_quality(model, prepared.tokenizer, t.pieces, CONTEXT).to_dict() for t in texts}
    their_context = context_length(baseline)
    their_quality = {t.name: measure_quality(theirs, their_tokenizer, t.pieces, their_context).to_dict() for t in texts}
    their_sample = bits_per_char(theirs, their_tokenizer, sample_texts(texts), their_context)
    cuda = next(model.parameters()).is_cuda
    return {
        "name": options.name,
        "model": {
            **{name: value for name, value in asdict(preset).items() if name not in ("lr", "rows", "micro_rows")},
            "context": CONTEXT,
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
        },
        "run": {
            **{name: prepared.made_with[name] for name in ("preset", "seed", "lr")},
            "tokens_a_step": preset.rows * CONTEXT,
            "decay_share": prepared.made_with["decay"],
            "tokens": state.tokens,
            "epochs": state.tokens / len(prepared.ids),
            "steps": state.step,
            "decay_from": state.decay_from,
            "seconds": round(state.seconds, 1),
            "tokens_per_second": round(state.tokens / max(state.seconds, 1e-9)),
            "device": torch.cuda.get_device_name() if cuda else f"{torch.get_num_threads()} CPU thread(s)",
        },
        "corpus": {"sources": prepared.sources, "tokens_per_epoch": len(prepared.ids), "left_out": corpus.LEFT_OUT},
        "held_out": [{"name": t.name, "what": t.what, "pieces": len(t.pieces), "chars": t.chars} for t in texts],
        "quality": quality,
        "baseline": {
            "name": BASELINE,
            "digest": baseline.digest,
            "quality": their_quality,
            "sample": their_sample,
        },
        "curve": {"train_loss": state.losses, "held_out": state.looks},
        "presets": {name: asdict(one) for name, one in PRESETS.items()},
        "notes": options.note,
        "provenance": provenance(),
    }


def _number(kind: Callable[[str], float], holds: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Reads a number of a kind for argparse, which names what was expected of one that does not hold."""

    def number(text: str) -> float:
        value = kind(text)
        if not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text}")
        return value

    return number


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    return _number(kind, lambda value: 0 < value < math.inf, "a number above 0")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m jobs.pretrain", description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="folder of the public sources: squad/, wikitext2/, snips/ ...")
    parser.add_argument("--out", required=True, help="folder of this run; an interrupted one resumes")
    parser.add_argument("--name", default="backbone", help="what the model is called")
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="size of the model and of a step")
    parser.add_argument("--tokens", type=_positive(int), help="budget in tokens, decay included")
    parser.add_argument("--minutes", type=_positive(float), help="budget in minutes of training, decay included")
    share = _number(float, lambda value: 0 <= value < 1, "a share from 0 and below 1")
    seed = _number(int, lambda value: 0 <= value < SEEDS, "a whole number from 0 and below 2**63")
    parser.add_argument("--decay", type=share, default=0.25, help="share of the tokens in which the rate falls to 0")
    parser.add_argument("--decay-now", action="store_true", help="resume from the checkpoint and begin the decay")
    parser.add_argument("--lr", type=_positive(float), help="peak learning rate (the preset's)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--checkpoint-minutes", type=_positive(float), default=2.0)
    parser.add_argument("--compile", action="store_true", help="with torch.compile (a fifth faster on a CPU)")
    parser.add_argument("--result", default="pretrain.json", help="where the result goes; the figure lies beside it")
    parser.add_argument("--allow-dirty", action="store_true", help=ALLOW_DIRTY)
    parser.add_argument("--note", action="append", default=[], help="a remark that the result carries")
    return parser
