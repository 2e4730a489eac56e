"""The former place of pretraining: use `python -m jobs.pretrain`, with the same options."""

import sys

from jobs.pretrain.command_line import main

if __name__ == "__main__":
    print("warning: jobs.pretrain_backbone is now `python -m jobs.pretrain`; the options are the same", file=sys.stderr)
    sys.exit(main())
