"""lm-eval's command line with our models and tasks: `python -m pedro.evaluation.harness --help`."""

from __future__ import annotations

import sys

from pedro.errors import PedroError
from pedro.evaluation.harness import TASKS, register


def main() -> None:
    """Run lm-eval on our command line; our tasks are known unless another --include_path is given."""
    try:
        register()
        from lm_eval.__main__ import cli_evaluate

        if len(sys.argv) > 2 and not any(word.startswith("--include_path") for word in sys.argv):
            sys.argv += ["--include_path", str(TASKS)]
        cli_evaluate()
    except PedroError as error:
        sys.exit(f"error: {error.message}")


if __name__ == "__main__":
    main()
