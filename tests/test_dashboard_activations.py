"""The Activations page: R(x) as the adapter's files hold it, and vectors of prompts from the adapter itself."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from dashboard_app import healthy, opener, words
from dashboard_home import make_home
from serving_adapters import backbone, make_adapter, register, settings_at, tokenizer

from pedro.adapter_directory import read_manifest, write_manifest
from pedro.adapter_kinds import rational
from pedro.backbone import load_model
from pedro.errors import AdapterError, BackboneError
from pedro.methods import get_method
from pedro.methods.adapter_files import save_adapter
from pedro.methods.pedro import PedroLayer, fit_gelu
from pedro.registry import Registry
from sources import activations, vectors


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """An adapter directory, and the PEFT model that it was saved from."""
    directory = tmp_path_factory.mktemp("activations") / "adapter"
    return directory, make_adapter(directory, 1)


def saved(directory, method, options=None):
    """A fresh adapter of another method."""
    model = get_method(method).apply(load_model(backbone()), options or {})
    base = backbone()
    place = {"id": base.id, "digest": base.digest, "tokenizer_digest": base.tokenizer_digest}
    form = {"id": "raw", "template": "{{ messages[0].content }}"}
    save_adapter(model, directory, {"backbone": place, "method": {"name": method}, "prompt_format": form})
    return directory


def test_the_curves_are_those_of_the_trained_layers(made):
    directory, model = made
    found = activations.read_activations(directory)
    layers = [module for module in model.modules() if isinstance(module, PedroLayer)]
    assert [layer.index for layer in found.layers] == [layer.index for layer in layers]
    x = activations.grid()
    for mine, theirs in zip(found.layers, layers, strict=True):
        weights = theirs.generator("default")
        expected = rational(torch.tensor(x), weights.a, weights.b).detach().numpy()
        np.testing.assert_allclose(mine(x), expected, rtol=2e-4, atol=1e-4)
    assert activations.learned_orders(found.layers) == [(6, 5)]


def test_the_start_is_the_fit_of_gelu_and_a_fresh_adapter_lies_on_it(tmp_path):
    start = activations.initial(4, 3)
    a, b = fit_gelu(4, 3)
    assert (start.a, start.b) == (tuple(a.tolist()), tuple(b.tolist()))
    assert activations.known_initial(4, 3) is start
    fresh = activations.read_activations(saved(tmp_path / "fresh", "pedro", {"orders": [4, 3]}))
    assert max(activations.distance(layer, start) for layer in fresh.layers) < 1e-6
    x = activations.grid()
    assert np.abs(start(x) - activations.gelu(x)).max() < 0.06


def test_layers_may_differ_in_their_orders(tmp_path):
    orders = [(6, 5), (5, 4), (4, 3), (3, 2), (4, 3)]
    fresh = activations.read_activations(saved(tmp_path / "fresh", "pedro", {"orders": orders}))
    assert [layer.orders for layer in fresh.layers] == orders
    assert activations.learned_orders(fresh.layers) == orders[:4]
    x = activations.grid()
    for layer in fresh.layers:
        assert np.abs(activations.moved(layer)(x)).max() < 1e-5, "each lies on its own start"


def test_gelu_is_the_exact_one():
    x = activations.grid(8)
    np.testing.assert_allclose(activations.gelu(x), torch.nn.functional.gelu(torch.tensor(x)).numpy(), atol=1e-12)


def test_fixed_activations_are_told_from_learned_ones(tmp_path):
    found = activations.read_activations(saved(tmp_path / "relu", "pedro-5"))
    assert not found.learned
    assert found.layers[0](np.array([-1.0, 2.0])).tolist() == [0.0, 2.0]
    mixed = activations.read_activations(saved(tmp_path / "mixed", "pedro-7"))
    assert {layer.activation for layer in mixed.layers} == {"relu", "gelu"}


def test_distances_are_root_mean_squares_and_a_matrix_over_layers(made):
    found = activations.read_activations(made[0])
    rows = activations.distance_rows(found, found)
    assert len(rows) == len(found.layers) ** 2
    assert all((row["distance"] == 0) == (row["layer"] == row["other"]) for row in rows)
    one, other = (activations.LayerActivation(0, "rational", (value,), ()) for value in (1.0, 3.0))
    assert activations.distance(one, other) == pytest.approx(2.0)


def test_distances_count_where_the_inputs_lie():
    flat = activations.LayerActivation(0, "rational", (0.0,), ())
    bent = activations.LayerActivation(0, "rational", (0.0, 1.0), ())  # R(x) = x
    given = activations.LayerInputs(0.0, 2.0, (0.75, 0.25))  # its bins' middles are 0.5 and 1.5
    assert activations.distance(flat, bent, given) == pytest.approx((0.75 * 0.5**2 + 0.25 * 1.5**2) ** 0.5)
    one, other = activations.Activations((flat,), {0: given}), activations.Activations((bent,))
    assert activations.distance_rows(one, other)[0]["distance"] == activations.distance(flat, bent, given)
    assert activations.distance_rows(other, one)[0]["distance"] == activations.distance(flat, bent)


def test_the_shade_is_as_dense_as_the_inputs_and_lies_where_they_do():
    inputs = [activations.LayerInputs(0.0, 2.0, (0.75, 0.25)), activations.LayerInputs(-1.0, 0.0, (1.0,))]
    strips = activations.shade_rows(inputs, 3.0)
    assert min(strip["low"] for strip in strips) == pytest.approx(-1.0)
    assert max(strip["high"] for strip in strips) == pytest.approx(2.0)
    by_place = {round(strip["low"] + 0.05, 2): strip["density"] for strip in strips}
    assert (by_place[-0.55], by_place[0.55], by_place[1.55]) == pytest.approx((1.0, 0.75, 0.25))
    assert activations.shade_rows([], 3.0) == []
    assert activations.shade_rows([activations.LayerInputs(8.0, 9.0, (1.0,))], 3.0) == [], "none within reach"


def test_what_is_no_pedro_adapter_is_told_with_the_reason(tmp_path):
    with pytest.raises(AdapterError, match="LORA"):
        activations.read_activations(saved(tmp_path / "lora", "lora"))
    with pytest.raises(AdapterError, match=r"no adapter_config.json"):
        activations.read_activations(tmp_path)


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("adapter_config.json", "{"),
        ("adapter_config.json", "[]"),
        ("adapter_model.safetensors", "nonsense"),
        ("adapter_model.safetensors", None),
    ],
)
def test_damaged_files_are_told_and_not_raised_as_they_come(made, tmp_path, file, content):
    broken = shutil.copytree(made[0], tmp_path / "broken")
    (broken / file).unlink()
    if content is not None:
        (broken / file).write_text(content)
    with pytest.raises(AdapterError):
        activations.read_activations(broken)


@pytest.mark.parametrize("change", [{"activation": 7}, {"activation": ["relu"]}])
def test_a_configuration_of_wrong_types_is_told(made, tmp_path, change):
    broken = shutil.copytree(made[0], tmp_path / "broken")
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(AdapterError):
        activations.read_activations(broken)


# vectors of prompts


@pytest.fixture(scope="module")
def generator(made):
    return vectors.VectorReader(made[0])


@torch.no_grad()
def test_the_vectors_are_those_that_scale_the_projections(made, generator):
    """The reference: what the real model's layer returns for the rendered prompt."""
    _, model = made
    reading = generator.read("play some jazz", chat=False)
    seen = {}
    layers = [module for module in model.modules() if isinstance(module, PedroLayer)]
    handles = [
        layer.register_forward_hook(lambda layer, args, output: seen.update({layer.index: output})) for layer in layers
    ]
    model(input_ids=torch.tensor([tokenizer()("play some jazz").input_ids]))
    for handle in handles:
        handle.remove()
    assert set(reading.vectors) == set(seen)
    for layer, of_layer in reading.vectors.items():
        for target, values in of_layer.items():
            np.testing.assert_allclose(values, seen[layer][target][0].numpy(), atol=1e-5)


