"""Figures of a run, written as lines of JSON, to TensorBoard, and to Weights & Biases where that is wanted."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any, Protocol, TextIO

from torch.utils.tensorboard import SummaryWriter

from synco_fast.config import Config
from synco_fast.runtime.errors import ConfigError

__all__ = ["Lines", "MetricLog", "Sink", "TensorBoard", "WandB", "open_log", "read_metrics"]


class MetricLog:
    """The figures of one run, to whatever keeps them.

    Args:
        sinks: Each gets every line; none on a process that does not write.
    """

    def __init__(self, *sinks: Sink) -> None:
        self._sinks = sinks

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one line of ``kind`` train or evaluation."""
        for sink in self._sinks:
            sink.write(kind, step, values)

    def close(self) -> None:
        """Finish all."""
        for sink in self._sinks:
            sink.close()


class Sink(Protocol):
    """Keeps figures."""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Take one line."""
        ...

    def close(self) -> None:
        """No more lines come."""
        ...


class Lines:
    """``metrics.jsonl``: ``{"kind": ..., "step": ..., **values}`` a line.

    Args:
        folder: The run folder.
        step: Steps that are done already; lines of later steps, from a run that was killed after its checkpoint, are
            dropped.
    """

    def __init__(self, folder: Path, step: int = 0) -> None:
        path = folder / "metrics.jsonl"
        kept = [line for line in read_metrics(folder) if line["step"] <= step]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self._file: TextIO = path.open("a", encoding="utf-8")

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add one line."""
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoard:
    """``tensorboard/`` in the run folder, ``KIND/NAME`` by step; arguments as of `Lines`."""

    def __init__(self, folder: Path, step: int = 0) -> None:
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Add scalars."""
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Write what is buffered."""
        self._board.close()


class WandB:
    """A run of Weights & Biases, the same one when the run goes on.

    Args:
        folder: The run folder, whose name the run gets.
        project: Where it is listed.
        config: What is shown beside it.

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
        """Finish the run there."""
        self._run.finish()


def open_log(folder: Path, step: int, config: Config, *, writes: bool = True) -> MetricLog:
    """Where a run's figures go.

    Args:
        folder: The run folder, which exists.
        step: Steps that are done already.
        config: Names a project of Weights & Biases, or none.
        writes: False on the processes that do not write.
    """
    if not writes:
        return MetricLog()
    sinks: list[Sink] = [Lines(folder, step), TensorBoard(folder, step)]
    if config.training.wandb is not None:
        sinks.append(WandB(folder, config.training.wandb, config.model_dump(mode="json")))
    return MetricLog(*sinks)


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
