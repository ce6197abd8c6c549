"""Reading run folders, and figures over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from synco_fast.config import Config, build_config
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import read_json
from synco_fast.runtime.run_config import read_run_config
from synco_fast.training.metrics import read_metrics

__all__ = ["PROBES", "Run", "mean_and_deviation", "probe_title", "read_run"]


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
        results: The JSON files below ``evaluation/`` by name.
    """

    folder: Path
    config: Config
    summary: dict[str, Any]
    environment: dict[str, Any]
    train: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    results: dict[str, dict[str, Any]]

    @property
    def knn(self) -> float | None:
        """The kNN accuracy of ``evaluate knn``, else the run's last one."""
        found = self.results.get("knn", {}).get("knn", self.summary.get("knn_after"))
        return float(found) if found is not None else None

    @property
    def linear(self) -> float | None:
        """The linear probe's accuracy by the published protocol, else by the fast variant."""
        for name in ("linear", "linear_fast"):
            if name in self.results:
                return float(self.results[name]["top1"])
        return None

    def top1(self, evaluation: str) -> float | None:
        """The top-1 accuracy in ``evaluation/NAME.json``."""
        found = self.results.get(evaluation, {}).get("top1")
        return float(found) if found is not None else None

    @property
    def throughput(self) -> float | None:
        """Images per second of training."""
        found = self.summary.get("images_per_second")
        return float(found) if found else None

    @property
    def chance(self) -> float | None:
        """The accuracy of guessing."""
        found = self.summary.get("chance") or next((r["chance"] for r in self.results.values() if "chance" in r), None)
        return float(found) if found else None


def read_run(folder: Path) -> Run:
    """Read a run folder.

    Raises:
        ConfigError: The folder is not a run, or a file in it is damaged.
    """
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run: found no run in {folder}, expected a folder with a config.yaml")
    config = build_config(read_run_config(folder))
    lines = read_metrics(folder)
    results = {file.stem: read_json(file) for file in sorted((folder / "evaluation").glob("*.json"))}
    return Run(
        folder=folder,
        config=config,
        summary=read_json(folder / "summary.json"),
        environment=read_json(folder / "environment.json"),
        train=[line for line in lines if line["kind"] == "train" and "epoch" in line],
        evaluations=[line for line in lines if line["kind"] == "evaluation" and {"epoch", "knn"} <= line.keys()],
        results=results,
    )


#: The results in ``evaluation/`` that comparisons and studies have a column for, by its title.
_RESULTS = {
    "linear": "linear",
    "linear, cached": "linear_fast",
    "1 % labels": "finetune_1",
    "10 % labels": "finetune_10",
    "100 % labels": "finetune_100",
}

PROBES: dict[str, Callable[[Run], float | None]] = {
    title: partial(Run.top1, evaluation=name) for title, name in _RESULTS.items()
}
"""Accuracies that comparisons and studies have a column for, by its title; a column never mixes two protocols."""


def probe_title(result: str) -> str | None:
    """The title of a result's column; None for a result without one.

    Args:
        result: The name of its file in ``evaluation/``, such as ``finetune_100``.
    """
    return next((title for title, name in _RESULTS.items() if name == result), None)


def mean_and_deviation(values: Collection[float]) -> tuple[float, float] | None:
    """Mean and sample standard deviation (0 for one value); None for no value."""
    if not values:
        return None
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
