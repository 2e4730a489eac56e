"""Runs a comparison as `pedro compare` does: `python jobs/compare.py SPEC.yaml [key=value …]`, on a cluster as well."""

import sys

from pedro.cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "compare")
    main()
