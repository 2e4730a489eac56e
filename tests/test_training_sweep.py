"""Sweeps: what a space may say, what is refused before anything starts, and what a killed one need not do again."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from pydantic import ValidationError
from store_moves import stub_version
from training_runs import WIDTHS, LocalReporter, context_for, spec_for, sweep_for
from typer.testing import CliRunner

from pedro.cli import app
from pedro.config import Settings
from pedro.errors import ConfigError, ConflictError, NotFoundError
from pedro.registry import MANIFEST
from pedro.search_space import Dimension, drawn, every
from pedro.store import Store
from pedro.training.sweep import launch
from pedro.training.sweep.planner import make_planner
from pedro.training.sweep.records import Records, TrialOutcome, TrialState, recall
from pedro.training.sweep.report import progress_table, rows_of, write_sweep_report
from pedro.training.sweep.spec import SweepSpec, load_sweep_spec
from pedro.training.sweep.tracker import TrialTracker
from pedro.training.sweep.variants import check_sweep, planned_trials, variant

CONFIGS = Path(__file__).parents[1] / "jobs" / "configs"
SHIPPED = sorted(CONFIGS.glob("*sweep*.yaml"))


class Runs:
    """Stands in for the tracking store: which runs there are, under which, and how they ended."""

    def __init__(self):
        self.parents, self.status = {}, {}

    def start_run(self, *, experiment, name, params, tags, parent=None):
        self.parents[name] = parent
        return name

    def tag_run(self, run_id, tags):
        pass

    def finish_run(self, run_id, status="FINISHED"):
        self.status[run_id] = status


def begin(folder, spec, runs=None):
    """A new sweep's tracker, or that of another driver for the sweep in `folder`."""
    records = Records(str(folder / "storage"), "sweep-1")
    return TrialTracker(records, spec, make_planner(spec, records.trials()), runs or Runs(), "parent")


def finish(tracker, trial, loss, **metrics):
    outcome = TrialOutcome(
        TrialState.FINISHED, trial.attempt, metrics={"validation_loss": loss, **metrics}, seconds=1.0
    )
    tracker.records.write_outcome(trial.number, outcome)
    return tracker.ended(trial.number)


# Spaces


def test_draws_lie_in_their_ranges_differ_and_follow_the_seed():
    space = {
        "lr": Dimension.model_validate({"loguniform": ["1e-4", 1e-1]}),
        "warmup": Dimension.model_validate({"uniform": [0, 0.2]}),
        "batch": Dimension.model_validate({"randint": [2, 4]}),
        "r": Dimension.model_validate({"choice": [3, 6]}),
        "pool": Dimension.model_validate({"grid": ["last", "max"]}),
    }
    trials = drawn(space, 50, seed=1)
    assert trials == drawn(space, 50, seed=1) != drawn(space, 50, seed=2)
    assert len(trials) == 100
    assert len({json.dumps(trial) for trial in trials}) == 100
    assert all(1e-4 <= t["lr"] <= 1e-1 and 0 <= t["warmup"] <= 0.2 for t in trials)
    assert {t["batch"] for t in trials} == {2, 3, 4}
    assert {(t["r"], t["pool"]) for t in trials} == {(r, pool) for r in (3, 6) for pool in ("last", "max")}
    middle = sum(t["lr"] < 10**-2.5 for t in trials)
    assert 25 < middle < 75, "half of a loguniform lies below its geometric mean"


def test_a_grid_is_every_combination_in_the_order_of_the_file(tmp_path):
    spec = sweep_for(tmp_path, {"method.r": {"grid": [2, 3]}, "method.orders": {"choice": [[6, 5], [2, 1]]}})
    spec = spec.model_copy(update={"search": spec.search.model_copy(update={"algorithm": "grid"})})
    assert [tuple(map(str, trial.values())) for trial in planned_trials(spec)] == [
        ("2", "[6, 5]"),
        ("2", "[2, 1]"),
        ("3", "[6, 5]"),
        ("3", "[2, 1]"),
    ]
    with pytest.raises(ConfigError, match=r"space.lr: a uniform has no list of values"):
        every({"lr": Dimension.model_validate({"uniform": [0, 1]})})


def test_more_draws_than_a_space_holds_are_refused(tmp_path):
    spec = sweep_for(tmp_path, {"method.r": {"choice": [2, 3]}}, search={"trials": 5})
    with pytest.raises(ConfigError, match=r"search.trials: 5 different trials .* about 2"):
        planned_trials(spec)


