"""Products of each job's tokens and its own weights: as autograd has them, and one's lost numbers are its own."""

import math

import torch
from torch.nn import functional

from pedro.training.cotraining import each_job

COUNTS = [3, 1, 4]


def drawn(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), requires_grad=True)


def gradients(made, inputs):
    return torch.autograd.grad((made * torch.linspace(-1, 1, made.numel()).view_as(made)).sum(), inputs)


def assert_same(made, wanted, inputs):
    torch.testing.assert_close(made, wanted)
    for found, other in zip(gradients(made, inputs), gradients(wanted, inputs), strict=True):
        torch.testing.assert_close(found, other)


def test_each_product_is_autograds():
    x, weights, vectors = drawn(8, 5), [drawn(2 + 0 * job, 5) for job in range(3)], drawn(3, 5)
    parts = x.split(COUNTS)
    linear = torch.cat([functional.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])
    assert_same(each_job.linear(x, COUNTS, weights), linear, [x, *weights])
    scaled = torch.cat([part * vector for part, vector in zip(parts, vectors, strict=True)])
    assert_same(each_job.scale(x, COUNTS, vectors), scaled, [x, vectors])
    assert_same(x + each_job.spread(COUNTS, vectors), x + vectors.repeat_interleave(torch.tensor(COUNTS), 0), [vectors])


def test_what_is_not_trained_has_no_gradient():
    x, weights, vectors = drawn(8, 5).detach(), [drawn(2, 5), drawn(2, 5).detach(), drawn(2, 5)], drawn(3, 5)
    each_job.linear(x, COUNTS, weights).sum().backward()
    assert [weight.grad is None for weight in weights] == [False, True, False]
    each_job.scale(x, COUNTS, vectors.detach().requires_grad_()).sum().backward()
    half = x.bfloat16().requires_grad_()
    made = each_job.scale(half, COUNTS, vectors)
    made.sum().backward()
    assert (made.dtype, half.grad.dtype) == (torch.float32, torch.bfloat16)


def test_numbers_that_one_job_has_lost_are_lost_to_it_alone():
    x, weights, vectors = drawn(8, 5), [drawn(2, 5) for _ in range(3)], drawn(3, 5)
    with torch.no_grad():
        x[3] = weights[1][:] = vectors[1] = math.nan  # of the second job
    others = [0, 1, 2, 4, 5, 6, 7]
    for made, trained in (
        (each_job.linear(x, COUNTS, weights), weights),
        (each_job.scale(x, COUNTS, vectors), [vectors]),
    ):
        assert made[others].isfinite().all()
        into_x, *into = gradients(made, [x, *trained])
        assert into_x[others].isfinite().all()
        rows = into if len(into) == 3 else into[0]
        assert [bool(gradient.isfinite().all()) for gradient in rows] == [True, False, True]
