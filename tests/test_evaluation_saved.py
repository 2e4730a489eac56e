"""A saved adapter is evaluated and imported only as what its manifest says it is, with all of its weights."""

import json
import shutil

import pytest
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from serving_adapters import make_adapter, settings_at
from training_runs import context_for, spec_for
from typer.testing import CliRunner

from pedro.adapter_directory import CONFIG, MANIFEST, WEIGHTS, read_manifest, weights_digest, write_manifest
from pedro.backbone import load_model, resolve_backbone
from pedro.cli import app
from pedro.data.prompt_format import FORMATS
from pedro.errors import AdapterError, BackboneError, DataError
from pedro.evaluation.saved import load_saved, open_saved, score_file
from pedro.training.worker import evaluate
from pedro.training.worker_group import ALONE


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    make_adapter(folder / "adapter", 1, "completion")
    return folder / "adapter"


@pytest.fixture
def older(made, tmp_path):
    """A copy without the digest of its config, as earlier releases wrote adapters."""
    directory = shutil.copytree(made, tmp_path / "older")
    rewrite(directory, config_digest=None)
    return directory


def rewrite(directory, **fields):
    """Change a manifest, as one of an earlier release: without a digest of itself."""
    fields = {"manifest_digest": None, **fields}
    (directory / MANIFEST).write_text(json.dumps(read_manifest(directory) | fields))


def reconfigure(directory, **fields):
    config = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps(config | fields))


def load(directory):
    backbone, manifest, _ = open_saved(directory)
    return load_saved(directory, manifest, backbone, "float32", "cpu")


def test_an_adapter_is_loaded_with_its_prompt_format(older):
    assert open_saved(older)[2].id == "raw"
    assert load(older).peft_config["default"].peft_type == "PEDRO"


def test_a_backbone_that_was_moved_is_named_anew_and_must_be_the_same(older, tmp_path):
    manifest = read_manifest(older)
    rewrite(older, backbone=manifest["backbone"] | {"id": str(tmp_path / "gone")})
    with pytest.raises(BackboneError, match=r"gone.*--backbone"):
        open_saved(older)
    moved = shutil.copytree(resolve_backbone("stories260K").directory, tmp_path / "moved")
    assert open_saved(older, str(moved))[0].directory == moved
    with pytest.raises(AdapterError, match="was trained on sha256"):
        open_saved(older, "pedro-nano")
    config = json.loads((moved / "tokenizer_config.json").read_text())
    (moved / "tokenizer_config.json").write_text(json.dumps(config | {"bos_token": "<unk>"}))
    with pytest.raises(AdapterError, match=r"was trained with the tokenizer v2:sha256:\w+, but .* v2:sha256:"):
        open_saved(older, str(moved))


def test_what_the_error_for_a_stock_peft_adapter_says_works(tmp_path):
    backbone = resolve_backbone("stories260K")
    tuned = get_peft_model(load_model(backbone), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    tuned.save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"adapters that PEFT saved lack it.* or write it") as told:
        open_saved(tmp_path)
    assert "write_manifest(directory, {'backbone'" in told.value.message
    write_manifest(
        tmp_path,
        {
            "backbone": {"id": backbone.id, "digest": backbone.digest},
            "method": {"name": "lora", "options": {}},
            "prompt_format": FORMATS["raw"].to_dict(),
        },
    )
    assert load(tmp_path).peft_config["default"].r == 4


def test_a_config_of_another_method_is_refused(older):
    LoraConfig(r=4, target_modules=["q_proj"]).save_pretrained(str(older))
    with pytest.raises(AdapterError, match="pedro makes PedroConfig, but there is LoraConfig"):
        open_saved(older)


def test_a_config_that_the_weights_do_not_fit_is_refused(older):
    reconfigure(older, r=3)
    with pytest.raises(AdapterError, match=f"{CONFIG}: the weights do not fit it"):
        load(older)


@pytest.mark.parametrize("change", ["lack", "hold"])
def test_an_adapter_with_a_tensor_too_few_or_too_many_is_refused(older, change):
    tensors = load_file(older / WEIGHTS)
    name = max(tensors)
    tensors[f"{name}_more"] = tensors[name].clone()
    if change == "lack":
        del tensors[name], tensors[f"{name}_more"]
    save_file(tensors, older / WEIGHTS, metadata={"format": "pt"})
    rewrite(older, digest=weights_digest(older))
    with pytest.raises(AdapterError, match=f"they {change} "):
        load(older)


def test_an_adapter_without_a_prompt_format_is_not_evaluated(older):
    rewrite(older, prompt_format=None)
    with pytest.raises(DataError, match="prompt_format"):
        open_saved(older)


def test_a_damaged_config_is_not_imported(older, made, tmp_path, monkeypatch):
    settings = settings_at(tmp_path / "home")
    monkeypatch.setenv("PEDRO_HOME", str(settings.home))
    changed = shutil.copytree(made, tmp_path / "changed")
    reconfigure(changed, pool="max")
    (older / CONFIG).write_text("{")
    for directory, message in ((changed, "config_digest"), (older, CONFIG)):
        outcome = CliRunner().invoke(app, ["adapters", "import", "acme.new", str(directory)])
        assert isinstance(outcome.exception, AdapterError)
        assert message in outcome.exception.message
    assert CliRunner().invoke(app, ["adapters", "list", "--json"]).stdout.strip() == "[]"


def test_the_majority_is_the_commonest_answer_of_the_rows_scored_in_a_job_and_by_eval_alike(made, tmp_path):
    test = tmp_path / "test.jsonl"
    answers = ["a zebra", "a zebra ", "red", "a zebra"]  # training's commonest is another
    test.write_text(
        "".join(json.dumps({"prompt": f"item {n}:", "completion": a}) + "\n" for n, a in enumerate(answers))
    )
    spec = spec_for(tmp_path)
    spec = spec.model_copy(update={"data": spec.data.model_copy(update={"test": str(test)})})
    of_job, _, _ = evaluate(context_for(spec, tmp_path), ALONE)
    of_eval = score_file(made, test, tmp_path / "cache")
    assert of_job["majority_accuracy"] == of_eval["majority_accuracy"] == 0.75
