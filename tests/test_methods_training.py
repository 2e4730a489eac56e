"""Every method learns through the one loop: 32 rows overfitted, runs resumed, and what is saved afterwards."""

import pytest
import torch
from methods_models import VOCABULARY, tiny_backbone
from training_runs import LocalReporter, context_for, parameters, run, same, spec_for

from pedro.adapter_directory import read_manifest
from pedro.errors import ConfigError
from pedro.evaluation.saved import load_saved
from pedro.methods import METHODS, get_method
from pedro.methods.sparse_search import balance, choose
from pedro.training.batches import tensors
from pedro.training.bilevel import Alternation, GroupedAdamW
from pedro.training.context import build_context
from pedro.training.engines import TorchEngine
from pedro.training.loop import Data, TrainingPlan, train
from pedro.training.spec import MethodSpec
from pedro.training.worker import save, train_and_score

SHAPE_CHANGING = ["adalora", "ssp"]
WIDER = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 3}
OPTIONS = {
    "p-tuning-v2": {"tokens": 16},
    "lpt": {"tokens": 8, "r": 32},
    "ssp": {"search": 0.3},
    "lora-dash": {"launch": 10},
    "lorta": {"r": 16},
    "gift": {"targets": ["q", "v", "up", "down"]},
    "ether": {"targets": ["q", "v", "up", "down"]},
    "ether-plus": {"targets": ["q", "v", "up", "down"]},
    "loretta": {"r": 16},
    "peft": {"peft_type": "VERA", "r": 16, "d_initial": 1.0},
}
LONGER = ("red", "peft", "lorta", "ether", "ether-plus")
RATES = {"red": 0.1, "ia3": 0.2, "bitfit": 0.1, "p-tuning-v2": 0.2, "peft": 0.1, "adalora": 0.05, "full": 0.003}


class Silent:
    """A reporter of a run that nobody watches."""

    def resume(self, engine, group):
        return None

    def checkpoint(self, engine, group, state, best):
        pass

    def metrics(self, step, values):
        pass

    def line(self, text):
        pass


def by_heart(count: int = 32) -> list[dict]:
    """Distinct prompts of 4 to 6 tokens; the answer is whether the last one is odd."""
    generator = torch.Generator().manual_seed(5)
    rows = []
    for i in range(count):
        prompt = torch.randint(8, VOCABULARY, (4 + i % 3,), generator=generator).tolist()
        rows.append({"input_ids": [*prompt, 3 + prompt[-1] % 2, 2], "prompt_len": len(prompt)})
    return rows


