"""Hands an efficiency spec to the benchmarks, which live in the checkout (`jobs/benchmarks/`), not in the package."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pedro
from pedro import errors
from pedro.errors import PedroError, UnavailableError
from pedro.provenance import check_unchanged, code_state

if TYPE_CHECKING:
    from pedro.comparison.spec import EfficiencySpec

MODULE = "jobs.benchmarks.from_spec"


def check_efficiency(spec: EfficiencySpec) -> None:
    """Raise ConfigError for unknown models, or a device that is not here."""
    _ask(spec, None)


def run_efficiency(spec: EfficiencySpec, out: Path | None, allow_dirty: bool) -> tuple[dict[str, Any], str, Path]:
    """Measure; the result as JSON, as text, and the file that holds it.

    Raises ConfigError as `check_efficiency` does, for a folder that cannot be written and for changed code;
    UnavailableError without a checkout and for an engine that failed.
    """
    from pedro.comparison.run_files import folder_of, open_folder
    from pedro.config import Settings

    check_efficiency(spec)
    folder = folder_of(spec.name, Settings.from_env().home, out)
    check_unchanged(code_state(), folder, allow_dirty)
    open_folder(folder)
    answer = _ask(spec, folder)
    return answer["result"], answer["text"], Path(answer["path"])


def _ask(spec: EfficiencySpec, folder: Path | None) -> dict[str, Any]:
    """What the benchmark's process answers; its progress goes to stderr. Raises the error that it reports."""
    root = _checkout(spec)
    inherited = os.environ.get("PYTHONPATH")
    done = subprocess.run(
        [sys.executable, "-P", "-m", MODULE, *(["--folder", str(folder)] if folder else [])],
        input=spec.model_dump_json(),
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *([inherited] if inherited else [])])},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UnavailableError(f"{spec.name}: the benchmark ended with exit code {done.returncode}")
    answer: dict[str, Any] = json.loads(done.stdout)
    if "error" in answer:
        kind: type[PedroError] = getattr(errors, answer["error"])
        raise kind(answer["message"], param=answer["param"])
    return answer


def _checkout(spec: EfficiencySpec) -> Path:
    """The folder that holds `jobs/`: the package's own checkout, or one on Python's path."""
    for folder in (Path(pedro.__file__).parents[2], *map(Path, sys.path)):
        if (folder / MODULE.replace(".", "/")).with_suffix(".py").is_file():
            return folder
    raise UnavailableError(
        f"{spec.name}: benchmarks are not part of the installed package; run this in a checkout of pedro"
    )
