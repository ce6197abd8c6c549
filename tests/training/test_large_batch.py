"""LARS and LAMB against timm's, skipped by a tensor, and without a wait for it."""

from __future__ import annotations

import copy

import pytest
import timm.optim
import torch
from torch import nn

from synco_fast.config import OptimizerConfig
from synco_fast.runtime.optim_step import OptimStep
from synco_fast.training.step.optimizer import build_optimizer
from synco_fast.training.tuning.audit import OperationCounter

CPU = torch.device("cpu")


def model():
    torch.manual_seed(0)
    # No bias before batch norm: its gradient would be rounding, which LAMB makes steps of full size from.
    return nn.Sequential(nn.Linear(5, 4, bias=False), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))


def ours(net, name):
    return build_optimizer(net, OptimizerConfig(name=name, weight_decay=0.1), lr=0.3, device=CPU)


def theirs(net, name):
    groups = [
        {"params": [p for p in net.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in net.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    if name == "lars":
        return timm.optim.Lars(groups, lr=0.3, momentum=0.9)
    return timm.optim.Lamb(groups, lr=0.3, betas=(0.9, 0.999))


def grow(net, number):
    """A gradient that is now and then larger than LAMB's clip."""
    net.zero_grad()
    x = torch.randn(8, 5, generator=torch.Generator().manual_seed(number))
    (net(x).square().mean() * (1 + 30 * (number % 3 == 1))).backward()


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_each_is_timms(name):
    one, other = model(), model()
    with torch.no_grad():
        one[3].weight.zero_()  # a norm of 0 is not adapted
        other[3].weight.zero_()
    mine, reference = ours(one, name), theirs(other, name)
    for number in range(12):
        for net, optimizer in ((one, mine), (other, reference)):
            for group in optimizer.param_groups:
                group["lr"] = 0.3 / (1 + number)
            grow(net, number)
            optimizer.step()
        for a, b in zip(one.parameters(), other.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), number


@pytest.mark.parametrize("name", ["lars", "lamb"])
def test_a_checkpoint_of_timms_goes_on(name):
    one, other = model(), model()
    reference = theirs(one, name)
    for number in range(3):
        grow(one, number)
        reference.step()
    other.load_state_dict(one.state_dict())
    mine = ours(other, name)
    mine.load_state_dict(copy.deepcopy(reference.state_dict()))
    for number in range(3, 6):
        for net, optimizer in ((one, reference), (other, mine)):
            grow(net, number)
            optimizer.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "lamb"])
@pytest.mark.parametrize("tensor_rate", [False, True])
def test_skipped_on_the_device_is_never_done(name, tensor_rate):
    """Also the very first step; the host never asks, and a rate on the device is the same rate."""
    one, other = model(), model()
    skipping, plain = ours(one, name), ours(other, name)
    if tensor_rate:
        for group in skipping.param_groups:
            group["lr"] = torch.tensor(0.3)
    update = OptimStep(skipping, scaled=False, device=CPU)
    update._on_device = True
    for number, bad in enumerate((True, False, False, True, False)):
        grow(one, number)
        if bad:
            one[0].weight.grad[0, 0] = torch.nan
            one[3].bias.grad[0] = torch.inf
        before = [parameter.detach().clone() for parameter in one.parameters()]
        with OperationCounter() as counter:
            accept, _ = update.step()
        met = {operation for counts in counter.counts.values() for operation in counts}
        assert "aten::_local_scalar_dense" not in met, "the host waits"
        assert bool(accept) != bad
        if bad:
            assert all(torch.equal(a, b) for a, b in zip(one.parameters(), before, strict=True))
        else:
            grow(other, number)
            plain.step()
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-6)
    for a, b in zip(skipping.state.values(), plain.state.values(), strict=True):
        assert a.keys() == b.keys()
        assert all(torch.allclose(a[key], b[key], rtol=1e-5, atol=1e-6) for key in a)


def test_an_optimizer_that_asks_a_scaler_is_told():
    """As apex's capturable ones do, which take no attribute ``found_inf``."""

    class Asks(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            weight = self.param_groups[0]["params"][0]
            found = grad_scaler._check_inf_per_device(self)[weight.device]
            assert (found.shape, float(grad_scaler._get_scale_async())) == ((1,), 1.0)
            with torch.no_grad():
                weight.copy_(torch.where(found.bool(), weight, weight - 0.5 * weight.grad))

    weight = nn.Parameter(torch.tensor([3.0, 4.0]))
    update = OptimStep(Asks([weight], lr=1.0), scaled=False, device=CPU)
    update._on_device = True
    for factor, expected in ((torch.nan, [3.0, 4.0]), (1.0, [1.5, 2.0])):
        weight.grad = None
        update.backward((weight.square() / 2 * factor).sum())
        update.step()
        assert weight.tolist() == expected
