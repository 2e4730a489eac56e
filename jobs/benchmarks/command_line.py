"""The benchmarks' command line: what can be measured, with which sizes, and what is printed and saved at the end.

Progress is printed as it happens; the last line on stdout is one JSON object. Benchmarks that need a server are handed
in, so that this runs without Ray.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from jobs.benchmarks.model_sizes import MODEL_SIZES, bench_folder
from pedro.errors import ConfigError, PedroError
from pedro.provenance import check_unchanged, code_state

if TYPE_CHECKING:
    from jobs.benchmarks.engine_process import Log
    from jobs.benchmarks.report import BenchmarkReport

ABOUT = """\
Measures the engine: beside its peers (serving), on real text (chat), and against its own promises (the rest). Backbones
have random weights of real sizes (S: 15 M, M: 125 M, SmolLM2: 135 M, 7B: LLaMA-2-7B), real ones in chat, dryrun,
published and training, and where weights asks for quality and speculation for text; prompts are random and distinct,
and answers of equal lengths, but in chat, published, training and such text.

  tok_s         all new tokens / time from the first request's arrival to the last token
  decode_tok_s  tokens that came after every request had its first one / the time from then to the last token
  ttft_ms       the median request's time to its first token
  tpot_ms       the median request's time per further token
  ratio         to transformers' generate() on the bare model, the median over rounds, each round's pair apart;
                *_interval: its 95 % bootstrap interval
"""
ALLOW_DIRTY = "write to jobs/results although code has changed since the commit; a + at the commit marks it"
PEERS = ("vllm", "llamacpp")
PEER = "a peer's own Python: vllm, for serving and prefix; llamacpp (the wheel xllamacpp), for prefix and weights"
ENGINES = ("generate", "ours", "peft", "continuous", "vllm")  # continuous: transformers' own, off unless named
EXAMPLES = """\
examples:
  python -m jobs.bench serving --quick                        S, batch 8, what is installed here; within 50 s
  python -m jobs.bench serving --peer vllm=/path/to/python    the whole comparison, vLLM in a Python of its own
  python -m jobs.bench serving --models M --batches 1,8       one size
  python -m jobs.bench prefix --peer llamacpp=/path/to/python beside llama.cpp's server and its own prefix cache
  python -m jobs.bench tenants                                1 to 10,000 adapters, resident and missing
  python -m jobs.bench efficiency --device cuda --models 7B   the paper's table 3 on a GPU

Results are saved to jobs/results/NAME.json with commit, hardware and versions; those of --quick beside the benchmark's
files (PEDRO_HOME/bench/results). A peer that is not installed is skipped by name.
"""


@dataclass(frozen=True)
class Options:
    """The command line, as every benchmark gets it. None stands for what was not given."""

    quick: bool
    models: tuple[str, ...] | None
    batches: tuple[int, ...] | None
    rounds: int | None
    threads: int
    device: str
    peers: Mapping[str, str]
    engines: tuple[str, ...] | None
    backbones: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Benchmark:
    """One subcommand: `run(options, log)` gives the report, `columns` are the rows' keys to show."""

    about: str
    run: Callable[[Options, Log], BenchmarkReport]
    columns: Sequence[str]


def main(benchmarks: Mapping[str, Benchmark], results: Path, arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark that `arguments` name. Full runs are saved to `results`."""
    argv = sys.argv[1:] if arguments is None else list(arguments)
    parsed = _parser(benchmarks).parse_args(argv)
    options = _options(parsed)
    chosen = benchmarks[parsed.benchmark]
    folder = bench_folder() / "results" if options.quick else results
    path = parsed.out or folder / f"{parsed.benchmark}{'-quick' if options.quick else ''}.json"
    code = code_state()
    try:
        check_unchanged(code, path, parsed.allow_dirty)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends what was started, as Ctrl-C does
    began = time.monotonic()
    try:
        report = chosen.run(options, _log)
    except KeyboardInterrupt:
        _log("interrupted; nothing is left running")
        return 130
    except PedroError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    report.facts |= {"seconds": round(time.monotonic() - began, 1), "command": _command(argv)}
    report.save(path, code)
    _log(f"\n{report.show(chosen.columns)}\n\n{report.facts['seconds']:.0f} s; saved to {path}\n")
    print(json.dumps(report.as_dict()), flush=True)
    return 0


def _command(argv: Sequence[str]) -> str:
    """What was typed, without the places of this machine."""
    shown = [re.sub(r"^(vllm|llamacpp)=.*", r"\1=PYTHON", word) for word in argv]
    if "--out" in shown:
        shown[shown.index("--out") + 1] = "FILE"
    return f"jobs.bench {shlex.join(shown)}"


def _log(line: str) -> None:
    print(line, flush=True)


def _parser(benchmarks: Mapping[str, Benchmark]) -> argparse.ArgumentParser:
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m jobs.bench", description=ABOUT, epilog=EXAMPLES, formatter_class=style)
    commands = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")
    for name, benchmark in benchmarks.items():
        command = commands.add_parser(name, help=benchmark.about, description=benchmark.about)
        command.add_argument("--quick", action="store_true", help="small sizes and few rounds; proves that it works")
        command.add_argument("--models", type=_models, metavar="S,M", help=f"of {', '.join(MODEL_SIZES)}")
        command.add_argument("--batches", type=_counts, metavar="1,8,32", help="requests at once")
        command.add_argument("--rounds", type=_count, help="interleaved rounds that count (7 or more for a verdict)")
        command.add_argument("--threads", type=_count, default=os.cpu_count() or 1, help="of every engine alike")
        command.add_argument("--device", type=_device, default="cpu", help="cpu (float32) or cuda (bfloat16)")
        command.add_argument("--peer", type=_peer, action="append", default=[], metavar="vllm=PYTHON", help=PEER)
        command.add_argument("--engines", type=_engines, metavar="ours,vllm", help=f"of {', '.join(ENGINES)}")
        command.add_argument(
            "--backbones",
            type=_names,
            metavar="A,B",
            help="of chat, dryrun, published, speculation, training and weights, instead of their own",
        )
        command.add_argument("--out", type=_file, metavar="FILE", help="where the result goes instead")
        command.add_argument("--allow-dirty", action="store_true", help=ALLOW_DIRTY)
    return parser


def _options(parsed: argparse.Namespace) -> Options:
    return Options(
        quick=parsed.quick,
        models=parsed.models,
        batches=parsed.batches,
        rounds=parsed.rounds,
        threads=parsed.threads,
        device=parsed.device,
        peers=dict(parsed.peer),
        engines=parsed.engines,
        backbones=parsed.backbones,
    )


def _models(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in MODEL_SIZES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(MODEL_SIZES)}")
    return names


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _engines(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := [name for name in names if name not in ENGINES]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(ENGINES)}")
    return names


def _count(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"expected a whole number > 0, got {text!r}")
    return int(text)


def _device(text: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"expected cpu, cuda or cuda:NUMBER, got {text!r}")
    if text != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("no GPU is to be had here; leave it out to measure on the CPU")
    return text


def _file(text: str) -> Path:
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text} is a directory; name a file in it")
    return path


def _counts(text: str) -> tuple[int, ...]:
    if not all(part.isdigit() and int(part) for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected counts like 1,8,32, got {text!r}")
    return tuple(map(int, text.split(",")))


def _peer(text: str) -> tuple[str, str]:
    name, equals, python = text.partition("=")
    if name not in PEERS or not equals:
        raise argparse.ArgumentTypeError(f"expected vllm=/path/to/python or llamacpp=/path/to/python, got {text!r}")
    return name, python
