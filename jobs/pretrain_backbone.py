"""Pretrains a small backbone from public text: `python -m jobs.pretrain_backbone --help`. A thin entry; no cluster."""

import sys

from pedro.training.pretrain.main import main

if __name__ == "__main__":
    sys.exit(main())
