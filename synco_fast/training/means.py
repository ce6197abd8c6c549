"""Figures of a run, averaged on the device."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from synco_fast.runtime.collectives import mean_over_ranks

__all__ = ["RunningMeans"]


class RunningMeans:
    """Means over steps, kept on the device so that no step waits for a figure; all figures are added together."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None

    def add(self, metrics: dict[str, Tensor], accept: Tensor | None = None) -> None:
        """Take in one step's scalars, the same names every time.

        Args:
            metrics: By name.
            accept: Bool of no dimensions; where it is false the step is not counted.
        """
        if self._sums is None:
            self._names = list(metrics)
            self._sums = torch.zeros(len(metrics) + 1, dtype=torch.float64, device=metrics[self._names[0]].device)
        values = torch.stack([metrics[name].detach() for name in self._names]).double()
        step = torch.cat([values, values.new_ones(1)])
        self._sums.add_(step if accept is None else torch.where(accept, step, 0.0))

    def take(self) -> dict[str, float]:
        """The means since the last call, over all processes; what was not a number (nothing to measure) is left out.

        Every process of a job must call this at the same step.
        """
        if self._sums is None:
            return {}
        mean_over_ranks([self._sums])
        *sums, steps = self._sums.tolist()
        self._sums.zero_()
        if not steps:
            return {}
        means = zip(self._names, (value / steps for value in sums), strict=True)
        return {name: mean for name, mean in means if not math.isnan(mean)}

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last `take`, as its mean over processes; called by all of them at the same step."""
        if self._sums is None:
            return {"sums": {}, "steps": 0.0}
        sums = self._sums.clone()
        mean_over_ranks([sums])
        *values, steps = sums.tolist()
        return {"sums": dict(zip(self._names, values, strict=True)), "steps": steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Take over from a checkpoint."""
        self._names = list(state["sums"])
        if self._names:
            values = [float(value) for value in state["sums"].values()]
            self._sums = torch.tensor([*values, float(state["steps"])], dtype=torch.float64, device=device)
