"""Metrics: averaged on the device, and read back from ``metrics.jsonl``, which `writers.py` beside it writes."""

from __future__ import annotations

import json
import math
import reprlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from synco_fast.runtime.distributed import mean_over_ranks
from synco_fast.runtime.errors import UserError

__all__ = ["RunningMeans", "read_metrics"]

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 40


class RunningMeans:
    """Means over steps, kept on the device so that no step waits for a value."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._sums: Tensor | None = None
        #: 0 and 1 on the device.
        self._bounds: tuple[Tensor, Tensor] | None = None

    def add(self, metrics: dict[str, Tensor], step_ok: Tensor | None = None) -> None:
        """Add one step's scalars, the same names every time.

        Args:
            metrics: Scalars by name.
            step_ok: A bool scalar; if false, the step is not counted.
        """
        if self._sums is None:
            self._names = list(metrics)
            self._sums = torch.zeros(len(metrics) + 1, dtype=torch.float64, device=metrics[self._names[0]].device)
        if self._bounds is None:
            self._bounds = self._sums.new_zeros((), dtype=torch.float32), self._sums.new_ones((), dtype=torch.float32)
        nothing, one = self._bounds
        step = torch.stack([*(metrics[name].detach() for name in self._names), one])
        self._sums.add_(step if step_ok is None else torch.where(step_ok, step, nothing))

    def pop(self) -> dict[str, float]:
        """The means since the last call, over all processes; NaN (nothing measured) is omitted.

        All processes must call this at the same step.
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
        """The sums since the last `pop`, averaged over processes; called by all at the same step."""
        if self._sums is None:
            return {"sums": {}, "steps": 0.0}
        sums = self._sums.clone()
        mean_over_ranks([sums])
        *values, steps = sums.tolist()
        return {"sums": dict(zip(self._names, values, strict=True)), "steps": steps}

    def load_state_dict(self, state: dict[str, Any], device: torch.device | str = "cpu") -> None:
        """Load from a checkpoint."""
        self._names = list(state["sums"])
        if self._names:
            values = [float(value) for value in state["sums"].values()]
            self._sums = torch.tensor([*values, float(state["steps"])], dtype=torch.float64, device=device)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; an incomplete last line is omitted.

    Raises:
        UserError: A line is not what `JsonlWriter` writes; its number and the reason are named.
    """
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    *whole, rest = path.read_bytes().split(b"\n")
    lines = []
    for number, raw in enumerate((*whole, rest), start=1):
        try:
            if raw.strip():
                lines.append(_metrics_line(raw))
        except ValueError as error:
            if number <= len(whole):
                raise UserError(f"{path}, line {number}: {error}; delete that line, or the file") from error
    return lines


def _metrics_line(raw: bytes) -> dict[str, Any]:
    try:
        line = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError("found no JSON, expected an object") from error
    if not isinstance(line, dict):
        raise ValueError(f"found {type(line).__name__}, expected an object")
    step = line.get("step")
    if type(step) is not int or step < 0:
        raise ValueError(f"found {_SHORT.repr(step)} as its step, expected a whole number from 0 up")
    if not isinstance(line.get("kind"), str):
        raise ValueError(f"found {_SHORT.repr(line.get('kind'))} as its kind, expected train or evaluation")
    for name, value in line.items():
        if name != "kind" and not (isinstance(value, float) or (isinstance(value, int) and abs(value) < 1 << 63)):
            raise ValueError(f"found {_SHORT.repr(value)} as its {_SHORT.repr(name)}, expected a number")
    return line
