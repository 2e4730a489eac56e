"""Every benchmark gives the right prompt and answer, from its files, from the hub's form, in any wording."""

import itertools
import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from task_files import EXCERPTS, make_task_files

from pedro.backbone import load_tokenizer, resolve_backbone
from pedro.comparison.untrained import candidates
from pedro.data import FORMATS, check_file, load_rows
from pedro.data.tasks import TASKS, TaskRow, get_task, proportional
from pedro.data.tasks.sources import read_array
from pedro.data.tasks.text2sql import column_name
from pedro.errors import ConfigError, DataError

WHOLE = Path(os.environ.get("PEDRO_TASK_DATA", Path(__file__).parents[2] / "shared" / "data"))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_task_files(tmp_path_factory.mktemp("data"))


def first(name, split, data=None, **options):
    return next(get_task(name, **options).rows(split, data))


LOCAL = {
    "sst2": ("test", "Sentence: a warm and clever film .\n", "positive"),
    "rte": ("test", "Premise: A man sings.\nHypothesis: Somebody sings.\n", "yes"),
    "qnli": ("test", "Sentence: Book ", "no"),
    "boolq": ("test", "Passage: Ethanol fuel -- All biomass", "no"),
    "copa": ("test", "The glass fell.\nWhat happened as a result?\nA. It broke.\nB. It rang.\nAnswer:", "A"),
    "record": ("test", "Ann met Bob in Rome\n- Bob lives there\n\nAnn likes @placeholder.\n", "Bob"),
    "squad": ("test", "Passage: The 1973 oil crisis began in October 1973", "October 1973"),
    "alpaca": ("train", "Add.", "3"),
    "mmlu": ("test", "The following are multiple choice questions (with answers) about astronomy.\n\n", "A"),
    "bbh": ("test", "Evaluate the result of a random Boolean expression.\n\nQ: not ( True ) and", "False"),
    "mt_bench": ("test", "Compose an engaging travel blog post", ""),
    "gsm8k": ("test", "Question: Janet’s ducks lay 16 eggs per day.", None),
    "wikisql": (
        "train",
        "Table: t (current_series, current_slogan, format, notes, state_territory, text_background_colour)\n"
        "Question: Tell me what the notes are for South Australia\nSQL:",
        "SELECT notes FROM t WHERE current_slogan = 'SOUTH AUSTRALIA'",
    ),
    "advising": (
        "test",
        "Question: Are undergrads eligible to take 312 ?\nSQL:",
        "SELECT DISTINCT COURSE.ADVISORY_REQUIREMENT , COURSE.ENFORCED_REQUIREMENT , COURSE.NAME FROM COURSE "
        "WHERE COURSE.DEPARTMENT = 'EECS' AND COURSE.NUMBER = 312",
    ),
}


@pytest.mark.parametrize("name", LOCAL)
def test_the_first_row_of_a_task_is_put_into_words(name, data):
    split, prompt, answer = LOCAL[name]
    row = first(name, split, data)
    assert row.prompt.startswith(prompt)
    assert answer is None or row.completion == answer
    assert row.accepted
    assert row.id


@pytest.mark.parametrize("name", ["snips", "clinc_domains", "banking77", "banking77_all"])
def test_the_demos_tasks_need_no_files(name):
    task = get_task(name)
    assert task.splits() == ("train", "test")
    rows = list(task.rows("test"))
    assert {row.completion for row in rows} == set(task.words.labels.values())
    assert all(task.parse(row.completion, row) == row.completion for row in rows)


@pytest.mark.parametrize(("name", "command_first"), [("snips_talk_first", False), ("snips_command_first", True)])
def test_a_command_among_other_talk_keeps_its_answer_and_its_group_is_the_talks_length(name, command_first):
    plain, among = list(get_task("snips", "bare").rows("test")), list(get_task(name, "bare").rows("test"))
    inside = [f"Text: {row.prompt}\nIntent:" for row in among]
    assert [row.prompt for row in get_task(name).rows("test")] == inside
    assert [row.completion for row in among] == [row.completion for row in plain]
    lengths = set()
    for short, long in zip(plain, among, strict=True):
        if long.group == "0 words":
            assert long.prompt == short.prompt
        else:
            parts = long.prompt.split("\n")
            command, talk = parts if command_first else reversed(parts)
            assert command == short.prompt
            assert long.group == f"{len(talk.split())} words"
        lengths.add(long.group)
    assert lengths == {"0 words", "16 words", "32 words", "64 words", "128 words"}


