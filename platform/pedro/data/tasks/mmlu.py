"""MMLU: multiple choice over 57 subjects (Hendrycks et al., 2021). Worked examples are the subject's dev rows.

The wording `cloze` shows no choices; the answer is the words of one. Small models are compared so.
"""

from collections.abc import Iterator
from pathlib import Path

from pedro.data.tasks.parsers import parse_choice
from pedro.data.tasks.sources import HubSource, Part, Record, read_csv
from pedro.data.tasks.task import Task, TaskRow, Wording

LETTERS = "ABCD"


def read(path: Path) -> Iterator[Record]:
    """`<subject>_<split>.csv`: question, four choices, the right letter."""
    subject = path.stem.rpartition("_")[0]
    for record in read_csv(path, ("question", *LETTERS, "answer")):
        choices = [record[letter] for letter in LETTERS]
        answer = LETTERS.index(record["answer"].strip())
        yield {"question": record["question"], "choices": choices, "answer": answer, "group": subject}


def make(record: Record, words: Wording, shots: str) -> TaskRow:
    answer, subject = record["answer"], record.get("group") or record["subject"]
    letter = answer if isinstance(answer, str) else LETTERS[answer]
    choices = dict(zip(LETTERS, (choice.strip() for choice in record["choices"]), strict=True))
    fields = {"question": record["question"].strip(), "subject": subject.replace("_", " "), **choices}
    extra = {"choices": tuple(choices.values())}
    if words.spelled:
        return TaskRow(words.prompt(fields, shots), choices[letter], (letter,), group=subject, extra=extra)
    return TaskRow(words.prompt(fields, shots), letter, group=subject, extra=extra)


TASK = Task(
    name="mmlu",
    title="MMLU: 57 subjects, multiple choice",
    metric="accuracy",
    licence="MIT",
    source="https://github.com/hendrycks/test",
    wordings={
        "full": Wording(
            "{question}\nA. {A}\nB. {B}\nC. {C}\nD. {D}\nAnswer:",
            head="The following are multiple choice questions (with answers) about {subject}.\n\n",
        ),
        "cloze": Wording(
            "Question: {question}\nAnswer:", head="The following are questions about {subject}.\n", spelled=True
        ),
    },
    make=make,
    parser=parse_choice,
    read=read,
    layouts=(
        {
            "shots": Part(("dev/*_dev.csv",)),
            "validation": Part(("val/*_val.csv",)),
            "test": Part(("test/*_test.csv",)),
        },
    ),
    hub=HubSource(
        "cais/mmlu",
        {"shots": "dev", "validation": "validation", "test": "test"},
        configs=("all",),
        rows={"validation": 1531, "test": 14042},
    ),
    max_new_tokens=8,
    stops=("\n\n",),
)
