"""Writers of a run's metrics: JSON lines, TensorBoard, Weights & Biases, MLflow.

A further tracker is a class with `write` and `close`, constructed from run folder, name and configuration, and a row of
`TRACKERS`.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from secrets import token_hex
from typing import Any, Protocol, TextIO

from torch.utils.tensorboard import SummaryWriter

from synco_fast.runtime.errors import ConfigError, UserError, first_line
from synco_fast.runtime.files import read_json, write_json, write_text
from synco_fast.training.run.metrics import read_metrics

__all__ = [
    "TRACKERS",
    "JsonlWriter",
    "MetricLog",
    "MlflowWriter",
    "TensorBoardWriter",
    "WandbWriter",
    "Writer",
    "open_log",
]

#: Parameters of a run that MLflow takes in one call, and characters of one of them.
_PARAMETERS, _CHARACTERS = 100, 500
#: Characters of a server's reason in a message.
_REASON = 240


class Writer(Protocol):
    """A destination of metrics."""

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write the values of one step; ``kind`` is train or evaluation."""
        ...

    def close(self) -> None:
        """Flush and close."""
        ...


class MetricLog:
    """Writes the metrics of a run to all writers.

    Args:
        writers: Each gets every line; none on processes that do not write.
    """

    def __init__(self, *writers: Writer) -> None:
        self._writers = writers

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Write one line of ``kind`` train or evaluation."""
        for writer in self._writers:
            writer.write(kind, step, values)

    def close(self) -> None:
        """Close all writers."""
        for writer in self._writers:
            writer.close()


class JsonlWriter:
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
        """Add one line.

        Raises:
            FileNotFoundError: The file was removed; TensorBoard would say it by a traceback of its thread.
        """
        if not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._file.name)
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardWriter:
    """``tensorboard/`` in the run folder, ``KIND/NAME`` by step; arguments of `JsonlWriter`."""

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


class WandbWriter:
    """A run on Weights & Biases, continued when the run resumes; ``wandb.json`` in the run folder names it.

    Args:
        folder: The run folder; its name becomes the run's name.
        project: The project.
        config: The configuration to log.

    Raises:
        ConfigError: The package is not installed.
        UserError: ``wandb.json`` is damaged, or the server refuses the run, such as without a key.
    """

    def __init__(self, folder: Path, project: str, config: dict[str, Any]) -> None:
        wandb = _package("wandb", "wandb")
        name, run = folder.resolve().name, self._id(folder, project)
        # Kept first: a folder that W&B has written to without it counts as an older one.
        write_json(folder / "wandb.json", {"project": project, "run": run})
        try:
            self._run = wandb.init(project=project, name=name, id=run, dir=str(folder), config=config, resume="allow")
        except wandb.errors.Error as error:
            raise UserError(
                f"training.wandb: found no way to log to {project!r} ({first_line(error, _REASON)}), expected a key "
                "and a connection, or WANDB_MODE=offline to log to the run folder alone"
            ) from error

    @staticmethod
    def _id(folder: Path, project: str) -> str:
        """The id of the run, new or continued; random, since folders of one name would share one."""
        kept = read_json(folder / "wandb.json")
        if kept.get("project") == project and isinstance(kept.get("run"), str):
            return str(kept["run"])
        if not kept and (folder / "wandb").is_dir():  # logged by a version that took the folder's name
            return folder.resolve().name
        return token_hex(8)

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log one line."""
        self._run.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MlflowWriter:
    """A run on MLflow, continued when the run resumes; ``mlflow.json`` in the run folder names it.

    The server is MLflow's own setting, ``MLFLOW_TRACKING_URI``. No active run of the process is touched.

    Args:
        folder: The run folder; its name becomes the run's name.
        experiment: The experiment, created if there is none of that name.
        config: The configuration, logged as parameters ``section.key``.

    Raises:
        ConfigError: The package is not installed.
        UserError: The server refuses the experiment or the run.
    """

    def __init__(self, folder: Path, experiment: str, config: dict[str, Any]) -> None:
        mlflow = _package("mlflow", "mlflow")
        self._entities: Any = mlflow.entities
        self._refusal: type[Exception] = mlflow.exceptions.MlflowException
        self._gone = False
        try:
            self._client: Any = mlflow.MlflowClient()
            self._run = self._begin(folder, experiment, dict(_flat(config)))
        except self._refusal as error:
            raise UserError(
                f"training.mlflow: found no way to log to {experiment!r} ({first_line(error, _REASON)})"
            ) from error

    def _begin(self, folder: Path, experiment: str, parameters: dict[str, str]) -> str:
        """The id of the run, new or continued."""
        kept = read_json(folder / "mlflow.json")
        if kept.get("experiment") == experiment and isinstance(kept.get("run"), str):
            self._client.update_run(kept["run"], status="RUNNING")
            return str(kept["run"])
        found = self._client.get_experiment_by_name(experiment)
        number = self._client.create_experiment(experiment) if found is None else found.experiment_id
        run = str(self._client.create_run(number, run_name=folder.resolve().name).info.run_id)
        rows = [self._entities.Param(key, value) for key, value in parameters.items()]
        for first in range(0, len(rows), _PARAMETERS):
            self._client.log_batch(run, params=rows[first : first + _PARAMETERS])
        write_json(folder / "mlflow.json", {"experiment": experiment, "run": run})
        return run

    def write(self, kind: str, step: int, values: dict[str, float]) -> None:
        """Log one line in one call; after a failure nothing more is logged, since each try may take minutes."""
        if self._gone:
            return
        now = int(time.time() * 1000)
        rows = [self._entities.Metric(f"{kind}/{name}", value, now, step) for name, value in values.items()]
        with self._forgiving(f"log step {step}"):
            self._client.log_batch(self._run, metrics=rows)

    def close(self) -> None:
        """Mark the run as finished; one that resumes is marked as running again."""
        if self._gone:
            return
        with self._forgiving("finish the run"):
            self._client.set_terminated(self._run)

    @contextmanager
    def _forgiving(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._refusal as error:
            self._gone = True
            warnings.warn(
                f"training.mlflow: found no way to {what} ({first_line(error, _REASON)}): the rest is in metrics.jsonl "
                "alone",
                stacklevel=3,
            )


#: Trackers by key of the section ``training``, whose value is the project or experiment.
TRACKERS: dict[str, Callable[[Path, str, dict[str, Any]], Writer]] = {"wandb": WandbWriter, "mlflow": MlflowWriter}


def open_log(
    folder: Path,
    step: int,
    config: dict[str, Any],
    *,
    evaluated: bool = True,
    trackers: Mapping[str, str | None],
    writes: bool = True,
) -> MetricLog:
    """Open the writers of a run.

    Args:
        folder: The run folder, which exists.
        step: Completed steps.
        evaluated: Whether the evaluation at that step is complete; if not, it is repeated.
        config: The configuration, which trackers log beside the metrics.
        trackers: By name in `TRACKERS`, a project or experiment; None for a tracker that is off.
        writes: False on the processes that do not write.

    Raises:
        UserError: A tracker's package is not installed, or its server refuses the run.
    """
    if not writes:
        return MetricLog()
    # Trackers first: where one refuses, no file of the run has changed.
    others = [TRACKERS[name](folder, value, config) for name, value in trackers.items() if value is not None]
    return MetricLog(
        JsonlWriter(folder, step, evaluated=evaluated), TensorBoardWriter(folder, step, evaluated=evaluated), *others
    )


def _package(name: str, extra: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(
            f"training.{name}: found no package {name}, expected after pip install 'synco-fast[{extra}]'"
        ) from error


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every key of a configuration by its dotted name, as short text."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", str(value)[:_CHARACTERS]
