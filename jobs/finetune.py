"""Runs one fine-tuning job, as `pedro submit` has the cluster do it: `python jobs/finetune.py --spec FILE.yaml`."""

import sys

from pedro.training.job import main

if __name__ == "__main__":
    sys.exit(main())
