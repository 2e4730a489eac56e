"""Measures the engine and prints what it found: `python -m jobs.bench --help`. A thin entry; it needs no cluster.

Where Ray is not installed, the benchmarks that need a server are not offered.
"""

import sys
from importlib.util import find_spec
from pathlib import Path

from jobs.benchmarks.command_line import Benchmark, main
from jobs.benchmarks.engine_benchmarks import BENCHMARKS


def benchmarks() -> dict[str, Benchmark]:
    """Every benchmark that can run here."""
    if find_spec("ray") is None or find_spec("mlflow") is None:
        return dict(BENCHMARKS)
    from jobs.benchmarks.server_benchmarks import SERVER_BENCHMARKS

    return {**BENCHMARKS, **SERVER_BENCHMARKS}


if __name__ == "__main__":
    sys.exit(main(benchmarks(), Path(__file__).parent / "results"))
