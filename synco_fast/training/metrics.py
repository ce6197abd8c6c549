"""Metrics: averaged on the device, logged as JSON lines, to TensorBoard, and to Weights & Biases."""

from __future__ import annotations

import importlib
import json
import math
import reprlib
from pathlib import Path
from typing import Any, Protocol, TextIO

import torch
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from synco_fast.runtime.distributed import mean_over_ranks
from synco_fast.runtime.errors import ConfigError, UserError
from synco_fast.runtime.files import write_text

__all__ = [
    "JsonlLogger",
    "Logger",
    "MetricLog",
    "RunningMeans",
    "TensorBoardLogger",
    "WandBLogger",
    "open_log",
    "read_metrics",
]

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


class MetricLog:
    """Writes the metrics of a run to all loggers.

    Args:
        loggers: Each gets every line; none on processes that do not write.
    """

    def __init__(self, *loggers: Logger) -> None:
        self._loggers = loggers

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of ``kind`` train or evaluation."""
        for logger in self._loggers:
            logger.write(kind, step, values)

    def close(self) -> None:
        """Close all loggers."""
        for logger in self._loggers:
            logger.close()


class Logger(Protocol):
    """A destination of metrics."""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line."""
        ...

    def close(self) -> None:
        """Close the logger."""
        ...


class JsonlLogger:
    """``metrics.jsonl``: ``{"kind": ..., "step": ..., **values}`` a line.

    Args:
        folder: The run folder.
        step: Completed steps; later lines, from a run that was killed after its checkpoint, are dropped.
        evaluated: Whether the evaluation at that step is complete. If not, its line is dropped, since it is repeated.
    """

    def __init__(self, folder: Path, step: int = 0, *, evaluated: bool = True) -> None:
        path = folder / "metrics.jsonl"
        kept = [
            line
            for line in read_metrics(folder)
            if line["step"] < step or (line["step"] == step and (evaluated or line["kind"] != "evaluation"))
        ]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one line."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardLogger:
    """``tensorboard/`` in the run folder, ``KIND/NAME`` by step; arguments of `JsonlLogger`."""

    def __init__(self, folder: Path, step: int = 0, *, evaluated: bool = True) -> None:
        board = folder / "tensorboard"
        first = step + 1 if evaluated else step
        self._board = SummaryWriter(str(board), purge_step=first if board.exists() else None)
        # TensorBoard drops all lines of a step, so those that stay are written again.
        for line in [] if evaluated else read_metrics(folder):
            if line["step"] == step and line["kind"] != "evaluation":
                values = {name: value for name, value in line.items() if name not in ("kind", "step")}
                self.write(line["kind"], step, values)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close."""
        self._board.close()


class WandBLogger:
    """A run on Weights & Biases, continued when the run resumes.

    Args:
        folder: The run folder; its name becomes the run's name.
        project: The project.
        config: The configuration to log.

    Raises:
        ConfigError: The package is not installed.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        try:
            wandb = importlib.import_module("wandb")
        except ImportError as error:
            raise ConfigError("training.wandb: found no package wandb, expected after pip install wandb") from error
        name = folder.resolve().name
        self._run = wandb.init(project=project, name=name, id=name, dir=str(folder), config=config, resume="allow")

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log one line."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


def open_log(
    folder: Path,
    step: int,
    config: dict[str, Any],
    *,
    evaluated: bool = True,
    wandb: str | None = None,
    writes: bool = True,
) -> MetricLog:
    """Open the loggers of a run.

    Args:
        folder: The run folder, which exists.
        step: Completed steps.
        evaluated: Whether the evaluation at that step is complete; if not, it is repeated.
        config: The configuration to log to Weights & Biases.
        wandb: A project of Weights & Biases, or None.
        writes: False on the processes that do not write.

    Raises:
        ConfigError: A project is named and the package is not installed.
    """
    if not writes:
        return MetricLog()
    loggers: list[Logger] = [
        JsonlLogger(folder, step, evaluated=evaluated),
        TensorBoardLogger(folder, step, evaluated=evaluated),
    ]
    if wandb is not None:
        loggers.append(WandBLogger(folder, wandb, config))
    return MetricLog(*loggers)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's ``metrics.jsonl``; an incomplete last line is omitted.

    Raises:
        UserError: A line is not what `JsonlLogger` writes; its number and the reason are named.
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
