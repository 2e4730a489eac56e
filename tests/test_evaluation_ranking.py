"""Answers to one prompt: the prompt is read once for all of them, with the scores of every answer by itself."""

import pytest
import torch

from pedro.backbone import load_model, load_tokenizer, resolve_backbone
from pedro.data.prompt_format import encode_prompt, encode_text
from pedro.evaluation import ranking
from pedro.evaluation.ranking import PromptReader, likeliest, reads_once
from pedro.evaluation.scoring import answer_logprobs, generate
from pedro.methods import get_method

HEAD = "Sentences of a story for children, and how each of them goes on, in the words of the story.\n"
PROMPTS = [f"{HEAD}{text}" for text in ("Once upon a time", "The big red dog went to the park and", "Lily", "One day")]
ANSWERS = (" there was a girl", " x", ",", " there was a girl", " zebra zebra zebra zebra")
OPTIONS = {"lpt": {"tokens": 4, "r": 8}, "p-tuning-v2": {"tokens": 4}}


@pytest.fixture(scope="module")
def bare():
    torch.set_num_threads(1)
    found = resolve_backbone("stories260K")
    return load_model(found), load_tokenizer(found)


def tuned(name):
    """A method on a backbone of its own, with random numbers for all that it learns."""
    torch.manual_seed(1)
    found = resolve_backbone("stories260K")
    options = OPTIONS.get(name, {})
    if name == "alora":
        name, tokens = "peft", encode_text(load_tokenizer(found), " of a story")
        options = {"peft_type": "LORA", "target_modules": ["q_proj"], "alora_invocation_tokens": tokens}
    model = get_method(name).apply(load_model(found), options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def rows_of(tokenizer, prompts=tuple(PROMPTS), answers=ANSWERS):
    rows = []
    for prompt in prompts:
        before = encode_prompt(tokenizer, prompt)
        rows += [{"input_ids": [*before, *encode_text(tokenizer, text)], "prompt_len": len(before)} for text in answers]
    return rows


@pytest.mark.parametrize("name", ["pedro", "para", "lora", "ia3", "bitfit", "houlsby", "lpt", "p-tuning-v2", "alora"])
def test_an_adapters_answers_score_as_if_each_read_the_prompt_itself(bare, name):
    """The vectors of a prompt-dependent method come of the prompt alone, so its answers can share them."""
    model, tokenizer = tuned(name), bare[1]
    rows = rows_of(tokenizer)
    shared = answer_logprobs(model, tokenizer, rows)
    apart = answer_logprobs(model, tokenizer, rows, shared=False)
    assert [nats for nats, _ in shared] == pytest.approx([nats for nats, _ in apart], rel=1e-4, abs=1e-3)
    assert [greedy for _, greedy in shared] == [greedy for _, greedy in apart]
    assert reads_once(model) == (name not in ("p-tuning-v2", "alora"))


def test_prompts_that_begin_alike_score_as_if_each_was_the_first(bare):
    model, tokenizer = bare
    reader = PromptReader(model)
    answers = [encode_text(tokenizer, text) for text in ANSWERS]
    prompts = [encode_prompt(tokenizer, text) for text in [*PROMPTS, "Tim", PROMPTS[0], PROMPTS[0]]]
    for prompt in prompts:
        nats = [nats for nats, _ in reader.scores(prompt, answers)]
        assert nats == pytest.approx([nats for nats, _ in PromptReader(model).scores(prompt, answers)], abs=1e-3)


def test_a_beginning_is_read_once_unless_vectors_are_made_of_what_follows(bare):
    model, tokenizer = bare
    first, second = (encode_prompt(tokenizer, text) for text in PROMPTS[:2])
    shared = next(place for place, (one, other) in enumerate(zip(first, second, strict=False)) if one != other)
    once = len(second) - shared
    for subject, expected in ((model, once), (tuned("lora"), once), (tuned("pedro"), len(second))):
        reader, seen = PromptReader(subject), []
        handle = subject.get_input_embeddings().register_forward_hook(lambda _, ids, __, seen=seen: seen.append(ids[0]))
        reader.read(first)
        reader.read(second)
        handle.remove()
        assert seen[-1].shape[1] == expected


def test_many_answers_are_scored_in_parts(bare, monkeypatch):
    model, tokenizer = bare
    rows = rows_of(tokenizer, PROMPTS[:1])
    whole = answer_logprobs(model, tokenizer, rows)
    monkeypatch.setattr(ranking, "MOST_TOKENS", 1)
    assert [nats for nats, _ in answer_logprobs(model, tokenizer, rows)] == pytest.approx(
        [n for n, _ in whole], abs=1e-3
    )


def test_the_likeliest_is_taken_as_a_whole_or_for_each_unit_of_its_length(bare):
    model, tokenizer = bare
    prompt = encode_prompt(tokenizer, "Once upon a")
    answers = [encode_text(tokenizer, text) for text in (" time", " zebra zebra")]
    (one, _), (other, _) = PromptReader(model).scores(prompt, answers)
    assert one > other
    assert likeliest(PromptReader(model), prompt, answers) == 0
    assert likeliest(PromptReader(model), prompt, answers, [1, 10_000]) == 1


@pytest.mark.parametrize("name", ["", "lora"])
def test_answers_to_prompts_that_begin_alike_are_generated_as_if_each_stood_alone(bare, name):
    model, tokenizer = tuned(name) if name else bare[0], bare[1]
    rows = rows_of(tokenizer, answers=(" x",))
    together = generate(model, tokenizer, rows, 12, batch_size=3)
    assert together == [generate(model, tokenizer, [row], 12)[0] for row in rows]
    assert len(set(together)) > 1
    stopped = generate(model, tokenizer, rows, 12, stops=(".",))
    assert all(text.partition(".")[0] == whole.partition(".")[0] for text, whole in zip(stopped, together, strict=True))
