"""A backward pass and a step of the optimiser, with losses scaled where sixteen bits need it."""

from __future__ import annotations

import torch
from torch import Tensor

from synco_fast.runtime.precision import Precision

__all__ = ["Update"]


class Update:
    """Call it with a loss and an optimiser; with fp16, a step with infinite gradients is skipped.

    Args:
        precision: Of the forward passes.
    """

    def __init__(self, precision: Precision) -> None:
        self.scaler = torch.amp.GradScaler(precision.device.type, enabled=precision.name == "fp16")

    def __call__(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        """One step, from no gradients to moved weights."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(optimizer)
        self.scaler.update()
