"""`python -m pedro.cli` is the `pedro` command."""

from pedro.cli import main

main()