def test_the_inputs_are_what_the_activation_was_given(made, generator):
    """Through the rest of the generator they give the vectors again."""
    reading = generator.read("play some jazz")
    layer = next(module for module in made[1].modules() if isinstance(module, PedroLayer))
    weights = layer.generator("default")
    hidden = rational(torch.tensor(reading.inputs[layer.index])[None], weights.a, weights.b)
    again = (hidden @ weights.up + weights.bias).detach().numpy()[0]
    np.testing.assert_allclose(np.concatenate(list(reading.vectors[layer.index].values())), again, atol=1e-5)


def test_the_first_layer_sees_the_last_token_alone_and_later_ones_the_prompt(generator):
    readings = [generator.read(text) for text in ("play some jazz", "what is the weather")]
    rows = vectors.dependence_rows(readings)
    by_layer = {layer: max(row["between_prompts"] for row in rows if row["layer"] == layer) for layer in (0, 1, 4)}
    assert by_layer[0] == 0, "both prompts end in the template's last token"
    assert by_layer[1] > 0
    assert by_layer[4] > 0


def test_a_prompt_beyond_the_context_is_cut_to_its_end(generator):
    assert generator.read("word " * 2000, chat=False).tokens == 512


def test_a_backbone_that_does_not_fit_is_refused_before_it_is_loaded(made, monkeypatch):
    monkeypatch.setattr(vectors, "free_memory", lambda: 1000)
    with pytest.raises(BackboneError, match="stories260K would take"):
        vectors.VectorReader(made[0])


