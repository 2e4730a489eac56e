"""The learned activations of a PEDRO adapter: R(x) of each layer, and distances between layers and adapters.

Reads adapter files and computes in numpy, so that nothing waits for PyTorch.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from pedro.adapter_directory import MANIFEST
from pedro.errors import AdapterError

WEIGHTS = "adapter_model.safetensors"
COEFFICIENT = re.compile(r"\.(?P<layer>\d+)\.[^.]+\.pedro_(?P<letter>[ab])(?:\.|$)")
GENERATOR = re.compile(r"\.(?P<layer>\d+)\.[^.]+\.pedro_down(?:\.|$)")
REACH = 5.0  # of x, on either side: the initial fit is good there
POINTS = 121
STRIPS = 60
_fits: dict[tuple[int, int], LayerActivation] = {}


@dataclass(frozen=True)
class LayerActivation:
    """One layer's activation: learned, with coefficients of eq. 7, or fixed by name."""

    index: int
    activation: str
    a: tuple[float, ...] = ()
    b: tuple[float, ...] = ()

    @property
    def learned(self) -> bool:
        return bool(self.a)

    @property
    def orders(self) -> tuple[int, int]:
        """(m, n) of a learned R(x)."""
        return len(self.a) - 1, len(self.b)

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """R(x), eq. 7 of arXiv 2409.17834."""
        if not self.learned:
            return np.asarray(np.maximum(x, 0.0)) if self.activation == "relu" else gelu(x)
        above = np.polynomial.polynomial.polyval(x, self.a)
        y: np.ndarray = above / (1 + np.abs(np.polynomial.polynomial.polyval(x, (0.0, *self.b))))
        return y


@dataclass(frozen=True)
class LayerInputs:
    """Where the x of one layer lay for the rows on which the version was scored: shares of equal bins."""

    low: float
    high: float
    shares: tuple[float, ...]

    def edges(self) -> np.ndarray:
        return np.linspace(self.low, self.high, len(self.shares) + 1)

    def weights(self, x: np.ndarray) -> np.ndarray:
        """The density at each x; zero outside of the bins."""
        at = np.clip(np.searchsorted(self.edges(), x, side="right") - 1, 0, len(self.shares) - 1)
        width = (self.high - self.low) / len(self.shares)
        return np.where((x >= self.low) & (x <= self.high), np.asarray(self.shares)[at] / width, 0.0)


@dataclass(frozen=True)
class Activations:
    """Those of one adapter, by layer; `inputs` of the layers of which they were recorded at training."""

    layers: tuple[LayerActivation, ...]
    inputs: Mapping[int, LayerInputs] = field(default_factory=dict)

    @property
    def learned(self) -> bool:
        return any(layer.learned for layer in self.layers)


def read_activations(directory: Path) -> Activations:
    """Those of an adapter directory. Raises AdapterError where it holds no PEDRO adapter, or a damaged one."""
    config = _config(directory)
    if config.get("peft_type") != "PEDRO":
        kind = str(config.get("peft_type") or "no PEFT method")
        raise AdapterError(f"it is {kind}: only PEDRO and PARA generate vectors by an activation")
    layers, coefficients = _coefficients(directory)
    try:
        names = config.get("activation") or "rational"
        listed = [names] * len(layers) if isinstance(names, str) else list(names)
        return Activations(
            tuple(
                LayerActivation(
                    layer, str(name), coefficients.get((layer, "a"), ()), coefficients.get((layer, "b"), ())
                )
                for layer, name in zip(layers, listed, strict=True)
            ),
            _inputs(directory),
        )
    except (TypeError, ValueError) as error:
        raise AdapterError("adapter_config.json does not fit the weights; fetch the adapter again") from error


def initial(m: int, n: int) -> LayerActivation:
    """R(x) as a fresh adapter has it, the fit of GELU; layer -1. Loads PyTorch, which takes seconds, once."""
    if (m, n) not in _fits:
        from pedro.methods.pedro.rational import fit_gelu

        a, b = fit_gelu(m, n)
        _fits[m, n] = LayerActivation(-1, "rational", tuple(a.tolist()), tuple(b.tolist()))
    return _fits[m, n]


def known_initial(m: int, n: int) -> LayerActivation | None:
    """The same if it was made before: at once."""
    return _fits.get((m, n))


def learned_orders(layers: Iterable[LayerActivation]) -> list[tuple[int, int]]:
    """The orders of those that are learned, each once; layers may differ in them."""
    return list(dict.fromkeys(layer.orders for layer in layers if layer.learned))


