"""Batch-norm statistics: restored when a step is skipped, averaged over processes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from synco_fast.runtime.distributed import mean_over_ranks

__all__ = ["RunningStatistics"]


class RunningStatistics:
    """The floating-point buffers of modules: running means and variances.

    They are stored in one tensor, and each module's buffer becomes a view of it. A copy, a restoration and a mean over
    processes are then one launch each, whatever the number of layers.

    Args:
        modules: The modules, already on their device.
    """

    def __init__(self, *modules: nn.Module) -> None:
        found: dict[int, Tensor] = {
            id(buffer): buffer for module in modules for buffer in module.buffers() if buffer.dtype == torch.float32
        }
        self._all: Tensor | None = None
        self._copy: Tensor | None = None
        if not found:
            return
        self._all = torch.cat([buffer.detach().reshape(-1) for buffer in found.values()])
        self._copy = torch.empty_like(self._all)
        sizes = [buffer.numel() for buffer in found.values()]
        parts = dict(zip(found, self._all.split(sizes), strict=True))
        for module in modules:
            for inner in module.modules():
                for name, buffer in inner._buffers.items():
                    if buffer is not None and id(buffer) in parts:
                        inner._buffers[name] = parts[id(buffer)].view(buffer.shape)

    @torch.no_grad()
    def copy(self) -> Tensor | None:
        """Their current values, in a tensor that the next call overwrites; None if there are none."""
        if self._all is not None and self._copy is not None:
            self._copy.copy_(self._all)
        return self._copy

    @torch.no_grad()
    def restore(self, copy: Tensor | None, step_ok: Tensor) -> None:
        """Restore the values of `copy` unless ``step_ok``, a bool scalar; without a host synchronisation."""
        if self._all is not None and copy is not None:
            torch.where(step_ok, self._all, copy, out=self._all)

    @torch.no_grad()
    def average(self) -> None:
        """Replace the buffers by their mean over processes.

        A running statistic is a weighted sum over steps, so averaging now equals averaging in every step.
        """
        if self._all is not None:
            mean_over_ranks([self._all])
