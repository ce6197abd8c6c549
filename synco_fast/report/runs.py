"""Reading run folders, and figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synco_fast.config import Config, build_config
from synco_fast.runtime.checkpoint import newest_checkpoint, step_of
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import read_json
from synco_fast.runtime.results import Result, columns, read_results
from synco_fast.runtime.run_config import read_run_config
from synco_fast.training.run.metrics import read_metrics

__all__ = ["IN_TRAINING", "Run", "accuracy_columns", "mean_and_deviation", "read_run"]


IN_TRAINING = "kNN in training"
"""The title of the column of a run's last periodic kNN."""


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: The folder.
        config: Its configuration.
        summary: The content of ``summary.json``; empty for an unfinished run.
        environment: Versions, device, commit.
        train: Training lines of ``metrics.jsonl``.
        evaluations: Lines of the periodic kNN.
        results: The results below ``evaluation/`` that are of the newest checkpoint.
        notes: A line about each result of another checkpoint, which is skipped.
    """

    folder: Path
    config: Config
    summary: dict[str, Any]
    environment: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    results: list[Result]
    notes: list[str]

    def own(self, name: str) -> Result | None:
        """The result of an evaluation on the run's own images."""
        return next((found for found in self.results if found.name == name and found.source is None), None)

    @property
    def knn(self) -> float | None:
        """The kNN accuracy of ``evaluate knn`` with the run's own k and temperature, else the run's last one."""
        own, result = self.config.evaluation, self.own("knn")
        values = result.values if result else {}
        found = None
        if values.get("temperature", own.temperature) == own.temperature:
            found = values["accuracies"].get(str(own.k)) if "accuracies" in values else values.get("knn")
        found = self.summary.get("knn_after") if found is None else found
        return float(found) if found is not None else None

    @property
    def probe(self) -> Result | None:
        """The linear probe by the published protocol, else by the fast variant, on the run's own images."""
        return self.own("linear") or self.own("linear_fast")

    @property
    def accuracies(self) -> dict[str, float]:
        """The accuracies that comparisons and studies have a column for, by its title, see `accuracy_columns`."""
        found = {title: value for result in self.results for title, value in result.columns.items()}
        last = self.summary.get("knn_after")
        return {**({} if last is None else {IN_TRAINING: float(last)}), **found}

    @property
    def throughput(self) -> float | None:
        """Images per second of training."""
        found = self.summary.get("images_per_second")
        return float(found) if found else None

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing."""
        others = (found.values.get("chance") for found in self.results if found.source is None)
        found = self.summary.get("chance") or next((value for value in others if value), None)
        return float(found) if found else None


def accuracy_columns(runs: Sequence[Run]) -> list[str]:
    """The titles of every run's accuracies, in order; a column mixes neither protocols nor images."""
    first = [IN_TRAINING] if any(IN_TRAINING in run.accuracies for run in runs) else []
    return first + columns(result for run in runs for result in run.results)


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: The folder is not a run, or a file in it is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run: found no run in {folder}, expected a folder with a config.yaml")
    config = build_config(read_run_config(folder))
    summary = read_json(folder / "summary.json")
    lines = read_metrics(folder)
    own = config.evaluation.source or config.data.source
    results, notes = read_results(folder / "evaluation", own=own, step=_step_of(folder, summary))
    return Run(
        folder=folder,
        config=config,
        summary=summary,
        environment=read_json(folder / "environment.json"),
        train=[line for line in lines if line["kind"] == "train" and "epoch" in line],
        evaluations=[line for line in lines if line["kind"] == "evaluation" and {"epoch", "knn"} <= line.keys()],
        results=results,
        notes=notes,
    )


def _step_of(folder: Path, summary: dict[str, Any]) -> int | None:
    """The step of the newest checkpoint; without any, that of the summary, if it has one."""
    newest = newest_checkpoint(folder)
    step = summary.get("steps") if newest is None else step_of(newest)
    return None if step is None else int(step)


def mean_and_deviation(values: Collection[float]) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 for one value); None for no value."""
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
