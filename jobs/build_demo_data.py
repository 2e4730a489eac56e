"""Makes the packaged demo data (`pedro/assets/demo/`) from the public sources.

    python jobs/build_demo_data.py --source DIR

DIR holds the sources as they are published:

    snips/train_<Intent>.json, validate_<Intent>.json      sonos/nlu-benchmark, 2017-06-custom-intent-engines
    clinc150/data_full.json, domains.json                  clinc/oos-eval, data/
    banking77/train.csv, test.csv                          PolyAI-LDN/task-specific-datasets, banking_data/
    squad/train-v1.1.json.gz, dev-v1.1.json.gz             rajpurkar/SQuAD-explorer, dataset/ (packed or not)

and each one's LICENSE, but for SQuAD, whose repository has none: the text of CC BY-SA 4.0 in its folder stays. The
result is the same on every machine: rows are chosen by a hash of their text. Training rows come from a source's
training part and test rows from its test part; a prompt that occurs in both, or twice, is used once. Long prompts are
left out; those of the small demo have at most `MAX_CHARS` characters, to suit a backbone with a vocabulary of 512.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pedro.data.tasks import get_task
from pedro.data.tasks.intents import BANKING77, BANKING77_ALL, CLINC150, SNIPS

TARGET = Path(__file__).resolve().parents[1] / "platform" / "pedro" / "assets" / "demo"
MAX_CHARS = 50
MAX_PASSAGE = 200  # characters of SQuAD's paragraphs, of which most are four times as long

Pair = tuple[str, str]  # a prompt and its answer; of several that are accepted, each on a line


def read_snips(source: Path, part: str) -> Iterable[Pair]:
    for intent, label in SNIPS.items():
        raw = (source / "snips" / f"{'train' if part == 'train' else 'validate'}_{intent}.json").read_bytes()
        try:
            rows = json.loads(raw.decode())
        except UnicodeDecodeError:  # train_PlayMusic.json is published in Latin-1
            rows = json.loads(raw.decode("latin-1"))
        for row in rows[intent]:
            yield "".join(piece["text"] for piece in row["data"]), label


def read_clinc150(source: Path, part: str) -> Iterable[Pair]:
    domains = json.loads((source / "clinc150" / "domains.json").read_text())
    label_of = {intent: CLINC150[domain] for domain, intents in domains.items() for intent in intents}
    for text, intent in json.loads((source / "clinc150" / "data_full.json").read_text())[part]:
        yield text, label_of[intent]


def read_banking77(source: Path, part: str, intents: dict[str, str] = BANKING77) -> Iterable[Pair]:
    with (source / "banking77" / f"{part}.csv").open(newline="") as stream:
        for row in csv.DictReader(stream):
            if row["category"] in intents:
                yield row["text"], intents[row["category"]]


def read_squad(source: Path, part: str) -> Iterable[Pair]:
    """Questions about the passages that are short as they are; none is cut."""
    for row in get_task("squad").rows(part, source):
        prompt = row.prompt.removesuffix("\nAnswer:")
        if len(prompt.rpartition("\nQuestion:")[0]) <= MAX_PASSAGE + len("Passage: "):
            yield prompt, "\n".join(dict.fromkeys(row.accepted))


def as_completion(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer}


def as_messages(prompt: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]}


def as_alpaca(prompt: str, answer: str) -> dict[str, Any]:
    return {"instruction": prompt, "output": answer}


def as_answers(prompt: str, answer: str) -> dict[str, Any]:
    """Training teaches the first answer; the others are as right. Passage and question have a line each."""
    accepted = answer.split("\n")
    return {
        "prompt": "\nQuestion: ".join(prompt.rsplit(" Question: ", 1)),
        "completion": accepted[0],
        "answers": accepted,
    }


@dataclass(frozen=True)
class Tenant:
    """`train` and `test` are the most rows of one class, `most` of a part; prompts have at most `chars` characters."""

    name: str
    folder: str
    read: Callable[[Path, str], Iterable[Pair]]
    shape: Callable[[str, str], dict[str, Any]]
    train: int
    test: int
    notice: str
    chars: int = MAX_CHARS
    most: int | None = None


TENANTS = (
    Tenant(
        "acme",
        "snips",
        read_snips,
        as_completion,
        400,
        50,
        """Voice commands with 7 intents from the Snips NLU benchmark (2017-06-custom-intent-engines).
