"""Where the inputs of each layer's activation lie: recorded while rows are scored, kept as shares of equal bins."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pedro.methods.pedro.layer import PedroLayer

if TYPE_CHECKING:
    import torch
    from torch import nn

BINS = 40
MOST_VALUES = 200_000  # of a layer
OUTER = 0.001  # of the values on either side lie outside the bins


@contextmanager
def recorded(model: nn.Module | None) -> Iterator[dict[int, list[torch.Tensor]]]:
    """The x = pool(prompt) W_down [B, R] that each layer's R is given meanwhile, by layer, as far as they are kept.

    Nothing for other methods, and for no model.
    """
    seen: dict[int, list[torch.Tensor]] = {}
    modules: Iterable[nn.Module] = () if model is None else model.modules()
    layers = [module for module in modules if isinstance(module, PedroLayer)]
    handles = [layer.register_forward_hook(_keep(seen)) for layer in layers]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def summary(seen: dict[int, list[torch.Tensor]]) -> dict[str, dict[str, Any]]:
    """Of each layer: the shares of the values in equal bins from `low` to `high`, as a manifest keeps them."""
    import numpy as np

    told = {}
    for layer, parts in sorted(seen.items()):
        values = np.concatenate([part.numpy().ravel() for part in parts])
        low, high = np.quantile(values, [OUTER, 1 - OUTER]).tolist()
        if not np.isfinite(values).all() or low >= high:
            continue
        counts, _ = np.histogram(values, BINS, (low, high))
        shares = (counts / counts.sum()).round(5).tolist()
        told[str(layer)] = {"low": round(low, 5), "high": round(high, 5), "shares": shares}
    return told


def _keep(seen: dict[int, list[torch.Tensor]]) -> Callable[[PedroLayer, tuple[Any, ...], Any], None]:
    def keep(layer: PedroLayer, args: tuple[Any, ...], _output: Any) -> None:
        hidden, prompt, adapter = args
        held = seen.setdefault(layer.index, [])
        if sum(part.numel() for part in held) < MOST_VALUES:
            down = layer.generator(adapter).down
            held.append((layer.pooled(hidden, prompt, adapter).float() @ down.float()).detach().cpu())

    return keep
