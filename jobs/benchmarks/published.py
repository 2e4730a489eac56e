"""Our evaluation of a known model beside what its makers publish of it: MMLU, BBH, GSM8K, and perplexity besides.

The model is SmolLM2-135M-Instruct as `pedro backbones pull smollm2-135m` makes it; the data lie under PEDRO_TASK_DATA
(`pedro tasks NAME` says in what form), WikiText-2 in wikitext2/test.txt there. A part that is done is kept until the
code, the model or the sizes change, so that a run which was ended goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jobs.benchmarks.model_sizes import bench_folder
from jobs.benchmarks.published_parts import PARTS, Part, Sizes, Subject
from jobs.benchmarks.report import BenchmarkReport
from pedro.errors import ConfigError
from pedro.provenance import code_state

if TYPE_CHECKING:
    from jobs.benchmarks.command_line import Options
    from jobs.benchmarks.engine_process import Log

BACKBONE = "smollm2-135m"
SOURCES = {
    "figures": 'https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct (table "Instruction model"; lighteval)',
    "prompts": "https://github.com/huggingface/smollm/blob/c5525272e1183ba19ea3ab9d76f2498a3e00b729"
    "/text/evaluation/tasks.py",
}
PUBLISHED = {"MMLU, cloze": 29.3, "BBH, 3-shot": 28.2, "GSM8K, 5-shot": 1.4}  # percent
NO_DATA = {"HellaSwag": 40.9, "ARC (average)": 37.3, "PIQA": 66.3, "IFEval": 29.9, "MT-Bench": 1.98}
FULL = Sizes(mmlu=228, mmlu_chat=57, harness=57, endpoint=57, bbh_each=4, gsm8k=20, windows=8)
QUICK = Sizes(mmlu=4, mmlu_chat=2, harness=2, endpoint=2, bbh_each=1, gsm8k=1, windows=1)


def run(options: Options, log: Log) -> BenchmarkReport:
    """Every part, on one core in about twenty minutes. Raises PedroError without data or backbone."""
    data = os.environ.get("PEDRO_TASK_DATA")
    if not data:
        raise ConfigError(
            "PEDRO_TASK_DATA: not set; give the directory that holds mmlu/, bbh/, gsm8k/ and wikitext2/", param="data"
        )
    names = options.backbones or (BACKBONE,)
    if len(names) > 1:
        raise ConfigError(f"backbones: published takes one, got {', '.join(names)}", param="backbones")
    subject = Subject(names[0], Path(data), options.threads)
    return measure(subject, QUICK if options.quick else FULL, PUBLISHED if names[0] == BACKBONE else {}, log)


def measure(subject: Subject, sizes: Sizes, published: Mapping[str, float], log: Log) -> BenchmarkReport:
    """The report: a row for each way in which each task was asked, with the published figure beside ours."""
    settings = {"backbone": subject.backbone.id, "digest": subject.backbone.digest, "sizes": asdict(sizes)}
    report = BenchmarkReport("published", {**settings, "threads": subject.threads, "dtype": "float32"})
    for name, part in PARTS.items():
        for row in _kept(name, part, subject, sizes, settings, log):
            theirs = published.get(row["task"])
            low, high = row["interval"]
            beside = {} if theirs is None else {"published": theirs, "within": low <= theirs <= high}
            report.rows.append({**row, **beside})
    if published:
        report.facts |= {"sources": SOURCES, "published_without_our_data": NO_DATA}
    return report


def _kept(
    name: str, part: Part, subject: Subject, sizes: Sizes, settings: Mapping[str, Any], log: Log
) -> list[dict[str, Any]]:
    """The part's rows, from an earlier run of the same code on the same model with the same sizes if there was one."""
    same = json.dumps({**settings, "code": code_state()["code"], "part": name}, sort_keys=True)
    file = bench_folder() / "published" / f"{name}-{hashlib.sha256(same.encode()).hexdigest()[:16]}.json"
    if file.is_file():
        log(f"  {name}: of an earlier run")
        found: list[dict[str, Any]] = json.loads(file.read_text())
        return found
    began = time.monotonic()
    rows = part(subject, sizes)
    seconds = round(time.monotonic() - began, 1)
    rows = [{**row, "seconds": seconds if place == 0 else None} for place, row in enumerate(rows)]
    file.parent.mkdir(parents=True, exist_ok=True)
    making = file.with_suffix(".new")
    making.write_text(json.dumps(rows))
    making.replace(file)
    log(f"  {name}: {', '.join(str(row['score']) for row in rows)} in {seconds:.0f} s")
    return rows