def test_parameters_go_into_the_job_and_nothing_else_changes(tmp_path):
    spec = sweep_for(tmp_path, {"method.orders": {"grid": [[2, 1]]}, "training.lr": {"grid": ["3e-3"]}})
    (parameters,) = planned_trials(spec)
    job = variant(spec, parameters)
    assert job.method.options == {"orders": [2, 1]}
    assert job.training.lr == 3e-3
    assert job.training == spec.base.training.model_copy(update={"lr": 3e-3})
    assert (job.data, job.gate, job.resources) == (spec.base.data, spec.base.gate, spec.base.resources)


# What is refused before anything starts


def test_unknown_keys_and_bad_values_of_the_job_are_named_all_at_once(tmp_path):
    space = {
        "training.lrr": {"grid": [1e-3]},
        "training.lr": {"uniform": [-1, 1]},
        "method.orders": {"grid": [[6, 5], [0, 3]]},
        "method.rank": {"grid": [3]},
        "trainig.seed": {"grid": [1]},
    }
    with pytest.raises(ConfigError) as caught:
        check_sweep(sweep_for(tmp_path, space, search={"trials": 2}))
    for piece in (
        "space.training.lrr: training.lrr: unknown key; did you mean 'lr'?",
        "space.training.lr: training.lr: expected",
        "space.method.orders: method.orders: expected two whole numbers",
        "space.method.rank: method.rank: unknown option",
        "space.trainig.seed: trainig: unknown key; did you mean 'training'?",
    ):
        assert piece in caught.value.message, caught.value.message


def test_a_combination_that_no_job_can_take_is_found(tmp_path):
    space = {"training.batch_size": {"grid": [2, 8]}, "training.gradient_accumulation": {"grid": [1, 4]}}
    with pytest.raises(ConfigError, match=r"raise batch_size to at least 4"):
        check_sweep(sweep_for(tmp_path, space))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"space": {"training.lr": {"logunifrom": [1e-4, 1e-1]}}}, "'logunifrom' is not a kind of search space"),
        ({"space": {"training.lr": [1e-4, 1e-1]}}, "expected one of grid, choice, uniform, loguniform, randint"),
        ({"space": {"training.lr": {"loguniform": [0, 1]}}}, "loguniform: the lowest value must be more than 0"),
        ({"space": {"method.r": {"randint": [2.5, 4]}}}, "two whole numbers"),
        ({"space": {"method.r": {"grid": [2, 2]}}}, "a value appears twice"),
        ({"space": {"adapter": {"grid": ["a", "b"]}}}, "a sweep trains versions of one adapter"),
        ({"space": {"data.train": {"grid": ["a.jsonl"]}}}, "trials are compared on the same rows"),
        ({"space": {}}, "at least 1"),
        ({"search": {"algorithm": "optuna"}}, "give a choice instead of a grid"),
        ({"search": {"trials": 4}}, "the space has grids alone"),
        ({"search": {"algorithm": "bayes"}}, "search.algorithm"),
        ({"scheduler": {"grace": 3}}, "scheduler.grace: unknown key; did you mean 'grace_steps'?"),
        ({"base": {"data": {"validation": 0}}}, "trials are compared by their loss on it"),
        ({"base": {"training": {"lr": -1}}}, "base.training.lr: expected"),
        ({"base": {"training": {"eval_every": 0}}}, "scheduler.grace_steps: required"),
    ],
)
def test_a_mistake_in_the_spec_is_told_with_its_key(tmp_path, changes, told):
    tree = {"name": "widths", "base": spec_for(tmp_path).to_dict(), "space": WIDTHS}
    for key, value in changes.pop("base", {}).items():
        tree["base"][key] |= value
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({**tree, **changes}))
    with pytest.raises(ConfigError) as caught:
        load_sweep_spec(path)
    assert told in caught.value.message


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_every_shipped_sweep_loads_finds_its_data_and_checks(path):
    spec = load_sweep_spec(path)
    check_sweep(spec)
    assert all(Path(file).is_file() for file in spec.base.data.files().values())
    assert spec.base.backbone == ("stories260K" if path.name.startswith("nano") else "meta-llama/Llama-2-7b-hf")


