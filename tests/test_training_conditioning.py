"""`method.conditioning: system`, from the spec to the engine: the same head wherever an adapter is run."""

import json

import pytest
import torch
from engine_models import drain, request
from training_runs import LocalReporter, context_for, run, spec_for

from pedro.adapter_directory import read_manifest
from pedro.backbone import load_model
from pedro.data.prompt_format import PromptFormat, encode_prompt
from pedro.engine import Engine, EngineConfig
from pedro.errors import ConfigError, DataError
from pedro.evaluation.saved import load_saved, score_file
from pedro.evaluation.scoring import score
from pedro.methods.adapter_files import read_config
from pedro.training import worker
from pedro.training.estimate import dry_run

SYSTEMS = ("Say which colour it is.", "Answer with a colour, in one word.")
COLOURS = ("red", "blue", "green")


def write_chats(path, count=48, start=0):
    rows = [
        {
            "messages": [
                {"role": "system", "content": SYSTEMS[i % 2]},
                {"role": "user", "content": f"item {i} shade {i % 3}"},
                {"role": "assistant", "content": COLOURS[i % 3]},
            ]
        }
        for i in range(start, start + count)
    ]
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return path


def chat_spec(folder, method=None, **training):
    spec = spec_for(folder, {"name": "pedro", "conditioning": "system"} if method is None else method, **training)
    train = str(write_chats(folder / "chats.jsonl"))
    return spec.model_copy(update={"data": spec.data.model_copy(update={"train": train})})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The context of a short training, and the adapter that it saved."""
    folder = tmp_path_factory.mktemp("conditioned")
    context = context_for(chat_spec(folder, max_length=128, max_steps=20, eval_every=20), folder)
    done = worker.train_and_score(context, LocalReporter(folder / "run", log=lambda line: None))
    worker.save(context, done, folder / "adapter")
    return context, folder / "adapter"


def test_the_name_is_in_the_manifest_and_its_tokens_in_the_adapter_s_own_config_and_format(trained):
    context, directory = trained
    manifest, config = read_manifest(directory), read_config(directory)
    assert manifest["method"]["options"] == {"conditioning": "system"}
    assert config.conditioning == "system"
    assert tuple(manifest["prompt_format"]["head_end"]) == config.head_end == context.prepared.format.head_end


def test_training_conditions_on_the_head_that_the_template_writes(trained, tmp_path):
    """Logits, loss and generated answers are those of an adapter that is told each row's head by its length."""
    context, directory = trained
    manifest = read_manifest(directory)
    model = load_saved(directory, manifest, context.backbone, "float32", "cpu")
    told = load_saved(directory, manifest, context.backbone, "float32", "cpu")
    told.peft_config["default"].conditioning, told.peft_config["default"].head_end = "prompt", None
    form = PromptFormat.from_dict(manifest["prompt_format"])
    heads = {  # by what stands behind a system turn, whoever speaks
        text: len(encode_prompt(context.tokenizer, f"system: {text}\nuser:")) for text in SYSTEMS
    }
    rows = [context.data.train[place] for place in range(8)]
    for row in rows:
        prompt = row["input_ids"][: row["prompt_len"]]
        head = next(length for text, length in heads.items() if text in context.tokenizer.decode(prompt))
        assert head < len(prompt)
        ids = torch.tensor([row["input_ids"]])
        with torch.no_grad():
            wanted = told(ids, prompt_lens=torch.tensor([head])).logits
            torch.testing.assert_close(model(ids, prompt_lens=torch.tensor([len(prompt)])).logits, wanted)
            whole = told(ids, prompt_lens=torch.tensor([len(prompt)])).logits
        assert not torch.allclose(whole, wanted, atol=1e-3), "the rest of the prompt would have changed it"
    file = write_chats(tmp_path / "test.jsonl", 6, start=100)
    scored = score_file(directory, file, tmp_path / "cache")
    from pedro.data import load_rows

    encoded = list(load_rows(file, context.tokenizer, form, 512, tmp_path / "rows"))
    assert scored["loss"] == pytest.approx(score(model, context.tokenizer, encoded).loss, rel=1e-4)


