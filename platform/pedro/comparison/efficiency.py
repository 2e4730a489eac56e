"""The paper's table 3 as a comparison: tokens per second and peak memory of the engine, from a spec."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pedro.comparison.spec import EfficiencySpec
from pedro.errors import ConfigError, UnavailableError


def check_efficiency(spec: EfficiencySpec) -> None:
    """Raise ConfigError for unknown models, or a device that is not here."""
    from pedro.evaluation.benchmarks.shapes import SHAPES

    if unknown := [name for name in spec.models if name not in SHAPES]:
        raise ConfigError(f"models: {unknown[0]!r} is none of {', '.join(SHAPES)}", param="models")
    if spec.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError(
                "device: cuda, but torch finds no GPU here; run it where there is one, or with device=cpu models=[S]",
                param="device",
            )


def run_efficiency(
    spec: EfficiencySpec, out: Path | None, say: Callable[[str], None]
) -> tuple[dict[str, Any], str, Path]:
    """Measure; the result as JSON, as text, and the file that holds it.

    Raises ConfigError as `check_efficiency` does and for a folder that cannot be written, UnavailableError for an
    engine that failed.
    """
    from pedro.comparison.run import open_folder
    from pedro.config import Settings
    from pedro.evaluation.benchmarks.catalog import BENCHMARKS
    from pedro.evaluation.benchmarks.main import Options
    from pedro.evaluation.benchmarks.rivals import RivalError

    check_efficiency(spec)
    folder = out.absolute() if out else Settings.from_env().home / "comparisons" / spec.name
    open_folder(folder)
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
    try:
        report = benchmark.run(options, say)
    except RivalError as error:
        raise UnavailableError(f"{spec.name}: an engine failed: {error}") from error
    if spec.paper:
        report.facts["paper"] = spec.paper
    path = folder / "efficiency.json"
    report.save(path)
    return report.as_dict(), report.show(benchmark.columns), path