def test_the_shipped_sweeps_are_those_of_the_design():
    widths = {name: planned_trials(load_sweep_spec(CONFIGS / name)) for name in ("sweep_r.yaml", "nano_sweep_r.yaml")}
    assert [trial["method.r"] for trial in widths["sweep_r.yaml"]] == [3, 6, 12, 24, 48, 96, 192]
    assert [trial["method.r"] for trial in widths["nano_sweep_r.yaml"]] == [2, 3, 6, 12, 24, 48]
    assert [6, 5] in [
        trial["method.orders"] for trial in planned_trials(load_sweep_spec(CONFIGS / "sweep_orders.yaml"))
    ]
    assert make_planner(load_sweep_spec(CONFIGS / "nano_sweep_orders.yaml"), []).total == 8


# What a kill must not lose


def test_another_driver_begins_only_what_has_not_ended(tmp_path):
    spec, runs = sweep_for(tmp_path, {"method.r": {"grid": [2, 3, 6, 12, 24, 48]}}), Runs()
    tracker = begin(tmp_path, spec, runs)
    trials = [tracker.next() for _ in range(5)]
    finish(tracker, trials[0], 0.5)
    tracker.records.write_outcome(1, TrialOutcome(TrialState.FAILED, 1, "the loss is nan"))
    tracker.ended(1)
    tracker.report(2, step=3, steps=6, loss=0.9)
    tracker.ended(2)  # no words of its own: the scheduler stopped it
    tracker.ended(3, broke="its process died")
    tracker.report(4, step=3, steps=6, loss=0.7)
    tracker.records.write_outcome(0, tracker.trials[0].outcome)

    again = begin(tmp_path, spec, runs)
    assert [t.state.value for t in again.trials] == ["finished", "failed", "stopped", "lost", "running"]
    assert (again.kept, again.waiting) == (3, 3)
    resumed = [again.next() for _ in range(3)]
    assert again.next() is None
    assert [t.number for t in resumed] == [3, 4, 5]
    assert resumed[0].job_id("s") == "s-trial-003-2", "a lost trial starts anew"
    assert resumed[1].job_id("s") == "s-trial-004", "an interrupted one goes on from its checkpoint"
    assert resumed[1].reports == ((3, 0.7),)
    assert [t.parameters["method.r"] for t in again.trials] == [2, 3, 6, 12, 24, 48]
    assert len(runs.parents) == 6, "a trial keeps its run"
    assert set(runs.parents.values()) == {"parent"}
    assert [runs.status[t.run_id] for t in again.trials[:4]] == ["FINISHED", "FAILED", "KILLED", "FAILED"]


def test_a_trial_that_ended_while_its_driver_was_dead_is_not_run_again(tmp_path):
    spec = sweep_for(tmp_path)
    tracker = begin(tmp_path, spec)
    trial = tracker.next()
    tracker.records.write_outcome(
        0, TrialOutcome(TrialState.FINISHED, 1, metrics={"validation_loss": 0.25})
    )  # after the kill
    runs = Runs()
    again = begin(tmp_path, spec, runs)
    assert (again.kept, again.best.number, again.best.loss) == (1, 0, 0.25)
    assert runs.status[trial.run_id] == "FINISHED"
    assert [again.next().number, again.next().number, again.next()] == [1, 2, None]


def test_the_words_of_an_attempt_before_do_not_end_the_next_one(tmp_path):
    spec = sweep_for(tmp_path)
    tracker = begin(tmp_path, spec)
    tracker.next()
    tracker.records.write_outcome(0, TrialOutcome(TrialState.LOST, 1, "the disk was full"))
    again = begin(tmp_path, spec)
    assert again.next().attempt == 2
    assert begin(tmp_path, spec).trials[0].state is TrialState.RUNNING


def test_the_best_is_the_finished_trial_of_least_validation_loss(tmp_path):
    tracker = begin(tmp_path, sweep_for(tmp_path))
    trials = [tracker.next() for _ in range(3)]
    assert tracker.best is None
    finish(tracker, trials[0], 0.6, accuracy=0.99)
    tracker.report(1, step=3, steps=6, loss=0.1)
    tracker.ended(1)
    finish(tracker, trials[2], 0.5, accuracy=0.90)
    assert tracker.best.number == 2


