"""Runs one sweep, as `pedro sweep` has the cluster do it: `python jobs/sweep.py --spec FILE.yaml`, or `--sweep ID`."""

import sys

from pedro.training.sweep.job import main

if __name__ == "__main__":
    sys.exit(main())