def test_the_limit_of_a_container_counts(tmp_path):
    for name, text in (("max", "5000000\n"), ("current", "4000000\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert vectors.free_memory(tmp_path) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert vectors.free_memory(tmp_path) > 1_000_000
    assert vectors.free_memory(tmp_path / "none") > 1_000_000


def test_spread_and_histogram_count_every_value(generator):
    readings, names = [generator.read(text) for text in ("a", "b c d")], ["1. a", "2. b"]
    spread = vectors.spread_rows(readings, names)
    assert len(spread) == 2 * 5 * 3
    assert all(row["low"] <= row["p5"] <= row["p50"] <= row["p95"] <= row["high"] for row in spread)
    counted = vectors.histogram_rows(readings, names, 0, "q")
    for name in names:
        assert sum(row["share"] for row in counted if row["prompt"] == name) == pytest.approx(1.0)
    assert [row["left"] for row in counted[:40]] == [row["left"] for row in counted[40:]]


# the page


@pytest.fixture(scope="module")
def home(made, tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    settings = settings_at(folder / "home")
    registry = Registry.open(settings)
    make_adapter(folder / "two", 2)
    for directory, name in ((made[0], "acme.voice"), (folder / "two", "acme.voice")):
        register(registry, directory, name)
    register(registry, saved(folder / "lora", "lora"), "initech.plain")
    return settings.home


@pytest.fixture
def page(monkeypatch):
    return opener(monkeypatch, "activations")


def charts(shown):
    return len(shown.get("vega_lite_chart"))


def test_the_page_draws_figure_two_and_the_distances(page, home):
    shown = page(home)
    assert shown.selectbox(key="adapter_version_acme.voice").value == 2, "the champion at first"
    assert shown.multiselect[0].value == [0, 2, 4]
    assert charts(shown) == 4
    assert not shown.warning
    shown.selectbox(key="adapter_version_acme.voice").set_value(1).run()
    assert charts(healthy(shown)) == 4
    shown.multiselect(key="layers_acme.voice:1").set_value([]).run()
    assert "Choose a layer" in words(healthy(shown).caption)


def test_the_page_shades_what_training_recorded_and_tells_gelu_from_the_fit(page, made, tmp_path):
    settings = settings_at(tmp_path / "home")
    directory = shutil.copytree(made[0], tmp_path / "recorded")
    given = {"low": -0.5, "high": 1.5, "shares": [0.25, 0.75]}
    manifest = {**read_manifest(directory), "activation_inputs": {str(layer): given for layer in range(5)}}
    write_manifest(directory, manifest)
    register(Registry.open(settings), directory, "acme.recorded")
    shown = page(settings.home)
    told = words(shown.caption)
    assert "lay for the rows on which training scored it, -0.5 to 1.5" in told
    assert "where the x of each layer of acme.recorded:1 lay" in told
    drawn = json.loads(shown.get("vega_lite_chart")[0].proto.spec)
    behind, curves = drawn["layer"]
    assert behind["mark"]["type"] == "rect"
    scale = curves["encoding"]["color"]["scale"]
    looks = dict(zip(scale["domain"], scale["range"], strict=True))
    assert len({looks["GELU"], looks["initial fit"], *(looks[f"layer {layer}"] for layer in (0, 2, 4))}) == 5


def test_the_page_draws_orders_by_layer(page, made, tmp_path):
    settings = settings_at(tmp_path / "home")
    options = {"orders": [(6, 5), (5, 4), (4, 3), (3, 2), (4, 3)]}
    register(Registry.open(settings), saved(tmp_path / "by_layer", "pedro", options), "acme.layers")
    shown = page(settings.home)
    assert charts(shown) == 4
    assert not shown.warning
    assert "initial fit of orders (3, 2)" in str([chart.proto for chart in shown.get("vega_lite_chart")])


def test_two_versions_are_laid_over_each_other(page, home):
    shown = page(home, other="acme.voice")
    shown.selectbox(key="other_version_acme.voice").set_value(1).run()
    assert charts(healthy(shown)) == 4
    assert "acme.voice:2 against acme.voice:1" in words(shown.subheader)


def test_typed_prompts_become_vectors_of_every_layer(page, home):
    shown = page(home)
    shown.text_area[0].set_value("play some jazz\n\nwhat is the weather\nplay some jazz\n")
    next(button for button in shown.button if button.label == "Make the vectors").click().run()
    healthy(shown)
    assert charts(shown) == 4 + 3 + 1
    assert len(shown.dataframe[0].value) == 15
    shown.selectbox(key="vector_layer").set_value(4).run()
    healthy(shown)
    shown.selectbox(key="adapter").set_value("initech.plain").run()
    assert "only PEDRO and PARA" in words(healthy(shown).info)
    shown.selectbox(key="adapter").set_value("acme.voice").run()
    assert charts(healthy(shown)) >= 4


def test_no_prompt_is_no_error(page, home):
    shown = page(home)
    shown.text_area[0].set_value(" \n ")
    next(button for button in shown.button if button.label == "Make the vectors").click().run()
    assert "Type a prompt" in words(healthy(shown).warning)


def test_adapters_without_weights_and_an_empty_home_are_told(page, tmp_path):
    shown = page(make_home(tmp_path / "home").home)
    assert "no activations to show" in words(shown.info)
    shown = page(tmp_path / "nothing")
    assert "pedro submit" in words(shown.info)
    assert not (tmp_path / "nothing").exists(), "looking must create nothing"