def test_a_sweep_is_found_again_by_its_spec_and_its_data(tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    spec = sweep_for(tmp_path)
    store = Store(settings.database_url)
    with pytest.raises(NotFoundError, match=r"--resume: no sweep of exactly this spec"):
        launch.resume(spec, settings, store)
    store.close()
    record = launch.create(spec, settings)
    assert recall(settings.storage, launch.staged(spec, settings)) == record.id
    assert Records(settings.storage, record.id).spec() == launch.staged(spec, settings)
    other = spec.model_copy(update={"concurrency": 1})
    assert recall(settings.storage, launch.staged(other, settings)) is None
    with Path(spec.base.data.train).open("a") as stream:
        stream.write('{"prompt": "more", "completion": "rows"}\n')
    assert recall(settings.storage, launch.staged(spec, settings)) is None


def test_a_sweep_goes_on_from_one_version_with_its_method_and_is_found_by_what_it_was_given(tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    store, trained = Store(settings.database_url), {"name": "lora", "r": 4}
    for number in (1, 2):
        version = replace(stub_version(number, "acme.colours"), spec={"method": trained})
        store.add_version(version, store.made_of("acme.colours"))
    store.promote("acme.colours", 1)
    spec = sweep_for(tmp_path, {"training.lr": {"grid": [1e-3, 1e-2]}})
    base = {name: value for name, value in spec.base.to_dict().items() if name != "method"}
    spec = SweepSpec.model_validate({**spec.to_dict(), "base": {**base, "parent": "acme.colours"}})
    record = launch.create(spec, settings)
    store.promote("acme.colours", 2)
    for parameters in planned_trials(spec):
        job = variant(Records(settings.storage, record.id).spec(), parameters)
        assert (job.parent, job.method.name, job.method.options) == ("acme.colours:1", "lora", {"r": 4})
    assert recall(settings.storage, launch.staged(spec, settings)) == record.id
    other = spec.model_copy(update={"base": spec.base.model_copy(update={"parent": "globex.voice"})})
    with pytest.raises(NotFoundError, match="parent"):
        launch.create(other, settings)
    store.close()
    with pytest.raises(ValidationError, match=r"space\.method\.r: cannot vary: trials continue base\.parent"):
        SweepSpec.model_validate({**spec.to_dict(), "space": WIDTHS})


def test_no_sweep_begins_while_its_tenant_is_being_erased(tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    spec = sweep_for(tmp_path)
    store = Store(settings.database_url)
    store.begin_erasure(spec.base.tenant)
    with pytest.raises(ConflictError, match="is being erased"):
        launch.create(spec, settings)
    assert not (Path(settings.storage) / "sweeps").exists()
    store.end_erasure(spec.base.tenant, "erased-1", {})
    store.close()
    assert launch.create(spec, settings)


def test_a_sweep_from_before_the_later_fields_is_found(tmp_path):
    settings = Settings.from_env({"PEDRO_HOME": str(tmp_path / "home")})
    spec = launch.staged(sweep_for(tmp_path), settings)
    tree = spec.model_dump(mode="json")
    del tree["base"]["data"]["fields"], tree["base"]["data"]["special_tokens_in_content"]
    digest = hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
    kept = Path(settings.storage) / "sweeps" / "by-spec" / f"{digest[:32]}.json"
    kept.parent.mkdir(parents=True)
    kept.write_text('{"id": "sweep-old"}')
    assert recall(settings.storage, spec) == "sweep-old"


# Planners and schedulers


def test_optuna_stays_in_the_space_and_goes_on_from_what_it_was_told(tmp_path):
    space = {
        "training.lr": {"loguniform": [1e-4, 1e-1]},
        "method.r": {"randint": [2, 9]},
        "method.orders": {"choice": [[6, 5], [2, 1]]},
    }
    spec = sweep_for(tmp_path, space, search={"algorithm": "optuna", "trials": 14})
    check_sweep(spec)
    tracker = begin(tmp_path, spec)
    for _ in range(6):
        trial = tracker.next()
        lr, r = trial.parameters["training.lr"], trial.parameters["method.r"]
        assert 1e-4 <= lr <= 1e-1
        assert 2 <= r <= 9
        assert trial.parameters["method.orders"] in ([6, 5], [2, 1])
        finish(tracker, trial, abs(r - 5.0))
    tracker.next()  # it runs when the driver is killed
    again = begin(tmp_path, spec)
    assert (again.kept, again.waiting) == (6, 8)
    assert again.next().parameters == tracker.trials[6].parameters
    finish(again, again.trials[6], 1.0)
    later = [again.next().parameters for _ in range(7)]
    assert again.next() is None
    assert not any(parameters in [trial.parameters for trial in tracker.trials] for parameters in later)


def test_a_resumed_scheduler_stops_what_an_uninterrupted_one_would(tmp_path):
    from pedro.training.sweep.tuning import LOSS, STEP, STEPS, make_scheduler, tell

    spec = sweep_for(tmp_path, scheduler={"grace_steps": 3, "reduction": 2}, training={"max_steps": 12})
    tracker = begin(tmp_path, spec)
    for loss in (0.1, 0.2):
        trial = tracker.next()
        tracker.report(trial.number, 3, 12, loss)
        finish(tracker, trial, loss)

    def decision(scheduler, step, loss):
        newcomer = SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, newcomer)
        return scheduler.on_trial_result(None, newcomer, {STEP: step, STEPS: 12, LOSS: loss})

    knowing, fresh = make_scheduler(spec), make_scheduler(spec)
    tell(knowing, begin(tmp_path, spec))
    assert decision(knowing, 3, 0.9) == "STOP"
    assert decision(fresh, 3, 0.9) == "CONTINUE"
    assert decision(knowing, 12, 0.9) == "CONTINUE", "what has trained to its end is scored"


def test_steps_that_vary_are_cut_neither_by_the_default_of_epochs_nor_by_the_steps_of_the_base(tmp_path):
    from pedro.training.sweep.tuning import make_scheduler

    base = sweep_for(tmp_path).to_dict()["base"]
    base["training"] = {"batch_size": 8}
    tree = {"name": "steps", "base": base, "space": {"training.max_steps": {"grid": [5, 5000]}}}
    spec = SweepSpec.model_validate(tree)
    for read in (spec, SweepSpec.model_validate(spec.to_dict())):
        assert [variant(read, each).training.epochs for each in (*planned_trials(read), {})] == [None, None, 10.0]
    base["training"] = {"epochs": 3}
    assert variant(SweepSpec.model_validate(tree), {"training.max_steps": 5}).training.epochs == 3
    base["training"] = {"max_steps": 100}
    longer = SweepSpec.model_validate(tree)
    assert variant(longer, {"training.max_steps": 5000}).training.epochs is None
    highest, _ = make_scheduler(longer)._brackets[0]._rungs[0]
    assert highest * 3 > 5000, "rungs go on to the longest trial"


# What people see


def test_table_csv_and_figure_show_every_trial(tmp_path):
    space = {"method.orders": {"grid": [[6, 5], [2, 1]]}, "training.lr": {"grid": [1e-4, 1e-1]}}
    tracker = begin(tmp_path, sweep_for(tmp_path, space))
    trials = [tracker.next() for _ in range(4)]
    for n, trial in enumerate(trials):
        tracker.report(n, 3, 6, 0.5 + n)
        if n < 2:
            finish(tracker, trial, 0.4 + n, accuracy=0.9 - 0.1 * n)
    tracker.ended(2)
    lines = progress_table(tracker)
    assert lines[0].split() == ["trial", "state", "step", "dev", "loss", "method.orders", "training.lr"]
    assert "finished" in lines[1]
    assert "0.4000" in lines[1]
    assert "stopped" in lines[3]
    assert "running" in lines[4]
    write_sweep_report(tracker, tmp_path / "report", {"best": 0})
    table = (tmp_path / "report" / "trials.csv").read_text().splitlines()
    assert table[0].startswith("trial,state,method.orders,training.lr,validation_loss,accuracy")
    assert len(table) == 5
    assert rows_of(tracker.trials)[0]["accuracy"] == 0.9
    assert (tmp_path / "report" / "parallel.png").stat().st_size > 10_000


def test_an_adapter_says_which_sweep_and_trial_it_comes_from(tmp_path):
    from pedro.training import worker

    context = context_for(spec_for(tmp_path, max_steps=2, eval_every=1), tmp_path)
    trained = worker.train_and_score(context, LocalReporter(tmp_path / "run", lambda line: None))
    worker.save(context, trained, tmp_path / "adapter", {"sweep": {"id": "sweep-1", "trial": 3}})
    manifest = json.loads((tmp_path / "adapter" / MANIFEST).read_text())
    assert manifest["sweep"] == {"id": "sweep-1", "trial": 3}
    assert manifest["metrics"]["validation_loss"] == trained.outcome.validation_loss


def test_a_dry_run_resumes_nothing_and_says_so(tmp_path):
    told = CliRunner().invoke(app, ["sweep", str(tmp_path / "any.yaml"), "--resume", "--dry-run"])
    assert told.exit_code == 2
    assert "give one of" in " ".join(told.stderr.split())
