"""The paper's table 3 as a comparison: tokens per second and peak memory of the engine, from a spec."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pedro.comparison.spec import EfficiencySpec
from pedro.errors import ConfigError


def run_efficiency(
    spec: EfficiencySpec, out: Path | None, say: Callable[[str], None]
) -> tuple[dict[str, Any], str, Path]:
    """Measure; the result as JSON, as text, and the file that holds it. Raises ConfigError for unknown models."""
    from pedro.config import Settings
    from pedro.evaluation.benchmarks.catalog import BENCHMARKS
    from pedro.evaluation.benchmarks.main import Options
    from pedro.evaluation.benchmarks.shapes import SHAPES

    if unknown := [name for name in spec.models if name not in SHAPES]:
        raise ConfigError(f"models: {unknown[0]!r} is none of {', '.join(SHAPES)}", param="models")
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
    report = benchmark.run(options, say)
    if spec.paper:
        report.facts["paper"] = spec.paper
    path = (out or Settings.from_env().home / "comparisons" / spec.name) / "efficiency.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    report.save(path)
    return report.as_dict(), report.show(benchmark.columns), path
