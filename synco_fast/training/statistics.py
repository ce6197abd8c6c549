"""Batch-norm statistics around a step: restored when the step is skipped, averaged where processes differ."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synco_fast.runtime.distributed import mean_over_ranks

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The floating-point buffers of some modules, such as running means and variances.

    Args:
        modules: Whose buffers.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers() if buffer.dtype == torch.float32]
        # Bit-cast to int32 so that multiplying by 0 also clears NaNs.
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
    def restore(self, copies: list[Tensor], step_ok: Tensor) -> None:
        """Undo what happened since `copy` unless ``step_ok``, bool of no dimensions; the host never waits for it."""
        if not copies or (step_ok.device.type == "cpu" and bool(step_ok)):
            return
        keep = step_ok.to(torch.int32)
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
