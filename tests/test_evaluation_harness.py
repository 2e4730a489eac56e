"""lm-eval over adapters: the context alone conditions, and its scores are ours, in process and over HTTP."""

import json
import sys
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("lm_eval", reason='lm-eval is not installed (pip install "pedro-platform[harness]")')

from dashboard_gateway import running
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from serving_adapters import backbone, make_adapter, register, settings_at, tokenizer
from typer.testing import CliRunner

from pedro.cli import app
from pedro.data.prompt_format import encode_completion, encode_prompt
from pedro.data.tasks import get_task
from pedro.errors import ConfigError
from pedro.evaluation import scoring
from pedro.evaluation.harness import __main__ as harness_main
from pedro.evaluation.harness.base import ScoringRequest, generation_limits
from pedro.evaluation.harness.endpoint import EndpointModel
from pedro.evaluation.harness.local import LocalModel
from pedro.evaluation.harness.run import _metrics, find_tasks, run_harness
from pedro.registry import Registry

ROWS = 24
TASK = """
task: two_answers
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: generate_until
doc_to_text: "{{prompt}}"
doc_to_target: "{{completion}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
filter_list: [{name: strict, filter: [{function: remove_whitespace}, {function: take_first}]}]
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter that was trained on raw prompts, registered as acme.faq, and the PEFT model it was saved from."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("harness")
    settings = settings_at(folder / "home")
    model = make_adapter(folder / "adapter", 1, "completion")
    register(Registry.open(settings), folder / "adapter", "acme.faq")
    return SimpleNamespace(settings=settings, directory=str(folder / "adapter"), model=model)


@pytest.fixture(scope="module")
def local(made):
    return LocalModel(adapter=made.directory, answers="trained")


@pytest.fixture(scope="module")
def endpoint(made):
    with running(made.settings) as server:
        yield EndpointModel(model="acme.faq", base_url=f"{server.url}/v1", api_key=server.acme, answers="trained")


def banking():
    task = get_task("banking77", "bare")
    rows = [row for row, _ in zip(task.rows("test"), range(ROWS), strict=False)]
    return rows, list(dict.fromkeys(task.words.labels.values()))


def encoded(prompt, answer):
    before = encode_prompt(tokenizer(), prompt)
    return {"input_ids": [*before, *encode_completion(tokenizer(), answer)], "prompt_len": len(before)}


def ask(kind, *arguments):
    requests = [Instance(kind, {}, pair, number) for number, pair in enumerate(arguments)]
    return lambda model: getattr(model, kind)(requests)


def own_choice_accuracy(model):
    """Of the ten answers to a row, is the right one that of the least loss?"""
    rows, choices = banking()
    right = 0
    for row in rows:
        losses = [scoring.answer_loss(model, tokenizer(), [encoded(row.prompt, choice)])[0] for choice in choices]
        right += choices[losses.index(min(losses))] == row.completion
    return right / len(rows)


@pytest.fixture(scope="module")
def wanted(made):
    """Our own accuracy on the first rows of Banking77."""
    return own_choice_accuracy(made.model)


def test_multiple_choice_scores_as_our_own_loss_does(made, wanted):
    found = run_harness({"adapter": made.directory, "answers": "trained"}, ["pedro_banking77"], limit=ROWS)
    assert found["tasks"]["pedro_banking77"]["acc"] == wanted
    assert found["rows"] == {"pedro_banking77": ROWS}
    assert 0 < wanted < 1


def test_a_likelihood_is_the_loss_of_the_answer_to_the_last_digit(made, local):
    rows, choices = banking()
    pairs = [(row.prompt, f" {choice}") for row in rows[:4] for choice in choices]
    found = ask("loglikelihood", *pairs)(local)
    for (prompt, answer), (nats, _) in zip(pairs, found, strict=True):
        loss, _ = scoring.answer_loss(made.model, tokenizer(), [encoded(prompt, answer.strip())])
        assert nats == pytest.approx(-loss, rel=2e-6)


def task_file(folder, rows):
    (folder / "rows.json").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "two_answers.yaml").write_text(TASK.replace("FILE", str(folder / "rows.json")))
    return folder


@pytest.fixture(scope="module")
def answered(made, tmp_path_factory):
    """A task on SNIPS whose right answer to every other row is what our own generation gives; our score on it."""
    prompts = [row.prompt for row, _ in zip(get_task("snips", "bare").rows("test"), range(12), strict=False)]
    rows = [{"input_ids": ids, "prompt_len": len(ids)} for ids in (encode_prompt(tokenizer(), p) for p in prompts)]
    texts = [text.split("\n")[0].strip() for text in scoring.generate(made.model, tokenizer(), rows, 6)]
    right = [text if number % 2 else "zebra" for number, text in enumerate(texts)]
    assert all(texts)
    folder = task_file(
        tmp_path_factory.mktemp("tasks"),
        [{"prompt": prompt, "completion": answer} for prompt, answer in zip(prompts, right, strict=True)],
    )
    score = sum(scoring.exact_match(text, answer) for text, answer in zip(texts, right, strict=True)) / len(texts)
    return SimpleNamespace(folder=folder, score=score, prompts=prompts, texts=texts)


def test_generated_answers_score_as_our_own_generation_does(made, answered):
    found = run_harness(
        {"adapter": made.directory}, ["two_answers", "pedro_snips"], include_path=answered.folder, limit=ROWS
    )
    assert found["tasks"]["two_answers"]["exact_match,strict"] == answered.score == 0.5
    assert found["rows"] == {"two_answers": 12, "pedro_snips": ROWS}


def test_a_bare_backbone_scores_as_in_lm_evals_own_hugging_face_model():
    theirs = HFLM(pretrained=str(backbone().directory), add_bos_token=True, device="cpu", dtype="float32", batch_size=8)
    ours = LocalModel(backbone="stories260K")
    rows, choices = banking()
    pairs = [(row.prompt, f" {choice}") for row in rows[:3] for choice in choices] + [("", "Once upon a time")]
    scored = ask("loglikelihood", *pairs)
    for mine, other in zip(scored(ours), scored(theirs), strict=True):
        assert mine[0] == pytest.approx(other[0], rel=1e-5)
        assert mine[1] == other[1]
    told = ask("generate_until", *((row.prompt, {"until": ["."], "max_gen_toks": 12}) for row in rows[:3]))
    assert [text.strip() for text in told(ours)] == [text.strip() for text in told(theirs)]


def test_the_answer_does_not_condition_the_vectors(made, local):
    prompt, answer = "I lost my card", "a long answer of many words"
    row = encoded(prompt, answer)
    ids = torch.tensor([row["input_ids"]])

    def nats(conditioned):
        with torch.no_grad():
            logits = made.model(input_ids=ids, prompt_lens=torch.tensor([conditioned])).logits[0].log_softmax(-1)
        return sum(float(logits[at - 1, ids[0, at]]) for at in range(row["prompt_len"], ids.shape[1]))

    (found, _), *_ = ask("loglikelihood", (prompt, f" {answer}"))(local)
    assert found == pytest.approx(nats(row["prompt_len"]), rel=1e-5)
    assert abs(found - nats(ids.shape[1])) > 0.01


def test_the_greedy_answer_is_known_as_such(made, local):
    prompt = encode_prompt(tokenizer(), "I lost my card")
    with torch.no_grad():
        out = made.model.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=4, do_sample=False, eos_token_id=None
        )
    greedy = out[0].tolist()
    assert local.score([ScoringRequest(tuple(greedy), len(prompt))])[0][1]
    assert not local.score([ScoringRequest((*greedy[:-1], greedy[-1] ^ 1), len(prompt))])[0][1]


def test_a_text_alone_is_scored_once_a_token_however_long(made):
    model = LocalModel(backbone="stories260K")
    text = "Once upon a time, there was a little girl. " * 4
    ids = torch.tensor([encode_prompt(tokenizer(), text)])
    (found,) = ask("loglikelihood_rolling", (text,))(model)
    assert found == pytest.approx(-model.model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1), rel=1e-4)
    model.max_length, scored, score = 24, [], model.score
    model.score = lambda rows: scored.extend(rows) or score(rows)
    (cut,) = ask("loglikelihood_rolling", (text,))(model)
    assert [token for row in scored for token in row.ids[row.conditioning_length :]] == ids[0, 1:].tolist()
    assert max(len(row.ids) for row in scored) <= 24
    assert cut == pytest.approx(found, rel=0.2)
    assert LocalModel(adapter=made.directory).loglikelihood_rolling([]) == []


def test_a_prompt_that_is_too_long_loses_its_oldest_tokens_but_not_bos(local):
    kept = local._bounded(list(range(1, 700)), [7, 8])
    assert len(kept.ids) == local.max_length
    assert (kept.ids[0], kept.ids[1], kept.conditioning_length) == (local.bos, 191, 510)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [({"do_sample": True, "temperature": 0.8}, "greedily"), ({"num_beams": 3}, "num_beams"), ({"seed": 1}, "seed")],
)
def test_what_greedy_decoding_cannot_do_is_refused_by_name(arguments, named):
    with pytest.raises(ConfigError, match=named):
        generation_limits({"until": ["\n"], **arguments})


def test_limits_are_read_as_lm_eval_writes_them():
    assert generation_limits({"until": "\n", "max_tokens": 5, "temperature": 0.0, "top_p": 1.0}) == (("\n",), 5)
    assert generation_limits({}) == ((), 256)


def test_what_is_missing_or_wrong_is_said(made):
    with pytest.raises(ConfigError, match="adapter"):
        LocalModel()
    with pytest.raises(ConfigError, match="batch_size"):
        LocalModel(backbone="stories260K", batch_size="auto")
    with pytest.raises(ConfigError, match="joined or trained"):
        LocalModel(backbone="stories260K", answers="mine")


def test_over_http_the_likelihoods_are_those_in_process(local, endpoint):
    rows, choices = banking()
    pairs = [(row.prompt, f" {choice}") for row in rows[:3] for choice in choices] + [("", "Once upon a time")]
    scored = ask("loglikelihood", *pairs)
    for mine, other in zip(scored(endpoint), scored(local), strict=True):
        assert mine[0] == pytest.approx(other[0], abs=1e-3)
        assert mine[1] == other[1]
    long = "Once upon a time, there was a little girl. " * 30
    rolled = ask("loglikelihood_rolling", (long,))
    assert rolled(endpoint) == pytest.approx(rolled(local), rel=1e-4)


def test_over_http_two_tasks_score_as_ours_do(endpoint, answered, wanted):
    from lm_eval import simple_evaluate

    tasks = ["two_answers", "pedro_banking77"]
    manager = find_tasks(tasks, answered.folder)
    found = simple_evaluate(endpoint, tasks=tasks, task_manager=manager, limit=ROWS, bootstrap_iters=0)
    assert found["results"]["two_answers"]["exact_match,strict"] == answered.score
    assert found["results"]["pedro_banking77"]["acc,none"] == wanted


def test_over_http_messages_are_put_into_the_adapters_format(local, endpoint):
    messages = [{"role": "user", "content": "I lost my card"}]
    assert endpoint.apply_chat_template(messages) == local.apply_chat_template(messages) == "I lost my card"
    with pytest.raises(ConfigError, match="gen_prefix"):
        endpoint.apply_chat_template(messages, add_generation_prompt=False)


def test_the_server_refuses_what_it_does_not_know_and_the_reason_is_told(endpoint):
    base, key = str(endpoint._http.base_url), endpoint._http.headers["authorization"].removeprefix("Bearer ")
    with pytest.raises(ConfigError, match="404"):
        EndpointModel(model="acme.nothing", base_url=base, api_key=key)
    with pytest.raises(ConfigError, match="api_key"):
        EndpointModel(model="acme.faq", base_url=base)


def test_scores_are_those_of_lm_evals_own_steps_to_the_last_digit(made):
    from lm_eval import simple_evaluate

    tasks = ["pedro_banking77", "pedro_snips"]
    ours = run_harness({"adapter": made.directory}, tasks, limit=6, shots=2)
    model, manager = LocalModel(adapter=made.directory), find_tasks(tasks)
    theirs = simple_evaluate(model, tasks=tasks, task_manager=manager, limit=6, num_fewshot=2, bootstrap_iters=1000)
    for task in tasks:
        wanted = {name.removesuffix(",none"): value for name, value in theirs["results"][task].items()}
        assert ours["tasks"][task].items() <= wanted.items()
    assert ours["shots"] == theirs["n-shot"] == dict.fromkeys(tasks, 2)


def test_a_pattern_names_tasks_and_nothing_is_said_outside_a_checkout(made, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    found = run_harness({"adapter": made.directory}, ["pedro_s*"], limit=2)
    assert found["rows"] == {"pedro_snips": 2}
    assert "fatal" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("changes", "rows", "shots", "reason"),
    [
        ({}, None, None, "rows.json"),
        ({}, 0, None, ""),
        ({}, 3, 9, "ValueError"),
        ({'"{{prompt}}"': "!function nowhere.prompt"}, 3, None, "nowhere"),
        ({'"{{prompt}}"': "!function textwrap.nothing"}, 3, None, "nothing"),
        ({'"{{prompt}}"': "!function textwrap.dedent"}, 3, None, "TypeError"),
        ({"max_gen_toks: 6": "max_gen_toks: 0"}, 3, None, "max_gen_toks"),
    ],
    ids=["no-data", "no-rows", "too-many-shots", "no-module", "no-function", "failing-function", "no-tokens"],
)
def test_a_task_that_cannot_be_asked_is_told_in_one_line(made, tmp_path, changes, rows, shots, reason):
    written = task_file(tmp_path, [{"prompt": "a", "completion": "b"}] * (rows or 0)) / "two_answers.yaml"
    text = written.read_text() + "fewshot_split: test\n"
    for before, after in changes.items():
        assert before in text
        text = text.replace(before, after)
    written.write_text(text)
    if rows is None:
        (tmp_path / "rows.json").unlink()
    with pytest.raises(ConfigError) as caught:
        run_harness({"adapter": made.directory}, ["two_answers"], include_path=tmp_path, shots=shots)
    assert reason in caught.value.message
    assert "\n" not in caught.value.message


def test_examples_that_a_task_never_takes_are_refused(made, tmp_path):
    written = task_file(tmp_path, [{"prompt": "a", "completion": "b"}]) / "two_answers.yaml"
    written.write_text(written.read_text() + "num_fewshot: 0\n")
    with pytest.raises(ConfigError, match="shots: the task two_answers"):
        run_harness({"adapter": made.directory}, ["two_answers"], include_path=tmp_path, shots=3)


def test_a_task_file_does_not_take_the_name_of_one_of_ours(tmp_path):
    written = task_file(tmp_path, []) / "two_answers.yaml"
    written.write_text(written.read_text().replace("two_answers", "pedro_snips"))
    with pytest.raises(ConfigError, match=r"include_path: .*pedro_snips"):
        find_tasks(["pedro_snips"], tmp_path)


def test_a_metric_that_is_no_number_is_null_in_json():
    found = _metrics({"acc,none": float("nan"), "ppl,none": float("inf"), "acc_stderr,none": "N/A", "f1,none": 1})
    assert found == {"acc": None, "ppl": None, "acc_stderr": "N/A", "f1": 1.0}


@pytest.mark.parametrize("most", [0, -5, "x", "nan"])
def test_an_answer_of_no_possible_length_is_refused(most):
    with pytest.raises(ConfigError, match="max_gen_toks"):
        generation_limits({"max_gen_toks": most})


@pytest.mark.slow
def test_lm_evals_own_tasks_are_found_and_unknown_ones_named():
    assert find_tasks(["pedro_snips", "arc_easy"]).match_tasks(["arc_easy"]) == ["arc_easy"]
    with pytest.raises(ConfigError, match="no_such_task"):
        run_harness({"backbone": "stories260K"}, ["no_such_task"])


@pytest.mark.slow
def test_lm_evals_command_line_knows_our_models_and_tasks(made, endpoint, monkeypatch, capsys):
    base, key = str(endpoint._http.base_url), endpoint._http.headers["authorization"].removeprefix("Bearer ")
    monkeypatch.setenv("PEDRO_API_KEY", key)
    command = ["lm_eval", "--model", "pedro", "--model_args", f"base_url={base},model=acme.faq", "--limit", "4"]
    monkeypatch.setattr(sys, "argv", [*command, "--tasks", "pedro_banking77"])
    harness_main.main()
    assert "pedro_banking77" in capsys.readouterr().out


def test_pedro_eval_runs_the_harness_on_a_registered_adapter(made, monkeypatch):
    monkeypatch.setenv("PEDRO_HOME", str(made.settings.home))
    command = ["eval", "acme.faq", "--harness", "lm-eval", "--tasks", "pedro_banking77", "--rows", "6"]
    as_json = CliRunner().invoke(app, [*command, "--json"])
    assert as_json.exit_code == 0, as_json.output
    report = json.loads(as_json.stdout.strip().splitlines()[-1])
    assert report["model"] == "acme.faq:1"
    assert report["rows"] == {"pedro_banking77": 6}
    both = CliRunner().invoke(app, [*command, "--data", "rows.jsonl"])
    assert both.exit_code == 2
    other = CliRunner().invoke(app, ["eval", "acme.faq", "--harness", "helm", "--tasks", "x"])
    assert isinstance(other.exception, ConfigError)
    for words in (["--rows", "0"], ["--shots", "-1"], ["--include-path", str(made.settings.home / "nowhere")]):
        wrong = CliRunner().invoke(app, [*command[:-2], *words])
        assert wrong.exit_code == 2
        assert words[0] in wrong.stderr
