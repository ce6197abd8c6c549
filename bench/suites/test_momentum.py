"""The momentum update of ResNet-50's parameters: a launch for each, by `torch._foreach`, and the one-launch kernel."""

from __future__ import annotations

import pytest
import torch
from torchvision.models import resnet50

from synco_fast.kernels import momentum_update


@pytest.fixture
def pairs(device):
    """Parameters of two encoders."""
    return [list(resnet50().to(device).parameters()) for _ in range(2)]


def test_one_by_one(timed, pairs):
    """As the released code does it."""

    @torch.no_grad()
    def update():
        for k, q in zip(*pairs, strict=True):
            k.mul_(0.999).add_(q, alpha=0.001)

    timed(update)


def test_foreach(timed, pairs):
    """What training uses."""
    timed(lambda: momentum_update(*pairs, 0.999))


def test_one_launch(timed, pairs, device):
    """The Triton kernel, whose tables are made once."""
    if device.type != "cuda":
        pytest.skip("the kernel runs on CUDA devices")
    from synco_fast.kernels.triton.momentum import Plan, update

    plan = Plan(*([tensor.detach() for tensor in side] for side in pairs))
    timed(lambda: update(plan, 0.999))
