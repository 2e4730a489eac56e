"""A dry run for the gateway: a job's spec as JSON on standard input, one line of JSON on standard output.

The spec is validated as by a controller, and estimated as by `pedro submit --dry-run --no-calibrate`: without timing,
since the host also serves. `python -m pedro.training.dry_run_process`.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from pedro.config import Settings
from pedro.errors import PedroError
from pedro.training.queue.prepare import looked_at, told_error
from pedro.training.sweep import of_api
from pedro.training.sweep.variants import planned_count


def answer(fields: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """`{"report": …}`, without the spec, which contains paths of this host; or the `{"error": …}` of the job.

    For a sweep the report is of one trial with the job's own settings, and the number of trials."""
    from pedro.training.estimate import dry_run

    try:
        spec = looked_at(fields, settings)
        sweep = of_api.sweep_spec(fields, spec, options=True) if "sweep" in fields else None
        report = dry_run(spec, calibrated=False).to_dict()
    except PedroError as error:
        return {"error": {**told_error(error), "message": error.message}}
    if sweep is not None:
        trials = planned_count(sweep)
        report["sweep"] = {"trials": trials, "seconds_in_turn": round(trials * report["seconds"], 1)}
    return {"report": {name: value for name, value in report.items() if name != "spec"}}


def main() -> int:
    """The entry point."""
    from pedro.backbone import quiet
    from pedro.process import set_torch_threads

    os.nice(10)
    quiet()
    set_torch_threads(1)
    sys.stdout.write(json.dumps(answer(json.load(sys.stdin), Settings.from_env())) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