Source: https://github.com/sonos/nlu-benchmark, commit b86ac7f. Licence: CC0 1.0 (LICENSE).
Coucke et al., "Snips Voice Platform", 2018, arXiv:1805.10190.
Changes: slots joined to plain text, intents renamed to one word, a subset of short prompts.
""",
    ),
    Tenant(
        "globex",
        "clinc150",
        read_clinc150,
        as_messages,
        180,
        40,
        """Assistant queries in 10 domains from CLINC150.
Source: https://github.com/clinc/oos-eval, commit 828f809. Licence: CC BY 3.0 (LICENSE).
Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction", EMNLP 2019.
Changes: 150 intents folded into their domains, domains renamed to short words, out-of-scope rows left out, a
subset of short prompts.
""",
    ),
    Tenant(
        "initech",
        "banking77",
        read_banking77,
        as_alpaca,
        180,
        40,
        """Bank customers' questions with 10 of the 77 intents of Banking77.
Source: https://github.com/PolyAI-LDN/task-specific-datasets, commit 57ec275. Licence: CC BY 4.0 (LICENSE).
Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders", 2020, arXiv:2003.04807.
Changes: 10 intents chosen and renamed to one word, a subset of short prompts.
""",
    ),
    Tenant(
        "globex-reader",
        "squad",
        read_squad,
        as_answers,
        3,
        3,
        """Questions about passages of Wikipedia, answered in the passage's words, from SQuAD 1.1.
Source: https://github.com/rajpurkar/SQuAD-explorer, commits 13f82e35 and e0c66cfe. Licence: CC BY-SA 4.0 (LICENSE).
Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", EMNLP 2016, arXiv:1606.05250.
Changes: passage and question put into one text, a subset of short passages; test rows are of its development set.
""",
        chars=400,
        most=700,
    ),
    Tenant(
        "initech-77",
        "banking77",
        partial(read_banking77, intents=BANKING77_ALL),
        as_completion,
        20,
        3,
        """Bank customers' questions with the 77 intents of Banking77.
Source: https://github.com/PolyAI-LDN/task-specific-datasets, commit 57ec275. Licence: CC BY 4.0 (LICENSE).
Casanueva et al., "Efficient Intent Detection with Dual Sentence Encoders", 2020, arXiv:2003.04807.
Changes: the names of intents written as words, a subset of short prompts.
""",
        chars=70,
    ),
)


def choose(pairs: Iterable[Pair], per_class: int, taken: set[str], chars: int = MAX_CHARS) -> list[Pair]:
    """Up to `per_class` short prompts of each class that are not `taken`, by hash order; adds them to `taken`."""
    counts: dict[str, int] = {}
    chosen = []
    cleaned = ((" ".join(prompt.split()), answer) for prompt, answer in pairs)
    for prompt, answer in sorted(cleaned, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()):
        identity = prompt.casefold()
        if not prompt or len(prompt) > chars or identity in taken or counts.get(answer, 0) == per_class:
            continue
        taken.add(identity)
        counts[answer] = counts.get(answer, 0) + 1
        chosen.append((prompt, answer))
    return chosen


def build(tenant: Tenant, source: Path, target: Path) -> dict[str, int]:
    """Writes the tenant's folder; how many rows each part has."""
    folder = target / tenant.name
    folder.mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    rows = {
        part: choose(tenant.read(source, part), getattr(tenant, part), taken, tenant.chars)[: tenant.most]
        for part in ("test", "train")
    }
    for part, pairs in rows.items():
        lines = (json.dumps(tenant.shape(*pair), ensure_ascii=False) + "\n" for pair in pairs)
        (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "NOTICE").write_text(tenant.notice)
    if (licence := source / tenant.folder / "LICENSE").is_file():
        shutil.copyfile(licence, folder / "LICENSE")
    return {part: len(pairs) for part, pairs in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, required=True, help="folder with snips/, clinc150/ and banking77/")
    parser.add_argument("--target", type=Path, default=TARGET, help="where the tenants' folders go")
    arguments = parser.parse_args()
    for tenant in TENANTS:
        print(tenant.name, build(tenant, arguments.source, arguments.target))


if __name__ == "__main__":
    main()
