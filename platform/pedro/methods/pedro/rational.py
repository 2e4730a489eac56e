"""Where the learnable activation R(x) starts (`adapter_kinds.generator.rational`): a fit of GELU, of any orders."""

from __future__ import annotations

from functools import cache

import torch

from pedro.errors import ConfigError

INSIDE, OUTSIDE = 5.0, 15.0  # the fit is good on [-5, 5] and merely sane, at 3 % of the weight, up to ±15
TAIL_WEIGHT = 0.03
STARTS = (0.3, 0.1, 1.0)  # scales of the first denominator; the best of the three fits is kept
STEPS = 100


def fit_gelu(m: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Coefficients a [m+1] and b [n], float32 on the CPU, of the R(x) closest to GELU; about 0.2 s, then cached.

    Raises ConfigError for orders that cannot be fitted (m outside 1..12, n outside 0..12).
    """
    if not (1 <= m <= 12 and 0 <= n <= 12):
        raise ConfigError(f"orders: expected 1 <= m <= 12 and 0 <= n <= 12, got ({m}, {n})", param="orders")
    a, b = _fit(m, n)
    return torch.tensor(a, device="cpu"), torch.tensor(b, device="cpu")


@cache
def _fit(m: int, n: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    x = torch.linspace(-OUTSIDE, OUTSIDE, 1501, dtype=torch.float64, device="cpu")  # P points
    target = torch.nn.functional.gelu(x)
    weight = torch.where(x.abs() <= INSIDE, 1.0, TAIL_WEIGHT)
    above = torch.stack([x**j for j in range(m + 1)], dim=1)  # [P, m+1]
    below = torch.stack([x**i for i in range(1, n + 1)], dim=1) if n else x.new_zeros(len(x), 0)  # [P, n]
    with torch.no_grad():
        fits = [_descend(above, below, target, weight, start) for start in STARTS]
    _, a, b = min(fits, key=lambda fit: fit[0])
    return tuple(a.tolist()), tuple(b.tolist())


def _descend(
    above: torch.Tensor, below: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, start: float
) -> tuple[float, torch.Tensor, torch.Tensor]:
    """Levenberg-Marquardt on the weighted squared error, from a denominator 1 + sum of even powers of start * x.

    Sums of products and a plain elimination instead of BLAS and LAPACK, whose last digits differ from process to
    process: training must start from the same bits wherever it is started.
    """
    m1, n = above.shape[1], below.shape[1]
    powers = torch.arange(1, n + 1, dtype=above.dtype, device="cpu")
    unit = torch.cat([INSIDE ** torch.arange(m1, dtype=above.dtype, device="cpu"), INSIDE**powers])
    b = torch.where((powers % 2 == 0) | (n == 1), start**powers, 0.0)
    scaled = above / unit[:m1] / (1 + _product(below, b).abs())[:, None] * weight[:, None]
    a = _solve(_gram(scaled), _product(scaled.T, target * weight)) / unit[:m1]

    def residual(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return (_product(above, a) / (1 + _product(below, b).abs()) - target) * weight

    error, damping = residual(a, b), 1e-3
    for _ in range(STEPS):
        q = _product(below, b)
        denominator = (1 + q.abs())[:, None]
        slope = -(_product(above, a)[:, None] / denominator**2) * torch.where(q < 0, -1.0, 1.0)[:, None] * below
        jacobian = torch.cat([above / denominator, slope], dim=1) / unit * weight[:, None]  # [P, m+1+n]
        normal = _gram(jacobian)
        damped = normal + damping * torch.diag(normal.diagonal() + 1e-12)
        step = _solve(damped, _product(jacobian.T, error)) / unit
        trial = residual(a - step[:m1], b - step[m1:])
        if trial.square().sum() < error.square().sum():
            a, b, error, damping = a - step[:m1], b - step[m1:], trial, max(damping / 4, 1e-12)
        else:
            damping = min(damping * 4, 1e6)
    return float(error.square().sum()), a, b


def _product(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """matrix @ vector."""
    return (matrix * vector).sum(dim=1)


def _gram(matrix: torch.Tensor) -> torch.Tensor:
    """matrix.T @ matrix."""
    return (matrix[:, :, None] * matrix[:, None, :]).sum(dim=0)


def _solve(matrix: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """The x of a small matrix @ x = vector, by elimination with row pivots."""
    rows = [[*row, value] for row, value in zip(matrix.tolist(), vector.tolist(), strict=True)]
    size = len(rows)
    for k in range(size):
        pivot = max(range(k, size), key=lambda i: abs(rows[i][k]))
        rows[k], rows[pivot] = rows[pivot], rows[k]
        for i in range(k + 1, size):
            factor = rows[i][k] / rows[k][k]
            rows[i] = [x - factor * y for x, y in zip(rows[i], rows[k], strict=True)]
    solution = [0.0] * size
    for k in reversed(range(size)):
        known = sum(rows[k][i] * solution[i] for i in range(k + 1, size))
        solution[k] = (rows[k][size] - known) / rows[k][k]
    return vector.new_tensor(solution)
