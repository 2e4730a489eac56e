"""Pretrains a small backbone from public text: `python -m jobs.pretrain --help`. Needs no cluster."""

import sys

from jobs.pretrain.command_line import main

if __name__ == "__main__":
    sys.exit(main())