def test_a_worded_reference_is_what_the_parser_makes_of_the_answer(data):
    for task in TASKS.values():
        split = "test" if task.name not in ("alpaca", "wikisql") else "train"
        source = None if task.packaged else data
        for row in itertools.islice(task.rows(split, source), 3):
            if task.name != "mt_bench":
                assert task.parse(row.completion, row) in row.accepted


def test_a_shared_tasks_words_can_be_chosen(data):
    row = first("sst2", "test", data, wording="short")
    assert (row.prompt, row.completion) == ("a warm and clever film .", "good")
    with pytest.raises(ConfigError, match=r"sst2 has no 'long'; choose one of: template, bare, full, short"):
        get_task("sst2", wording="long")


def test_worked_examples_are_those_of_the_rows_own_subject(data):
    row = next(row for row in get_task("mmlu", shots=2).rows("test", data) if row.group == "management")
    head, *blocks = row.prompt.split("\n\n")
    assert head == "The following are multiple choice questions (with answers) about management."
    dev = (EXCERPTS / "mmlu/dev/management_dev.csv").read_text().splitlines()
    assert blocks[0].startswith(dev[0].split(",")[0])
    assert blocks[0].endswith("\nAnswer: " + dev[0][-1])
    assert len(blocks) == 3
    assert blocks[2].endswith("\nAnswer:")
    with pytest.raises(ConfigError, match=r"fewer than 9 worked examples of .*'management'"):
        first("mmlu", "test", data, shots=9)


def test_a_cloze_question_shows_no_choices_and_its_answer_is_the_words_of_one(data):
    task = get_task("mmlu", "cloze")
    row = next(task.rows("test", data))
    letters = next(get_task("mmlu").rows("test", data))
    assert row.prompt.startswith("The following are questions about astronomy.\nQuestion: ")
    assert row.prompt.endswith("\nAnswer:")
    assert row.completion == row.extra["choices"]["ABCD".index(letters.completion)]
    assert task.parse(row.completion, row) in row.accepted
    assert candidates(task, row) == list(row.extra["choices"])
    assert candidates(get_task("mmlu"), letters) == list("ABCD")


def test_a_proportional_sample_gives_each_group_its_share_and_holds_every_smaller_one():
    rows = [TaskRow(f"{group} {number}", "x", group=group) for group in "abc" for number in range(10)]
    rows += [TaskRow(f"big {number}", "x", group="big") for number in range(70)]
    sample = proportional(rows, 20)
    assert Counter(row.group for row in sample) == {"a": 2, "b": 2, "c": 2, "big": 14}
    assert sample == [row for row in rows if row in sample], "in the source's order"
    assert all(row in sample for row in proportional(rows, 9))
    assert proportional(rows, 1000) == rows


def test_chain_of_thought_examples_reason_and_direct_ones_do_not(data):
    reasoned = first("bbh", "test", data, wording="cot", shots=3).prompt
    assert reasoned.count("Let's think step by step.") == 4
    assert reasoned.count("So the answer is") == 3
    direct = first("bbh", "test", data, shots=3).prompt
    assert "step by step" not in direct
    assert "Q: not ( ( not not True ) ) is\nA: False\n\n" in direct


def test_gsm8k_teaches_the_solution_without_the_calculators_notes(data):
    row = first("gsm8k", "test", data)
    assert row.references == ("18",)
    assert "<<" not in row.completion
    assert row.completion.endswith("#### 18")


def test_a_question_has_all_its_right_answers(data):
    row = first("squad", "test", data)
    assert set(row.references) == {"October 1973", "October", "1973"}
    assert row.id == "5725b33f6a3fe71400b8952d"
    (record,) = get_task("record").rows("train", data)
    assert record.references == ("Bob",)
    assert "stand for: Ann, Bob, Rome?" in record.prompt


def test_mt_bench_keeps_both_turns_and_gpt_4s_answers(data):
    plain, reasoning = get_task("mt_bench").rows("test", data)
    assert len(plain.extra["turns"]) == 2
    assert plain.extra["reference_turns"] == ()
    assert reasoning.extra["reference_turns"][0].startswith("If you have just overtaken the second person")
    assert reasoning.group == "reasoning"


def test_one_file_is_cut_into_splits_that_share_nothing(data):
    task = get_task("qnli")
    parts = {split: {row.prompt for row in task.rows(split, data)} for split in task.splits(data)}
    assert sum(map(len, parts.values())) == len(set().union(*parts.values())) == 200
    assert len(parts["train"]) > len(parts["test"]) > len(parts["validation"]) > 0


