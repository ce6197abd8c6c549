"""PyTorch's own kernels, group by group: bit for bit what the modules one after another give."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from synco_fast.kernels.norm import batch_norm, native

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
KINDS = pytest.mark.parametrize(("relu", "added"), list(itertools.product((False, True), repeat=2)))


@pytest.fixture(params=["large", "middle", "small"])
def _size(request, monkeypatch):
    """The paths of x by its size."""
    if request.param != "small":
        monkeypatch.setattr(native, "CACHED", 0)
    if request.param == "large":
        monkeypatch.setattr(native, "APART", 0)


@DTYPES
@LAYOUTS
@KINDS
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.usefixtures("_size")
def test_the_modules_bits(dtype, layout, relu, added, groups):
    x, r = ((torch.randn(12, 5, 4, 6) * 3 + 1).to(dtype, memory_format=layout) for _ in range(2))
    norms = [nn.BatchNorm2d(5) for _ in range(groups)]
    results = []
    for fused in (False, True):
        one, other = (value.clone(memory_format=torch.preserve_format).requires_grad_() for value in (x, r))
        weight, bias, mean, variance = torch.ones(5), torch.zeros(5), torch.zeros(5), torch.ones(5)
        weight.requires_grad_(), bias.requires_grad_()
        if fused:
            residual = other if added else None
            y = batch_norm(one, weight, bias, mean, variance, groups=groups, residual=residual, relu=relu)
        else:
            y = torch.cat([norm(part) for norm, part in zip(norms, one.chunk(groups), strict=True)])
            y = y + other if added else y
            y = y.relu() if relu else y
        y.float().pow(3).sum().backward()
        results.append((y, one.grad, other.grad))
        assert y.is_contiguous(memory_format=layout)
    for plain, found in zip(*results, strict=True):
        assert plain is found is None or torch.equal(plain, found)
    for found, name in ((mean, "running_mean"), (variance, "running_var")):
        expected = torch.stack([getattr(norm, name) for norm in norms]).mean(0)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)
    summed = torch.stack([norm.weight.grad for norm in norms]).sum(0)
    torch.testing.assert_close(weight.grad, summed, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.1, 0.5, 1.0])
def test_groups_one_after_another_move_the_running_statistics_as_their_mean_does(momentum):
    moved = 3.0
    values = [5.0, -1.0, 0.5, 7.0]
    for value, share in zip(values, native._momenta(momentum, 4), strict=True):
        moved += share * (value - moved)
    assert moved == pytest.approx(3.0 + momentum * (sum(values) / 4 - 3.0), rel=1e-15)


def test_only_x_and_y_of_their_size_are_kept(monkeypatch):
    monkeypatch.setattr(native, "CACHED", 0)
    monkeypatch.setattr(native, "APART", 0)
    x = torch.randn(12, 5, 8, 8, requires_grad=True)
    weight, bias = torch.ones(5, requires_grad=True), torch.zeros(5, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: (kept.append(value), value)[1], lambda value: value):
        y = batch_norm(x, weight, bias, None, None, groups=2, residual=torch.randn_like(x), relu=True)
    large = {value.data_ptr() for value in kept if value.numel() >= x.numel()}
    assert large == {x.data_ptr(), y.data_ptr()}


def test_on_another_device_the_modules_calls_are_made():
    x = torch.empty(8, 5, 4, 4, device="meta", requires_grad=True)
    weight, bias, mean, variance = (torch.empty(5, device="meta") for _ in range(4))
    y = batch_norm(x, weight, bias, mean, variance, groups=4, residual=torch.empty_like(x), relu=True)
    assert y.shape == x.shape
    y.sum().backward()
    assert x.grad.shape == x.shape
