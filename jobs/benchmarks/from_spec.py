"""The paper's table 3 from an efficiency spec: `pedro compare` starts this process and hands it the spec on stdin.

The spec is resolved JSON. Progress goes to stderr; stdout is one JSON object: the result, its table and its file, or
the error that the command raises.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jobs.benchmarks.command_line import Options
from jobs.benchmarks.engine_benchmarks import BENCHMARKS
from jobs.benchmarks.engine_process import EngineProcessError
from jobs.benchmarks.model_sizes import MODEL_SIZES
from pedro.comparison.spec import EfficiencySpec
from pedro.errors import ConfigError, PedroError, UnavailableError
from pedro.provenance import code_state


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the spec on stdin and, given a folder, measure."""
    parser = argparse.ArgumentParser("python -m jobs.benchmarks.from_spec", description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where efficiency.json goes; without it the spec is only checked")
    folder: Path | None = parser.parse_args(arguments).folder
    spec = EfficiencySpec.model_validate_json(sys.stdin.read())
    try:
        check_efficiency(spec)
        answer = {} if folder is None else run_efficiency(spec, folder, lambda line: print(line, file=sys.stderr))
    except PedroError as error:
        answer = {"error": type(error).__name__, "message": error.message, "param": error.param}
    print(json.dumps(answer), flush=True)
    return 0


def check_efficiency(spec: EfficiencySpec) -> None:
    """Raise ConfigError for unknown models, or a device that is not here."""
    if unknown := [name for name in spec.models if name not in MODEL_SIZES]:
        raise ConfigError(f"models: {unknown[0]!r} is none of {', '.join(MODEL_SIZES)}", param="models")
    if spec.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "device: cuda, but torch finds no GPU here; run it where there is one, or with device=cpu models=[S]",
                param="device",
            )


def run_efficiency(spec: EfficiencySpec, folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Measure; the result as JSON, as text, and the file that holds it. Raises UnavailableError for a failed engine."""
    benchmark = BENCHMARKS["efficiency"]
    options = Options(
        quick=False,
        models=spec.models,
        batches=spec.batches,
        rounds=spec.rounds,
        threads=spec.threads or os.cpu_count() or 1,
        device=spec.device,
        peers={},
        engines=None,
    )
    code = code_state()
    try:
        report = benchmark.run(options, log)
    except EngineProcessError as error:
        raise UnavailableError(f"{spec.name}: an engine failed: {error}") from error
    if spec.paper:
        report.facts["paper"] = spec.paper
    path = folder / "efficiency.json"
    report.save(path, code)
    return {"result": report.as_dict(), "text": report.show(benchmark.columns), "path": str(path)}


if __name__ == "__main__":
    sys.exit(main())
