"""Runs the parts of the GPU check one after another, each in a process of its own with a time limit.

Every finding is in the result file as soon as it is made, so that an abort loses nothing. Standard library only, but
for what a part's own process imports.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.benchmarks.command_line import ALLOW_DIRTY
from jobs.benchmarks.model_sizes import MODEL_SIZES, bench_folder
from pedro.errors import ConfigError
from pedro.provenance import check_unchanged, code_state, provenance

ROOT = Path(__file__).parents[2]
RESULT = ROOT / "jobs" / "results" / "gpu_check.json"
LIMITS_S = {"correctness": 120, "training": 120, "table3": 180, "bilevel": 110}
"""The parts in their order; together under nine minutes."""
ABOUT = """\
Checks and measures on a GPU what tests on a CPU cannot show:

  correctness  decode steps as CUDA graphs, paged and masked attention, every adapter kind, against plain forwards
  training     every method on a bfloat16 backbone: the loop, bi-level steps, that each step moves only its own group
  table3       the paper's table 3 at LLaMA-2-7B's sizes: PEDRO, (IA)³, LoRA unmerged, beam 1 and 3, batch 1 and 64
  bilevel      the bi-level step at LLaMA-2-7B's sizes, and peak memory beside what the dry run promises

Needs torch, transformers, peft, safetensors and pytest. Takes under nine minutes; the result file grows with every
finding. `--device cpu --model tiny` runs all of it in small, to check the check.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the parts; 0 if every one ended in time and found nothing wrong."""
    options = _options(arguments)
    if options.part:
        module = importlib.import_module(f"jobs.gpu_check.{options.part}")
        module.run(options.device, options.model, note)
        return 0
    out: Path = options.out or (RESULT if options.device == "cuda" else bench_folder() / "results" / RESULT.name)
    code = code_state()
    try:
        check_unchanged(code, out, options.allow_dirty)
    except ConfigError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return 2
    report: dict[str, Any] = {"benchmark": "gpu_check", **provenance(code)}
    report |= {"device": options.device, "model": options.model, "parts": {}}
    for name in options.only or LIMITS_S:
        print(f"== {name}, at most {options.limit or LIMITS_S[name]} s", flush=True)
        report["parts"][name] = part = {"status": "started", "seconds": 0.0, "findings": []}
        _run(name, part, options, lambda: _write(out, report))
        _write(out, report)
        print(f"   {part['status']} after {part['seconds']:.0f} s", flush=True)
    bad = {name: part["status"] for name, part in report["parts"].items() if part["status"] != "passed"}
    print(f"{out}: {json.dumps(bad) if bad else 'everything passed'}", flush=True)
    return 1 if bad else 0


def note(finding: Mapping[str, Any]) -> None:
    """Give a part's finding to the process that runs it; `ok` False makes the part fail."""
    print(json.dumps(dict(finding)), flush=True)


def command(name: str, options: argparse.Namespace) -> list[str]:
    """What runs one part."""
    arguments = ["--part", name, "--device", options.device, "--model", options.model]
    return [sys.executable, "-m", "jobs.gpu_check", *arguments]


def _run(name: str, part: dict[str, Any], options: argparse.Namespace, save: Callable[[], None]) -> None:
    """Run one part to its end or its limit, and enter what it finds as it comes."""
    limit = options.limit or LIMITS_S[name]
    paths = [str(ROOT / "platform"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        command(name, options),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    started = time.monotonic()
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    said: list[str] = []
    status = "passed"
    while True:
        left = started + limit - time.monotonic()
        try:
            line = lines.get(timeout=max(0.0, left))
        except queue.Empty:
            status = f"stopped after {limit} s"
            break
        if line is None:
            break
        if (finding := _finding(line)) is None:
            said = [*said[-19:], line.rstrip()]
            continue
        part["findings"].append(finding)
        part["seconds"] = round(time.monotonic() - started, 1)
        print(f"   {json.dumps(finding)}", flush=True)
        save()
    _end(process, 5 if status == "passed" else 0)
    part["seconds"] = round(time.monotonic() - started, 1)
    if status == "passed" and process.returncode:
        status = f"broke with exit code {process.returncode}"
        part["last_lines"] = said
        print("\n".join(f"   {line}" for line in said), flush=True)
    wrong = sum(finding.get("ok") is False for finding in part["findings"])
    part["status"] = f"{wrong} findings are wrong" if status == "passed" and wrong else status


def _read(stream: Iterable[str], lines: queue.Queue[str | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _finding(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _end(process: subprocess.Popen[str], within_s: float) -> None:
    """The part and whatever it started."""
    try:
        process.wait(within_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    making = path.with_suffix(".tmp")
    making.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    making.replace(path)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m jobs.gpu_check", description=ABOUT, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--model", choices=list(MODEL_SIZES), default="7B", help="sizes for table3 and bilevel")
    parser.add_argument("--only", nargs="+", choices=list(LIMITS_S), help="parts to run; all without it")
    parser.add_argument("--limit", type=float, help="seconds for each part; its own limit without it")
    parser.add_argument("--out", type=Path, help=f"the result file; {RESULT.relative_to(ROOT)} on a GPU without it")
    parser.add_argument("--allow-dirty", action="store_true", help=ALLOW_DIRTY)
    parser.add_argument("--part", choices=list(LIMITS_S), help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
