"""The formula: PyTorch's modules one after another in float64, finite differences, and the closed-form gradient."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from synco_fast.kernels.norm import batch_norm, reference

KINDS = pytest.mark.parametrize(("relu", "added"), list(itertools.product((False, True), repeat=2)))
GROUPS = pytest.mark.parametrize("groups", [1, 2, 3])


def inputs(shape=(6, 4, 3, 2), dtype=torch.float64):
    x, r = (torch.randn(shape, dtype=dtype) * 2 + 1 for _ in range(2))
    weight, bias = torch.randn(2, shape[1], dtype=dtype)
    return [value.requires_grad_() for value in (x, weight, bias, r)]


def modules(x, weight, bias, r, groups, relu, **settings):
    """BatchNorm2d of each part, then add, then ReLU; and the modules."""
    norms = [nn.BatchNorm2d(x.shape[1], dtype=x.dtype, **settings) for _ in range(groups)]
    parts = []
    for norm, part in zip(norms, x.chunk(groups), strict=True):
        del norm.weight, norm.bias
        norm.weight, norm.bias = weight, bias
        parts.append(norm(part))
    y = torch.cat(parts)
    y = y if r is None else y + r
    return (y.relu() if relu else y), norms


@GROUPS
@KINDS
def test_is_pytorchs_modules_one_after_another(groups, relu, added):
    x, weight, bias, r = inputs()
    r = r if added else None
    expected, norms = modules(x, weight, bias, r, groups, relu)
    mean, variance, tracked = torch.zeros(4).double(), torch.ones(4).double(), torch.tensor(0)
    settings = {"groups": groups, "residual": r, "relu": relu, "backend": "reference"}
    found = batch_norm(x, weight, bias, mean, variance, num_batches_tracked=tracked, **settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mean, torch.stack([norm.running_mean for norm in norms]).mean(0), rtol=1e-12, atol=0)
    torch.testing.assert_close(variance, torch.stack([norm.running_var for norm in norms]).mean(0), rtol=1e-12, atol=0)
    assert tracked == 1
    wanted = [x, weight, bias] + ([r] if added else [])
    up = torch.randn_like(expected)
    pairs = zip(torch.autograd.grad(found, wanted, up), torch.autograd.grad(expected, wanted, up), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(relu, added, training):
    x, weight, bias, r = inputs((4, 2, 2, 2))

    def compute(x, weight, bias, r):
        settings = {"groups": 2, "residual": r if added else None, "relu": relu, "training": training}
        running = torch.tensor([0.3, -0.2]).double(), torch.tensor([2.0, 0.5]).double()
        return batch_norm(x, weight, bias, *running, **settings, backend="reference")

    assert torch.autograd.gradcheck(compute, (x, weight, bias, r))
    assert torch.autograd.gradgradcheck(compute, (x, weight, bias, r))


@GROUPS
@KINDS
@pytest.mark.parametrize("training", [True, False])
def test_closed_form_gradient_is_autograds(groups, relu, added, training):
    x, weight, bias, r = inputs()
    mean, variance = reference.statistics(x, groups) if training else (torch.randn(1, 4).double(), torch.rand(1, 4) + 1)
    y = reference.normalise(x, mean, variance, weight, bias, r if added else None, relu=relu, eps=1e-5)
    up = torch.randn_like(y)
    wanted = [x, weight, bias] + ([r] if added else [])
    expected = torch.autograd.grad(y, wanted, up)
    positive = y > 0 if relu else None
    found = reference.gradients(up, x, mean, variance, weight, positive, training=training, eps=1e-5)
    for one, other in zip((found.x, found.weight, found.bias, found.residual), expected, strict=False):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


def test_cumulative_mean_of_the_statistics():
    norm, (mean, variance, tracked) = (
        nn.BatchNorm2d(4, momentum=None),
        (torch.zeros(4), torch.ones(4), torch.tensor(0)),
    )
    for _ in range(3):
        x = torch.randn(6, 4, 3, 2) * 2 + 1
        norm(x)
        batch_norm(x, None, None, mean, variance, momentum=None, num_batches_tracked=tracked, backend="reference")
    torch.testing.assert_close(mean, norm.running_mean)
    torch.testing.assert_close(variance, norm.running_var)
    assert tracked == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype):
    x, weight, bias, r = (value.detach().to(dtype) for value in inputs())
    found = batch_norm(x, weight, bias, None, None, groups=2, residual=r, relu=True, backend="reference")
    exact = batch_norm(
        *(value.double() for value in (x, weight, bias)),
        None,
        None,
        groups=2,
        residual=r.double(),
        relu=True,
        backend="reference",
    )
    assert found.dtype == dtype
    assert (found - exact).abs().max() <= torch.finfo(dtype).eps / 2 * exact.max() * 1.001