def test_the_engine_answers_as_peft_and_reads_a_conversation_s_head_and_turns_once(trained):
    context, directory = trained
    form = context.prepared.format
    tuned = load_saved(directory, read_manifest(directory), context.backbone, "float32", "cpu")
    messages, found = [{"role": "system", "content": SYSTEMS[0]}], []
    engines = [
        Engine(
            load_model(context.backbone),
            context.tokenizer,
            EngineConfig(max_batch=2, prefix_bytes=size),
            lambda ref: directory,
            context.backbone.digest,
        )
        for size in (1 << 24, 0)
    ]
    for turn, said in enumerate(("item 7 shade 1", "and item 8 shade 2", "item 9 shade 0")):
        messages.append({"role": "user", "content": said})
        ids = encode_prompt(context.tokenizer, form.prompt(messages, context.tokenizer))
        answers = []
        for engine in engines:
            engine.add(request(f"turn {turn}", ids, 6, adapter="a", logprobs=0))
            answers.append(drain(engine)[f"turn {turn}"])
        cached, read = answers
        with torch.no_grad():
            logits = tuned(torch.tensor([[*ids, *read.token_ids]]), prompt_lens=torch.tensor([len(ids)])).logits[0]
        own = logits.log_softmax(-1)[len(ids) - 1 : -1]
        assert own.argmax(-1).tolist() == read.token_ids == cached.token_ids
        for answer in answers:
            for place, one in enumerate(answer.logprobs):
                assert one.logprob == pytest.approx(float(own[place, one.token_id]), abs=1e-4)
        found.append((cached.last.cached_tokens, len(ids)))
        messages.append({"role": "assistant", "content": context.tokenizer.decode(read.token_ids)})
    (first, length), (second, longer), (third, _) = found
    assert first == 0
    assert second > length - 32, "the head and the first turn, but for the rest of a block"
    assert third > longer - 32
    for engine in engines:
        engine.close()


def test_a_dry_run_counts_what_the_job_trains(tmp_path):
    plain = chat_spec(tmp_path, "pedro", max_length=128)
    conditioned = chat_spec(tmp_path, max_length=128)
    counted = [dry_run(spec, calibrated=False).trainable_parameters for spec in (plain, conditioned)]
    assert counted[0] == counted[1] == context_for(conditioned, tmp_path).trainable_parameters


def test_para_conditions_on_the_system_turn_too(tmp_path):
    context = context_for(
        chat_spec(tmp_path, {"name": "para", "conditioning": "system"}, max_length=128, max_steps=1), tmp_path
    )
    run(context, tmp_path / "run")
    assert context.model.peft_config["default"].head_end == context.prepared.format.head_end != ()


@pytest.mark.parametrize(
    ("method", "why"),
    [
        ({"name": "lora", "conditioning": "system"}, r"method\.conditioning: unknown option; .*lora takes"),
        ({"name": "pedro", "conditioning": "users"}, r"method\.conditioning: expected one of prompt, system"),
        (
            {"name": "pedro", "conditioning": "system", "head_end": [5]},
            r"method\.head_end: the chat prompt format ends",
        ),
    ],
)
def test_what_conditions_on_no_system_turn_is_refused_by_name(tmp_path, method, why):
    with pytest.raises(ConfigError, match=why):
        context_for(chat_spec(tmp_path, method, max_length=128), tmp_path)


def test_rows_that_have_no_system_turn_are_refused_before_anything_is_trained(tmp_path):
    spec = chat_spec(tmp_path, max_length=128)
    with pytest.raises(DataError, match=r"line 1: messages: the adapter is conditioned on the system turn"):
        context_for(spec_for(tmp_path, {"name": "pedro", "conditioning": "system"}), tmp_path)
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with open(spec.data.train, "a") as file:
        file.write(json.dumps({"messages": chat}) + "\n")
    for asked in (lambda: dry_run(spec, calibrated=False), lambda: context_for(spec, tmp_path)):
        with pytest.raises(DataError, match=r"line 49: messages: the adapter is conditioned on the system turn"):
            asked()


def test_a_config_that_names_the_system_turn_without_its_tokens_is_run_by_nobody(trained, tmp_path):
    """PEFT and the engine say so, rather than reading the whole prompt."""
    from methods_models import tokens, tuned

    model = tuned(conditioning="system")
    with pytest.raises(ConfigError, match=r"method\.head_end: conditioning: system needs the tokens"):
        model(tokens(1, 6), use_cache=True)
    from pedro.errors import AdapterError
    from pedro.methods.pedro.reader import read

    with pytest.raises(AdapterError, match="conditioning: system without head_end"):
        read(model.peft_config["default"], None, None)
