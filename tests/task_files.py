"""Files of the benchmark tasks for the tests: licensed excerpts, and rows made here where no licence is stated."""

import json
from pathlib import Path

EXCERPTS = Path(__file__).parent / "fixtures" / "tasks"

SST2 = "sentence\tlabel\na warm and clever film . \t1\nit drags . \t0\n"
RTE = "index\tsentence1\tsentence2\tlabel\n0\tA man sings.\tSomebody sings.\tentailment\n"
QNLI = "index\tquestion\tsentence\tlabel\n" + "".join(
    f'{i}\tWho wrote book {i}?\tBook {i} has "many" pages.\tnot_entailment\n' for i in range(200)
)
COPA = {"premise": "The glass fell.", "choice1": "It broke.", "choice2": "It rang.", "question": "effect", "label": 0}
BALANCED_COPA = """<?xml version="1.0"?><copa-corpus>
<item id="7" asks-for="effect" most-plausible-alternative="1"><p>The  glass fell.</p><a1>a</a1><a2>b</a2></item>
<item id="1007" asks-for="effect" most-plausible-alternative="2"><p>The glass stood.</p><a1>a</a1><a2>b</a2></item>
<item id="8" asks-for="cause" most-plausible-alternative="2"><p>It rained.</p><a1>Sun.</a1><a2>Clouds.</a2></item>
</copa-corpus>"""
RECORD = {
    "passage": {
        "text": "Ann met Bob in Rome\n@highlight\nBob lives there",
        "entities": [{"start": start, "end": end} for start, end in ((0, 2), (8, 10), (15, 18), (31, 33))],
    },
    "qas": [
        {"query": "Ann likes @placeholder.", "answers": [{"text": "Bob"}, {"text": "Bob"}]},
        {"query": "hidden @placeholder"},
    ],
}
ALPACA = [
    {"instruction": "Add.", "input": "1 2", "output": "3"},
    {"instruction": "Greet.", "input": "", "output": "Hello"},
    {"instruction": "Say nothing.", "input": "", "output": ""},
]
MADE = {
    "sst2/train.tsv": SST2,
    "sst2/dev.tsv": SST2,
    "sst2/test.tsv": SST2,
    "rte/train.tsv": RTE,
    "rte/dev.tsv": RTE,
    "qnli/dev.tsv": QNLI,
    "copa/val.jsonl": json.dumps(COPA),
    "copa/balanced-copa-dev-all.xml": BALANCED_COPA,
    "record/train.jsonl": json.dumps(RECORD),
    "record/dev32.jsonl": json.dumps(RECORD),
    "alpaca/alpaca_data.json": json.dumps(ALPACA, indent=1),
}


def make_task_files(folder: Path) -> Path:
    """A data directory with a few rows of every task that the package does not carry."""
    for name, text in MADE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for excerpt in EXCERPTS.iterdir():
        if excerpt.is_dir():
            (folder / excerpt.name).symlink_to(excerpt)
    return folder
