"""Figures of a run: averaged on the device, written as lines of JSON and to TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

__all__ = ["MetricLog", "RunningMeans", "read_metrics"]


class RunningMeans:
    """Means over steps, kept on the device so that no step waits for a figure."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._steps = 0

    def add(self, metrics: dict[str, Tensor]) -> None:
        """Take in one step's scalars."""
        self._steps += 1
        for name, value in metrics.items():
            value = value.detach().double()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def take(self) -> dict[str, float]:
        """The means since the last call; a figure that was not a number (nothing to measure) is left out."""
        if not self._sums:
            return {}
        names, steps = list(self._sums), self._steps
        means = (torch.stack([self._sums[name] for name in names]) / steps).tolist()
        self._sums, self._steps = {}, 0
        return {name: mean for name, mean in zip(names, means, strict=True) if not math.isnan(mean)}

    def state_dict(self) -> dict[str, Any]:
        """What was added since the last `take`."""
        return {"sums": {name: value.cpu() for name, value in self._sums.items()}, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over from a checkpoint."""
        self._sums, self._steps = dict(state["sums"]), state["steps"]


class MetricLog:
    """``metrics.jsonl`` and TensorBoard files of one run.

    Args:
        folder: The run folder.
        step: Steps that are done already; lines of later steps, from a run that was killed after its checkpoint, are
            dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        self._path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file: TextIO = self._path.open("a", encoding="utf-8")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one line: ``{"kind": ..., "step": ..., **values}``."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Finish both."""
        self._file.close()
        self._board.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; a last line that was cut short is left out."""
    path = folder / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines
