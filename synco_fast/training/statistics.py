"""Batch-norm statistics around a step: put back where the step is left out, averaged where processes differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synco_fast.runtime.collectives import mean_over_ranks

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The floating-point buffers of some modules, such as running means and variances.

    Args:
        modules: Whose buffers.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers() if buffer.dtype == torch.float32]
        # As whole numbers, of which a NaN is one like any other: nought times it is nought.
        self._bits = [buffer.view(torch.int32) for buffer in self._buffers]
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def copy(self) -> list[Tensor]:
        """What they hold now, in tensors that the next call writes over."""
        if not self._copies:
            self._copies = [torch.empty_like(bits) for bits in self._bits]
        if self._copies:
            torch._foreach_copy_(self._copies, self._bits)
        return self._copies

    @torch.no_grad()
    def put_back(self, copies: list[Tensor], accept: Tensor) -> None:
        """Undo what happened since `copy` unless ``accept``, bool of no dimensions; the host never waits for it."""
        if not copies or (accept.device.type == "cpu" and bool(accept)):
            return
        keep = accept.to(torch.int32)
        torch._foreach_mul_(self._bits, keep)
        torch._foreach_mul_(copies, 1 - keep)
        torch._foreach_add_(self._bits, copies)

    @torch.no_grad()
    def average(self) -> None:
        """Replace them by their mean over the processes.

        A running statistic is a weighted sum of those of the steps, so the mean taken now is what a mean in every step
        would have led to.
        """
        mean_over_ranks(self._buffers)
