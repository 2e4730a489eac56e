"""Makes the packaged general text (`pedro/assets/text/wikitext2/`) from WikiText-2's test part.

    python -m jobs.build_general_text --source DIR

DIR holds wikitext2/test.txt as pytorch/examples publishes it (word_language_model/data/wikitext-2). Its first
paragraphs are taken as plain prose, one a line; the result is the same on every machine.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from jobs.pretrain.corpus import wikitext
from pedro.data.general_text import FILE

MAX_CHARS = 110_000  # enough for 16,000 tokens of a large vocabulary, a quarter of each window apart


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="the directory that holds wikitext2/")
    kept: list[str] = []
    for paragraph in wikitext("test.txt")(parser.parse_args().source):
        kept.append(paragraph)
        if sum(map(len, kept)) > MAX_CHARS:
            break
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text("".join(f"{paragraph}\n" for paragraph in kept), encoding="utf-8")
    print(f"{FILE}: {len(kept)} paragraphs, {sum(map(len, kept)):,} characters")


if __name__ == "__main__":
    main()