def start_of(layer: LayerActivation) -> LayerActivation:
    """Where its training began: the fit of GELU by its orders; itself if it is fixed."""
    return initial(*layer.orders) if layer.learned else layer


def moved(layer: LayerActivation) -> Callable[[np.ndarray], np.ndarray]:
    """R(x) less its start."""
    start = start_of(layer)
    return lambda x: layer(x) - start(x)


def gelu(x: np.ndarray) -> np.ndarray:
    """The exact one, by the error function."""
    y: np.ndarray = (
        0.5 * x * (1 + np.array([math.erf(value) for value in np.ravel(x / math.sqrt(2))]).reshape(np.shape(x)))
    )
    return y


def grid(reach: float = REACH) -> np.ndarray:
    return np.linspace(-reach, reach, POINTS)


def curve_rows(curves: Mapping[str, Callable[[np.ndarray], np.ndarray]], x: np.ndarray) -> list[dict[str, Any]]:
    """One row a named curve and x."""
    return [
        {"curve": name, "x": float(at), "y": float(value)}
        for name, curve in curves.items()
        for at, value in zip(x, curve(x), strict=True)
    ]


def distance(
    one: LayerActivation, other: LayerActivation, inputs: LayerInputs | None = None, reach: float = REACH
) -> float:
    """Root mean square of the difference where the inputs lie, or evenly on [-reach, reach] where that is not known."""
    if inputs is None:
        x = grid(reach)
        return float(np.sqrt(np.mean((one(x) - other(x)) ** 2)))
    edges = inputs.edges()
    x = (edges[:-1] + edges[1:]) / 2
    return float(np.sqrt(np.average((one(x) - other(x)) ** 2, weights=inputs.shares)))


def shade_rows(inputs: Iterable[LayerInputs], reach: float) -> list[dict[str, float]]:
    """Where inputs lie on [-reach, reach]: strips of x, and how dense they are there next to the densest of them.

    Of several layers, the mean of their densities.
    """
    edges = np.linspace(-reach, reach, STRIPS + 1)
    middle = (edges[:-1] + edges[1:]) / 2
    held = [given.weights(middle) for given in inputs]
    density = np.mean(held, axis=0) if held else np.zeros(STRIPS)
    most = float(density.max())
    return [
        {"low": float(low), "high": float(high), "density": float(value / most)}
        for low, high, value in zip(edges[:-1], edges[1:], density, strict=True)
        if value > 0
    ]


def distance_rows(one: Activations, other: Activations) -> list[dict[str, Any]]:
    """Every layer of `one` against every layer of `other`, where the inputs of the layer of `one` lie, if known."""
    return [
        {
            "layer": mine.index,
            "other": theirs.index,
            "distance": distance(mine, theirs, one.inputs.get(mine.index)),
        }
        for mine in one.layers
        for theirs in other.layers
    ]


def _coefficients(directory: Path) -> tuple[list[int], dict[tuple[int, str], tuple[float, ...]]]:
    """The layers that have a generator, and a and b of those that learn their activation."""
    layers: list[int] = []
    coefficients: dict[tuple[int, str], tuple[float, ...]] = {}
    try:
        with safe_open(directory / WEIGHTS, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 (a handle, no mapping)
                if match := COEFFICIENT.search(name):
                    values = weights.get_tensor(name).astype(float).tolist()
                    coefficients[int(match["layer"]), match["letter"]] = tuple(values)
                elif match := GENERATOR.search(name):
                    layers.append(int(match["layer"]))
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise AdapterError(f"{WEIGHTS} cannot be read ({type(error).__name__}); fetch the adapter again") from error
    if not layers:
        raise AdapterError(f"{WEIGHTS} holds no generator; fetch the adapter again")
    if any((layer, other) not in coefficients for layer, letter in coefficients for other in "ab"):
        raise AdapterError(f"{WEIGHTS} holds half of a rational; fetch the adapter again")
    return sorted(layers), coefficients


def _inputs(directory: Path) -> dict[int, LayerInputs]:
    """What training recorded in the manifest; nothing of versions of earlier releases."""
    try:
        told = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))["activation_inputs"]
        return {
            int(layer): LayerInputs(float(held["low"]), float(held["high"]), tuple(map(float, held["shares"])))
            for layer, held in told.items()
            if float(held["low"]) < float(held["high"]) and sum(map(float, held["shares"])) > 0
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _config(directory: Path) -> dict[str, Any]:
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError("it has no adapter_config.json: a fully fine-tuned model has no generator") from None
    except (OSError, ValueError) as error:
        raise AdapterError("adapter_config.json cannot be read; fetch the adapter again") from error
    return config if isinstance(config, dict) else {}
