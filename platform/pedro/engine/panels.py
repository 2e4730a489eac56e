"""Packs weights into the panels that the CPU kernel reads, in float32 or quantised, and dequantises them.

`quantise` and `dequantise` are the plain reference of quantised.h: groups of 32 inputs of one output share a scale,
and of int4 a minimum, both in bfloat16. int8 is symmetric, as llama.cpp's Q8_0 is; int4 is like its Q4_1.
Legend: W output width, K inputs, G groups of inputs, P panels, NR columns of a panel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F

WEIGHTS = ("float32", "int8", "int4")  # in the order of quantised.h's enum
GROUP = 32
PART_ROWS = 4096  # quantised at a time, to bound temporary memory


class Quantised(NamedTuple):
    """Weights [W, K]: scale × code, or scale × code + minimum."""

    codes: torch.Tensor  # [W, G, GROUP]: int8, -127 to 127; of int4 uint8, 0 to 15
    scales: torch.Tensor  # [W, G] bfloat16
    minima: torch.Tensor | None  # [W, G] bfloat16, of int4


def quantise(weight: torch.Tensor, kind: str) -> Quantised:
    """Weights [W, K] in `kind` ("int8" or "int4"). The last group is padded with its last input."""
    rest = -weight.shape[1] % GROUP
    whole = torch.cat([weight, weight[:, -1:].expand(-1, rest)], 1) if rest else weight
    groups = whole.float().unflatten(1, (-1, GROUP))
    if kind == "int8":
        scales = (groups.abs().amax(-1) / 127).bfloat16()
        return Quantised(_codes(groups, scales, -127, 127).to(torch.int8), scales, None)
    least, most = groups.aminmax(dim=-1)
    minima = least.bfloat16()
    scales = ((most - minima.float()) / 15).bfloat16()
    return Quantised(_codes(groups - minima.float()[..., None], scales, 0, 15).to(torch.uint8), scales, minima)


def dequantise(quantised: Quantised, inputs: int) -> torch.Tensor:
    """The dequantised weights [W, K] in float32."""
    weight = quantised.codes * quantised.scales.float()[..., None]
    if quantised.minima is not None:
        weight = weight + quantised.minima.float()[..., None]
    return weight.flatten(1)[:, :inputs]


class PanelPacker:
    """Packs the weights of products for vectors of `simd_width` floats: the panels of native.c and quantised.h."""

    def __init__(self, simd_width: int) -> None:
        self._simd_width = simd_width

    def rounded(self, width: int) -> int:
        """The next multiple of a vector."""
        return -(-width // self._simd_width) * self._simd_width

    def buffer_widths(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Widths of the buffers of native.c's `Batch`, for a model of these sizes."""
        mixed, kv = (sizes[name] * sizes["head_dim"] for name in ("heads", "kv_heads"))
        dim, ffn = sizes["dim"], sizes["ffn"]
        qkv = self.rounded(mixed) + 2 * self.rounded(kv)
        widths = {"x": self.rounded(dim), "qkv": qkv, "mixed": mixed, "act": self.rounded(ffn)}
        return {**widths, "packed": max(dim, mixed, ffn)}

    def widened(self, weight: torch.Tensor) -> torch.Tensor:
        """[W, …] with rows of zeros up to whole vectors."""
        return F.pad(weight, (0, 0, 0, self.rounded(len(weight)) - len(weight)))

    def panels(self, weights: list[torch.Tensor], kind: str) -> torch.Tensor:
        """Weights [W, K] of the sites of one product, as panels of two vectors of columns."""
        rows = torch.cat([self.widened(weight) for weight in weights])
        if len(rows) % (2 * self._simd_width):
            rows = F.pad(rows, (0, 0, 0, self._simd_width))
        return self._packed(rows, kind)

    def paired(self, gate: torch.Tensor, up: torch.Tensor, kind: str) -> torch.Tensor:
        """Gate and up [W, K] as panels of a vector of each."""
        vectors = [self.widened(weight).unflatten(0, (-1, self._simd_width)) for weight in (gate, up)]
        return self._packed(torch.cat(vectors, 1).flatten(0, 1), kind)

    def _packed(self, rows: torch.Tensor, kind: str) -> torch.Tensor:
        """Rows [P × NR, K] as panels: [P, K, NR] in float32, else bytes [P, G, scales, minima and codes]."""
        panel = 2 * self._simd_width
        if kind == "float32":
            panels: torch.Tensor = rows.float().unflatten(0, (-1, panel)).transpose(1, 2)
            return panels.contiguous()
        return torch.cat([self._quantised(part, kind) for part in rows.split(PART_ROWS // panel * panel)])

    def _quantised(self, rows: torch.Tensor, kind: str) -> torch.Tensor:
        found = quantise(rows, kind)
        panels = found.codes.unflatten(0, (-1, 2 * self._simd_width)).permute(0, 2, 3, 1)  # [P, G, GROUP, NR]
        if found.minima is not None:  # two codes per byte; the high bits are of the column one vector further
            low, high = panels.split(self._simd_width, -1)
            panels = low | high << 4
        heads = [part for part in (found.scales, found.minima) if part is not None]
        columns = [part.unflatten(0, (-1, 2 * self._simd_width)).transpose(1, 2).contiguous() for part in heads]
        return torch.cat([*(part.view(torch.uint8) for part in columns), panels.flatten(2).view(torch.uint8)], -1)


def _codes(values: torch.Tensor, scales: torch.Tensor, low: int, high: int) -> torch.Tensor:
    """The nearest codes of [W, G, GROUP]; 0 where the scale is 0."""
    codes = (values / scales.float()[..., None]).nan_to_num_(0.0).round_()
    return codes.clamp_(low, high)
