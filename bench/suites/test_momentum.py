"""The momentum update of ResNet-50: one launch per parameter, `torch._foreach`, and the one-launch kernel."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn import Parameter
from torchvision.models import resnet50

from synco_fast.kernels import momentum_update

Timed = Callable[[Callable[[], object]], None]
Pairs = tuple[list[Parameter], list[Parameter]]


@pytest.fixture
def pairs(device: torch.device) -> Pairs:
    """The parameters of two encoders."""
    key, query = (list(resnet50().to(device).parameters()) for _ in range(2))
    return key, query


def test_one_by_one(timed: Timed, pairs: Pairs) -> None:
    """The released code's form."""

    @torch.no_grad()
    def update() -> None:
        for k, q in zip(*pairs, strict=True):
            k.mul_(0.999).add_(q, alpha=0.001)

    timed(update)


def test_foreach(timed: Timed, pairs: Pairs) -> None:
    """The default in training."""
    timed(lambda: momentum_update(*pairs, 0.999))


def test_one_launch(timed: Timed, pairs: Pairs, device: torch.device) -> None:
    """The Triton kernel. Its tables are built once."""
    if device.type != "cuda":
        pytest.skip("the kernel runs on CUDA devices")
    timed(lambda: momentum_update(*pairs, 0.999, backend="triton"))
