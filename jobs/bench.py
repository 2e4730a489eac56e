"""Measures the engine and prints what it found: `python -m jobs.bench --help`. A thin entry; needs no cluster."""

import sys
from pathlib import Path

from pedro.evaluation.benchmarks.catalog import BENCHMARKS
from pedro.evaluation.benchmarks.main import main

if __name__ == "__main__":
    sys.exit(main(BENCHMARKS, Path(__file__).parent / "results"))