def test_copas_training_rows_leave_out_the_validation_premises_and_their_twins(data):
    (row,) = get_task("copa").rows("train", data)
    assert row.prompt.startswith("It rained.\nWhat was the cause?")
    assert row.completion == "B"


def test_columns_are_plain_identifiers():
    assert column_name("STATE/TERRITORY") == "state_territory"
    assert column_name("2008_(%)") == "c_2008"
    assert column_name("To") == "c_to"


@pytest.mark.parametrize(
    ("template", "query"),
    [
        ("SELECT MIN TABLEalias0.1ST_PRIZE_FIELD FROM TABLE AS TABLEalias0 ;", "SELECT MIN( c_1st_prize ) FROM t"),
        ("SELECT COUNT( TABLEalias0.NO_FIELD ) FROM TABLE AS TABLEalias0 ;", "SELECT COUNT( no ) FROM t"),
        (
            'SELECT WOMEN\'S_SINGLES_FIELD FROM table WHERE YEAR_FIELD = var0 AND MIXED_FIELD = "var1"',
            "SELECT women_s_singles FROM t WHERE year = '1984' AND mixed = 'O''Neil AND Ann'",
        ),
    ],
)
def test_wikisqls_several_spellings_become_one(tmp_path, template, query):
    variables = {"var0": "1984", "var1": "O'Neil AND Ann"}
    entry = {
        "sql": [template],
        "variables": [{"name": name, "example": value} for name, value in variables.items()],
        "sentences": [{"text": "Who?", "table-id": "1", "question-split": "test", "variables": {}}],
    }
    (tmp_path / "wikisql.json").write_text(json.dumps([entry]))
    assert first("wikisql", "test", tmp_path).completion == query


def test_alpaca_trains_in_its_own_format_and_leaves_out_empty_answers(data, tmp_path):
    task = get_task("alpaca")
    assert task.write("train", tmp_path / "train.jsonl", data) == 2
    report = check_file(tmp_path / "train.jsonl")
    assert (report.shape, report.format, report.usable) == ("alpaca", "alpaca", True)
    with_input, without = task.rows("train", data)
    assert "### Input:\n1 2\n" in FORMATS["alpaca"].render(with_input.messages)
    assert "### Input" not in FORMATS["alpaca"].render(without.messages)


def test_written_rows_are_what_training_reads(data, tmp_path):
    tokenizer = load_tokenizer(resolve_backbone("stories260K"))
    task = get_task("snips")
    count = task.write("test", tmp_path / "test.jsonl", limit=40)
    rows = load_rows(tmp_path / "test.jsonl", tokenizer, FORMATS["raw"], 512, tmp_path / "cache")
    written = list(task.rows("test", limit=40))
    assert count == len(rows) == len(written) == 40
    assert [row["completion"] for row in rows] == [row.completion for row in written]
    assert tokenizer.decode(rows[0]["input_ids"][: rows[0]["prompt_len"]], skip_special_tokens=True).strip() == (
        written[0].prompt
    )


def test_a_limit_takes_a_fair_sample_in_the_sources_order():
    rows = list(get_task("snips").rows("test"))
    some = list(get_task("snips").rows("test", limit=70))
    places = [rows.index(row) for row in some]
    assert places == sorted(places)
    assert len({row.completion for row in some}) == 7


def test_an_unknown_name_is_answered_with_the_tasks_there_are():
    with pytest.raises(ConfigError, match=r"no 'sst-2'; did you mean 'sst2'\? choose one of: sst2, rte, qnli"):
        get_task("sst-2")


def test_missing_data_says_which_files_go_where(tmp_path):
    with pytest.raises(DataError, match=r"rte: .*rte' does not hold train.tsv, dev.tsv; give .*or \"hub\""):
        get_task("rte").rows("test", tmp_path)
    with pytest.raises(DataError, match=r"gsm8k: no data given; give the directory that holds gsm8k/"):
        get_task("gsm8k").rows("test")
    with pytest.raises(DataError, match=r"advising: is not on the hub"):
        get_task("advising").rows("test", "hub")


def test_a_split_that_a_task_lacks_and_a_record_that_is_damaged_are_named(tmp_path, data):
    with pytest.raises(DataError, match=r"has no 'validation'; choose one of: train, test"):
        get_task("rte").rows("validation", data)
    (tmp_path / "train.jsonl").write_text('{"question": "q"}\n')
    (tmp_path / "test.jsonl").write_text('{"question": \n')
    with pytest.raises(DataError, match=r"gsm8k: record 1 of train in .* lacks or garbles 'answer'"):
        first("gsm8k", "train", tmp_path)
    with pytest.raises(DataError, match=r"line 1 is not JSON"):
        first("gsm8k", "test", tmp_path)


