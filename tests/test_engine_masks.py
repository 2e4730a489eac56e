"""Answers whose tokens are held to a shape by a mask, beside answers that are not."""

import math
import random

import pytest
import torch
from engine_models import VOCABULARY, drain, make_adapter, make_engine, prompt, random_backbone, request, run

from pedro.engine import SamplingParams
from pedro.engine.sampler import SampleRow, sample
from pedro.engine.token_mask import allowed, likeliest
from pedro.errors import PedroError

WORDS = VOCABULARY // 32


def bits(*token_ids, words=WORDS):
    made = [0] * words
    for token in token_ids:
        made[token // 32] |= 1 << token % 32
    return torch.tensor([word - 2**32 if word >= 2**31 else word for word in made], dtype=torch.int32)


class Cycle:
    """Token i of an answer is one of `steps[i % len(steps)]`; it is whole after `length` tokens, if that is given.

    `breaks_at`: from this token on it cannot tell what may come next.
    """

    def __init__(self, steps, length=None, breaks_at=None):
        self.steps, self.length, self.breaks_at = steps, length, breaks_at
        self.taken = []

    def bits(self):
        if len(self.taken) == self.breaks_at:
            raise PedroError("structured_outputs: takes too much", code="shape_bounds")
        return bits(*self.steps[len(self.taken) % len(self.steps)])

    def lets(self, token_id):
        at = len(self.taken)
        return at != self.breaks_at and token_id in self.steps[at % len(self.steps)]

    def accept(self, token_id):
        assert token_id in self.steps[len(self.taken) % len(self.steps)]
        self.taken.append(token_id)
        return len(self.taken) == self.length


STEPS = [(3, 40, 95), (7, 31, 32, 63, 64), (8,)]


def keeps(token_ids, steps=STEPS):
    return all(token in steps[at % len(steps)] for at, token in enumerate(token_ids))


@pytest.fixture(scope="module")
def model():
    return random_backbone("llama")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("filters", [{}, {"top_k": 2}, {"top_p": 0.5}, {"min_p": 0.2}, {"logit_bias": {5: 100.0}}])
def test_only_what_the_mask_lets_through_is_chosen_and_the_model_decides_among_it(temperature, filters):
    torch.manual_seed(0)
    logits = torch.randn(64, VOCABULARY) * 5
    params = SamplingParams(temperature=temperature, **filters)
    rows = [SampleRow(params, seed, 0, [], [], mask=bits(0, 31, 33, 95)) for seed in range(64)]
    chosen = [one.token_id for one in sample(logits, rows)]
    assert set(chosen) <= {0, 31, 33, 95}
    if not temperature:
        left = logits[:, [0, 31, 33, 95]].argmax(-1).tolist()
        assert chosen == [[0, 31, 33, 95][at] for at in left]


def test_tokens_past_the_end_of_a_mask_cannot_be_chosen():
    logits = torch.zeros(1, VOCABULARY + 8)
    logits[0, VOCABULARY:] = 50.0
    row = SampleRow(SamplingParams(), 0, 0, [], [], mask=bits(4))
    assert sample(logits, [row])[0].token_id == 4


def test_logprobs_are_the_models_own_whatever_the_mask():
    logits = torch.randn(1, VOCABULARY)
    row = SampleRow(SamplingParams(logprobs=3), 0, 0, [], [], mask=bits(4))
    [one] = sample(logits, [row])
    assert one.logprob.logprob == pytest.approx(logits.log_softmax(-1)[0, 4].item())
    assert one.logprob.top[0][0] == logits[0].argmax().item()


def test_the_kernel_finds_the_likeliest_token_that_a_mask_lets_through():
    """Whatever the sizes, as masking all and taking the largest does."""
    rng = random.Random(5)
    for _ in range(120):
        vocabulary, words, rows = rng.randint(1, 150), rng.randint(1, 5), rng.randint(1, 4)
        logits = torch.randn(rows + 2, vocabulary).mul(2).round()  # so that some are equal
        masks = [
            bits(*(token for token in range(32 * words) if rng.random() < rng.choice([0.02, 0.5, 1])), words=words)
            for _ in range(rows)
        ]
        at = rng.sample(range(rows + 2), rows)
        if rng.random() < 0.3:
            logits[rng.choice(at), rng.randrange(vocabulary)] = rng.choice([math.nan, math.inf])
        found = likeliest(logits, at, masks, native=True)
        for row, mask, token, slow in zip(at, masks, found, likeliest(logits, at, masks), strict=True):
            let = allowed([mask], vocabulary, logits.device)[0].nonzero()[:, 0].tolist()
            if not let or not logits[row, let].isfinite().all():
                assert token == slow == -1
            else:
                assert token == max(let, key=lambda t: (logits[row, t], -t))
                assert logits[row, slow] == logits[row, token]


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_a_model_that_keeps_to_the_shape_by_itself_asks_for_no_mask(model, kernel):
    engine = make_engine(model, kernel=kernel)
    free = run(engine, request("free", prompt(5), 12))["free"].token_ids
    asked = []

    class Follows(Cycle):
        def bits(self):
            asked.append(len(self.taken))
            return super().bits()

    steps = [(token, (token + 1) % VOCABULARY) for token in free]
    steps[7] = ((free[7] + 1) % VOCABULARY,)  # the model would say something else here
    engine.add(request("other", prompt(6), 12))
    answer = run(engine, request("r", prompt(5), 8, new_mask=lambda: Follows(steps)))["r"]
    assert answer.token_ids == [*free[:7], (free[7] + 1) % VOCABULARY]
    assert asked == [7] or kernel == "torch"
    engine.close()


@pytest.mark.parametrize("kernel", ["torch", "auto"])
def test_masked_and_free_rows_of_one_batch_are_what_they_are_alone(model, tmp_path, kernel):
    for seed in (1, 2):
        make_adapter(model, tmp_path / f"a{seed}", seed)
    make_adapter(model, tmp_path / "a3", 3, method="lora")

    def requests():
        for number in range(8):
            masked = {"new_mask": lambda: Cycle(STEPS, 12)} if number % 2 else {}
            yield request(
                f"r{number}",
                prompt(5 + number, number),
                14,
                adapter=[None, "a1", "a2", "a3"][number // 2],
                temperature=[0.0, 1.0, 1.0, 0.0][number // 2],
                logprobs=2 if number % 3 == 0 else None,
                seed=number,
                **masked,
            )

    engine = make_engine(model, load=lambda ref: tmp_path / ref, max_batch=8, kernel=kernel)
    together = run(engine, *requests())
    for one in requests():
        alone = run(engine, one)[one.id]
        assert together[one.id].token_ids == alone.token_ids
        if one.new_mask is not None:
            assert keeps(alone.token_ids)
            assert (len(alone.token_ids), alone.last.finish_reason) == (12, "stop"), "whole, so it ends at once"
    engine.close()


def test_choices_of_one_request_have_masks_of_their_own_and_end_at_max_tokens(model):
    engine = make_engine(model)
    answers = run(engine, request("r", prompt(5), 7, n=3, temperature=1.0, seed=1, new_mask=lambda: Cycle(STEPS)))
    assert len(answers) == 3
    for answer in answers.values():
        assert keeps(answer.token_ids)
        assert (len(answer.token_ids), answer.last.finish_reason) == (7, "length")
    engine.close()


def test_a_resumed_answer_goes_on_where_its_mask_was(model):
    engine = make_engine(model)
    fields = {"temperature": 1.0, "seed": 4}
    whole = run(engine, request("r", prompt(5), 12, new_mask=lambda: Cycle(STEPS, 9), **fields))["r"]
    resumed = tuple(whole.token_ids[:4])
    rest = run(engine, request("s", prompt(5), 12, new_mask=lambda: Cycle(STEPS, 9), resumed_ids=resumed, **fields))
    assert [*resumed, *rest["s"].token_ids] == whole.token_ids
    assert rest["s"].last.finish_reason == "stop"
    engine.close()


def test_a_mask_that_fails_ends_its_own_answer_with_the_reason_and_no_other(model):
    engine = make_engine(model)
    free = run(engine, request("free", prompt(6), 10))["free"].token_ids
    engine.add(request("bad", prompt(5), 10, new_mask=lambda: Cycle(STEPS, breaks_at=3)))
    engine.add(request("first", prompt(5), 10, new_mask=lambda: Cycle(STEPS, breaks_at=0)))
    engine.add(request("good", prompt(5), 10, new_mask=lambda: Cycle(STEPS)))
    engine.add(request("free", prompt(6), 10))
    answers = drain(engine)
    assert [answers[name].last.error.code for name in ("bad", "first")] == ["shape_bounds"] * 2
    assert [len(answers[name].token_ids) for name in ("bad", "first", "good")] == [3, 0, 10]
    assert answers["free"].token_ids == free
    assert engine.stats()["slots_free"] == 4
    engine.close()


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"num_beams": 2}, "num_beams"), ({"min_tokens": 1}, "min_tokens"), ({"ignore_eos": True}, "ignore_eos")],
)
def test_what_a_mask_cannot_be_combined_with_is_refused_by_name(fields, param):
    with pytest.raises(PedroError) as caught:
        request("r", prompt(5), 8, new_mask=lambda: Cycle(STEPS), **fields)
    assert caught.value.param == param
