"""Searches the readers of `fuzz_targets.py` with atheris, which follows the coverage of Python: `make fuzz-formats`.

    python tests/fuzz_by_coverage.py [--seconds 60] [weights | gguf | config …]

atheris is not among what is installed: `pip install atheris`. An input that a reader fails on is left in the folder for
temporary files, with the error above it.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

LONGEST = 4096  # bytes of an input


def search(name: str, folder: Path, seconds: int) -> None:
    """Search one target. libFuzzer ends the process, with 0 where nothing was found."""
    import atheris

    with atheris.instrument_imports(include=["pedro", "peft.config"]):
        from fuzz_targets import SEEDS, TARGETS
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "seed").write_bytes(SEEDS[name])
    options = [f"-max_total_time={seconds}", f"-max_len={LONGEST}", "-timeout=20", "-rss_limit_mb=4096"]
    options.append(f"-artifact_prefix={tempfile.gettempdir()}/")
    atheris.Setup([sys.argv[0], *options, str(corpus)], lambda data: TARGETS[name](data, folder))
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("targets", nargs="*", default=["weights", "gguf", "config"])
    parser.add_argument("--seconds", type=int, default=60, help="how long each is searched")
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        search(asked.targets[0], asked.folder, asked.seconds)
    if importlib.util.find_spec("atheris") is None:
        parser.error("atheris is not installed; pip install atheris")
    status = 0
    for name in asked.targets:
        print(f"== {name}, {asked.seconds} s", flush=True)
        with tempfile.TemporaryDirectory() as folder:  # for a process of its own, which libFuzzer ends
            command = [sys.executable, "-W", "ignore", __file__, "--in", folder, "--seconds", str(asked.seconds), name]
            status |= subprocess.run(command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False).returncode
    return status


if __name__ == "__main__":
    sys.exit(main())