def test_a_long_array_is_read_item_by_item(tmp_path):
    items = [{"text": "x" * size, "nested": [1, {"a": "]"}]} for size in (10, 100_000, 300_000, 10)]
    path = tmp_path / "array.json"
    path.write_text(json.dumps({"note": "data", "data": items, "after": 1}))
    assert list(read_array(path, "data")) == items
    path.write_text(json.dumps(items)[:-30])
    with pytest.raises(DataError, match="ends within its array"):
        list(read_array(path))


# the hub's form: datasets' own streaming, over a directory of the same layout


def on_hub(task, folder, config, files):
    """The task with a local directory in place of its hub id; `files` are records by the hub's split."""
    listed = [{"split": split, "path": f"{split}.jsonl"} for split in files]
    (folder / "README.md").write_text(
        "---\n" + json.dumps({"configs": [{"config_name": config or "default", "data_files": listed}]}) + "\n---\n"
    )
    for split, records in files.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return replace(task, hub=replace(task.hub, path=str(folder), revision=None))


def test_hub_records_give_the_same_rows_as_files(tmp_path, data):
    answer = next(iter(get_task("gsm8k").rows("test", data)))
    records = [json.loads(line) for line in (EXCERPTS / "gsm8k/test.jsonl").read_text().splitlines()]
    task = on_hub(get_task("gsm8k"), tmp_path, "main", {"test": records, "train": records})
    assert next(task.rows("test", "hub")) == answer
    assert task.splits("hub") == ("train", "test")


def test_hub_classes_come_by_name(tmp_path):
    from datasets import ClassLabel, Dataset, Features, Value

    features = Features({"sentence": Value("string"), "label": ClassLabel(names=["negative", "positive"])})
    folder = tmp_path / "sst2"
    folder.mkdir()
    Dataset.from_dict({"sentence": ["fine "], "label": [1]}, features).to_parquet(folder / "validation.parquet")
    listed = [{"config_name": "sst2", "data_files": [{"split": "validation", "path": "validation.parquet"}]}]
    (folder / "README.md").write_text("---\n" + json.dumps({"configs": listed}) + "\n---\n")
    task = get_task("sst2")
    task = replace(task, hub=replace(task.hub, path=str(folder)))
    (row,) = task.rows("test", "hub")
    assert row.completion == "positive"


def test_the_hubs_wikisql_carries_its_tables(tmp_path):
    record = {
        "question": "Who scored most?",
        "table": {"header": ["Player", "No.", "No."], "types": ["text", "real", "real"], "rows": [["Ann", "3", "4"]]},
        "sql": {"sel": 0, "agg": 3, "conds": {"column_index": [2], "operator_index": [1], "condition": ["O'Neil"]}},
    }
    task = on_hub(get_task("wikisql"), tmp_path, None, {"test": [record], "train": [record], "validation": [record]})
    (row,) = task.rows("test", "hub")
    assert row.completion == "SELECT COUNT( player ) FROM t WHERE no_2 > 'O''Neil'"
    assert row.prompt == "Table: t (player, no, no_2)\nQuestion: Who scored most?\nSQL:"
    assert row.extra["database"]["t"]["columns"] == ["player", "no", "no_2"]


def test_a_hub_that_does_not_answer_is_one_clear_error(tmp_path):
    task = get_task("gsm8k")
    task = replace(task, hub=replace(task.hub, path=str(tmp_path / "nowhere")))
    with pytest.raises(DataError, match=r"cannot be streamed from the hub: .*give a directory"):
        next(task.rows("test", "hub"))


# the whole files, where they are at hand

WHOLE_COUNTS = {
    "sst2": {"train": 60614, "validation": 6735, "test": 872},
    "rte": {"train": 2490, "test": 277},
    "copa": {"train": 800, "test": 100},
    "record": {"train": 32, "test": 32},
    "mmlu": {"validation": 1529, "test": 14042},
    "bbh": {"test": 6511},
    "mt_bench": {"test": 80},
    "gsm8k": {"train": 7473, "test": 1319},
}


@pytest.mark.parametrize("name", WHOLE_COUNTS)
def test_whole_files_have_the_rows_they_should(name):
    task = get_task(name)
    try:
        splits = task.splits(WHOLE)
    except DataError as error:
        pytest.skip(error.message)
    assert {split: sum(1 for _ in task.rows(split, WHOLE)) for split in splits} == WHOLE_COUNTS[name]
