"""The learnable activation: its fit of GELU, its formula and its gradients."""

import subprocess
import sys

import pytest
import torch

from pedro.adapter_kinds import GeneratorWeights, generate_vectors, rational
from pedro.adapter_kinds.generator import Rational
from pedro.errors import ConfigError
from pedro.methods.pedro import rational as rational_file
from pedro.methods.pedro.rational import fit_gelu


def test_the_papers_orders_fit_gelu_within_a_hundredth():
    x = torch.linspace(-5, 5, 4001)
    error = (rational(x, *fit_gelu(6, 5)) - torch.nn.functional.gelu(x)).abs().max()
    assert error < 0.01


def test_the_fit_stays_near_gelu_far_outside_the_interval():
    x = torch.tensor([-15.0, -10.0, -7.0, 7.0, 10.0, 15.0])
    torch.testing.assert_close(rational(x, *fit_gelu(6, 5)), torch.nn.functional.gelu(x), atol=0.2, rtol=0.02)


@pytest.mark.parametrize(("m", "n", "limit"), [(5, 4, 0.01), (7, 6, 0.01), (10, 9, 0.001), (3, 2, 0.15), (2, 0, 0.6)])
def test_other_orders_fit_as_well_as_they_can(m, n, limit):
    a, b = fit_gelu(m, n)
    x = torch.linspace(-5, 5, 1001)
    assert a.shape == (m + 1,)
    assert b.shape == (n,)
    assert (rational(x, a, b) - torch.nn.functional.gelu(x)).abs().max() < limit


def test_every_process_fits_the_same_bits():
    code = "import runpy, sys; print([c.tolist() for c in runpy.run_path(sys.argv[1])['fit_gelu'](6, 5)])"
    command = [sys.executable, "-c", code, rational_file.__file__]  # by itself, without PEFT's two seconds
    other = subprocess.run(command, capture_output=True, text=True, check=True)
    assert other.stdout == f"{[c.tolist() for c in fit_gelu(6, 5)]}\n"


def test_rational_follows_equation_7_term_by_term():
    generator = torch.Generator().manual_seed(0)
    x, a, b = (torch.randn(shape, generator=generator) for shape in (20, 7, 5))
    above = sum(a[j] * x**j for j in range(7))
    below = 1 + sum(b[i - 1] * x**i for i in range(1, 6)).abs()
    torch.testing.assert_close(rational(x, a, b), above / below)


def test_gradients_are_finite_for_small_zero_and_large_inputs():
    x = torch.tensor([0.0, 1e-8, -3.0, 50.0, -1e4], requires_grad=True)
    a, b = (part.requires_grad_() for part in fit_gelu(6, 5))
    rational(x, a, b).sum().backward()
    for part in (x, a, b):
        assert torch.isfinite(part.grad).all()
        assert part.grad.abs().sum() > 0


@pytest.mark.parametrize(("m", "n", "rows"), [(6, 5, ()), (1, 3, ()), (3, 0, ()), (4, 2, (3,))])
def test_the_derivatives_are_those_of_the_function(m, n, rows):
    generator = torch.Generator().manual_seed(0)
    shapes = ((3, 4), (*rows, m + 1), (*rows, n))
    given = (torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes)
    assert torch.autograd.gradcheck(Rational.apply, tuple(given))


def test_rows_may_have_activations_of_their_own():
    x = torch.randn(3, 4)
    a, b = torch.randn(3, 7), torch.randn(3, 5)
    together = rational(x, a, b)
    for i in range(3):
        torch.testing.assert_close(together[i], rational(x[i], a[i], b[i]))


def test_rows_may_have_generators_of_their_own():
    pooled = torch.randn(3, 8)
    weights = GeneratorWeights(
        torch.randn(3, 8, 2), torch.randn(3, 2, 5), torch.randn(3, 5), "rational", torch.randn(3, 7), torch.randn(3, 5)
    )
    together = generate_vectors(pooled, weights)
    for i in range(3):
        alone = GeneratorWeights(*(part if isinstance(part, str) else part[i] for part in weights))
        torch.testing.assert_close(together[i : i + 1], generate_vectors(pooled[i : i + 1], alone))


def test_autocast_does_not_lower_the_generators_precision():
    a, b = fit_gelu(6, 5)
    weights = GeneratorWeights(torch.randn(64, 4), torch.randn(4, 16), torch.ones(16), "rational", a, b)
    pooled = torch.randn(2, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = generate_vectors(pooled, weights)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, rational(pooled @ weights.down, a, b) @ weights.up + weights.bias)


def test_orders_without_a_fit_are_refused():
    with pytest.raises(ConfigError, match=r"orders: .*got \(0, 5\)"):
        fit_gelu(0, 5)
