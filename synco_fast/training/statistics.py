"""Batch-norm statistics: restored when a step is skipped, averaged over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synco_fast.runtime.distributed import mean_over_ranks

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The floating-point buffers of modules: running means and variances.

    Args:
        modules: The modules.
    """

    def __init__(self, *modules: nn.Module) -> None:
        self._buffers = [buffer for module in modules for buffer in module.buffers() if buffer.dtype == torch.float32]
        # Bit-cast to int32 so that multiplying by 0 also clears NaNs.
        self._bits = [buffer.view(torch.int32) for buffer in self._buffers]
        self._copies: list[Tensor] = []

    @torch.no_grad()
    def copy(self) -> list[Tensor]:
        """Copies of the buffers, overwritten by the next call."""
        if not self._copies:
            self._copies = [torch.empty_like(bits) for bits in self._bits]
        if self._copies:
            torch._foreach_copy_(self._copies, self._bits)
        return self._copies

    @torch.no_grad()
    def restore(self, copies: list[Tensor], step_ok: Tensor) -> None:
        """Restore the copies unless ``step_ok``, a bool scalar; the host never waits."""
        if not copies or (step_ok.device.type == "cpu" and bool(step_ok)):
            return
        keep = step_ok.to(torch.int32)
        torch._foreach_mul_(self._bits, keep)
        torch._foreach_mul_(copies, 1 - keep)
        torch._foreach_add_(self._bits, copies)

    @torch.no_grad()
    def average(self) -> None:
        """Replace the buffers by their mean over processes.

        A running statistic is a weighted sum over steps, so averaging now equals averaging in every step.
        """
        mean_over_ranks(self._buffers)