def train_on(name: str, rows: list[dict], steps: int, options: dict | None = None):
    """A method on a tiny random backbone, through the loop on plain torch."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    method, options = get_method(name), OPTIONS.get(name, {}) if options is None else options
    model = method.apply(tiny_backbone(**WIDER), options)
    omega, theta = method.parameter_groups(model)
    optimizer, rate = GroupedAdamW(omega, theta), RATES.get(name, 0.02)
    plan = TrainingPlan(
        steps=steps,
        batch_size=len(rows),
        accumulation=1,
        lr=rate,
        theta_lr=rate,
        warmup=0.06,
        bilevel=False,
        theta_every=1,
        validate_every=10**6,
        checkpoint_every=10**6,
        patience=10,
        seed=0,
    )
    engine = TorchEngine(model, optimizer, [*omega, *theta], accumulation=1, clip=1.0)
    engine.hook = method.training_hook(model, options, steps)
    outcome = train(engine, Alternation(optimizer, omega, theta), plan, Data(rows, [], [], pad_id=0), Silent())
    return model.eval(), outcome


@torch.no_grad()
def recalled(model, rows: list[dict]) -> float:
    """Share of rows whose first answer token is the most likely one after the prompt alone."""
    prompts = [{**row, "input_ids": row["input_ids"][: row["prompt_len"]]} for row in rows]
    batch = tensors(prompts, pad_id=0, device="cpu", filler=prompts[0])
    lens = batch["prompt_lens"]
    del batch["labels"]
    predicted = model(**batch).logits[torch.arange(len(rows)), lens - 1].argmax(dim=1).tolist()
    hits = [token == row["input_ids"][row["prompt_len"]] for token, row in zip(predicted, rows, strict=True)]
    return sum(hits) / len(hits)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_learns_32_rows_by_heart(name):
    rows = by_heart()
    model, _ = train_on(name, rows, steps=60 if name in LONGER else 40)
    assert recalled(model, rows) >= 0.9


class Interrupted(Exception):
    """Stands for a worker that is killed."""


class DiesAfterCheckpoint(LocalReporter):
    """A worker that is gone as soon as the checkpoint of `step` is on disk."""

    def __init__(self, directory, step):
        super().__init__(directory, log=lambda line: None)
        self.step = step

    def checkpoint(self, engine, group, state, best):
        super().checkpoint(engine, group, state, best)
        if state.step == self.step:
            raise Interrupted


@pytest.mark.parametrize("method", [*SHAPE_CHANGING, {"name": "lora-dash", "launch": 4}])
def test_a_method_that_changes_its_shape_resumes_with_the_same_bits_before_and_after_the_change(tmp_path, method):
    spec = spec_for(tmp_path, method, max_steps=8, eval_every=2, checkpoint_every=1)
    whole = context_for(spec, tmp_path)
    outcome = run(whole, tmp_path / "whole")
    for died in (3, 6):
        broken = context_for(spec, tmp_path)
        with pytest.raises(Interrupted):
            train(
                broken.engine, broken.alternation, broken.plan, broken.data, DiesAfterCheckpoint(tmp_path / "run", died)
            )
    resumed = context_for(spec, tmp_path)
    again = run(resumed, tmp_path / "run")
    assert same(parameters(resumed), parameters(whole))
    assert resumed.engine.hook.kept() == whole.engine.hook.kept()
    assert again.validations == outcome.validations
    assert again.best_step >= 4  # no step before the change may be the best one


@pytest.mark.parametrize("name", [*SHAPE_CHANGING, "p-tuning-v2", "lpt", "learned-adapter", "full"])
def test_what_is_saved_answers_as_what_was_trained(tmp_path, name):
    method = {"name": name, **({"r": 16, "tokens": 4} if name == "lpt" else {})}
    context = context_for(spec_for(tmp_path, method, max_steps=6), tmp_path)
    trained = train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    save(context, trained, tmp_path / "adapter")
    manifest = read_manifest(tmp_path / "adapter")
    again = load_saved(tmp_path / "adapter", manifest, context.backbone, "float32", "cpu")
    batch = tensors(list(context.data.validation), context.data.pad_id, "cpu", {})
    del batch["labels"]
    with torch.no_grad():
        torch.testing.assert_close(again(**batch).logits, context.model.eval()(**batch).logits, atol=3e-5, rtol=1e-5)
    if name in SHAPE_CHANGING:
        saved = sum(p.numel() for n, p in again.named_parameters() if "lora_" in n or "sparse_search" in n)
        assert manifest["kept_parameters"] == saved < 0.6 * manifest["trainable_parameters"]


def test_adalora_prunes_half_of_its_ranks_where_they_matter_least():
    model, _ = train_on("adalora", by_heart(), steps=12)
    pattern = model.peft_config["default"].rank_pattern
    ranks = [sum(kept) for kept in pattern.values()]
    assert sum(ranks) == 4 * len(ranks)
    assert len(set(ranks)) > 1
    values = dict(model.base_model.model.named_parameters())
    for name, kept in pattern.items():
        assert ((values[name].flatten() != 0) <= torch.tensor(kept)).all()


@torch.no_grad()
def test_adalora_is_drawn_to_orthogonality():
    distances = []
    for weight in (0.0, 5.0):
        with torch.enable_grad():
            model, _ = train_on("adalora", by_heart(), steps=12, options={"orthogonality": weight})
        squares = [
            p @ p.T if "lora_A" in name else p.T @ p
            for name, p in model.named_parameters()
            if "lora_A" in name or "lora_B" in name
        ]
        distances.append(sum(float((square - torch.eye(len(square))).norm()) for square in squares))
    assert distances[1] < 0.9 * distances[0]


def test_the_search_keeps_its_budget_and_only_theta_steps_move_the_gates(tmp_path):
    context = context_for(spec_for(tmp_path, {"name": "ssp", "budget": 0.3}, max_steps=8), tmp_path)
    gates = [name for name, _ in context.engine.parameters if "gates" in name]
    assert context.plan.bilevel
    assert [n for n, _ in context.method.parameter_groups(context.model)[1]] == gates
    run(context, tmp_path / "run")
    config = context.model.peft_config["default"]
    left = sum(p.numel() for n, p in context.model.named_parameters() if "sparse_search" in n)
    assert 0.25 * context.trainable_parameters < left <= 0.3 * context.trainable_parameters
    assert not [name for name, _ in context.model.named_parameters() if "gates" in name]
    assert {name.split(".")[1] for name in config.kept} <= {"lora", "shift"}


def test_gates_are_balanced_to_the_budget_and_the_most_open_ones_that_fit_are_kept():
    logits, sizes = torch.tensor([2.0, 1.0, 0.0, -1.0]), torch.tensor([10, 50, 30, 10])
    for budget in (0.1, 0.5, 0.9):
        opened = (logits - balance(logits, sizes, budget)).sigmoid()
        assert float((opened * sizes).sum()) == pytest.approx(100 * budget, rel=1e-4)
    assert choose(logits, sizes, 0.5).tolist() == [True, False, True, True]
    assert choose(logits, sizes, 1.0).all()
    assert choose(logits, sizes, 0.01).tolist() == [True, False, False, False]


def test_too_short_a_run_and_sharded_parameters_are_refused_before_training(tmp_path):
    with pytest.raises(ConfigError, match=r"training\.max_steps: AdaLoRA needs at least 4 steps to prune in, got 2"):
        context_for(spec_for(tmp_path, "adalora", max_steps=2), tmp_path)
    model = get_method("peft").apply(tiny_backbone(), {"peft_type": "ADALORA", "tinit": 5, "tfinal": 4})
    with pytest.raises(ConfigError, match=r"method\.tinit: tinit 5 and tfinal 4 leave none of the 8 steps"):
        get_method("peft").training_hook(model, {}, steps=8)
    spec = spec_for(tmp_path, "ssp", resources={"workers": 1, "zero_stage": 1})
    plain = spec_for(tmp_path, "ssp")
    context = context_for(plain, tmp_path)
    with pytest.raises(ConfigError, match=r"resources\.zero_stage: ssp changes parameters between steps"):
        build_context(spec, tmp_path / "cache", lambda model, optimizer, named: context.engine)


def test_a_peft_type_alone_names_the_method(tmp_path):
    spec = MethodSpec.model_validate({"peft_type": "VERA", "r": 4})
    assert (spec.name, spec.options) == ("peft", {"peft_type": "VERA", "r": 4})
    assert MethodSpec.model_validate(spec.model_dump()) == spec
    context = context_for(spec_for(tmp_path, {"peft_type": "VERA", "r": 4}), tmp_path)
    assert context.model.peft_config["default"].peft_type.value == "VERA"
    before = parameters(context)
    run(context, tmp_path / "run")
    assert not same(before, parameters(context))
    assert context.method.name == "peft"


def test_the_learned_adapters_mixture_is_what_theta_steps_train(tmp_path):
    context = context_for(spec_for(tmp_path, "learned-adapter"), tmp_path)
    theta = [name for name, _ in context.method.parameter_groups(context.model)[1]]
    assert len(theta) == 5
    assert all("bottleneck_mix" in name for name in theta)
    run(context, tmp_path / "run")
    mixes = [p for n, p in context.model.named_parameters() if "bottleneck_mix" in n]
    assert all(p.abs().sum() > 0 for p in mixes)
