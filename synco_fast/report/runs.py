"""What a run folder says about itself."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synco_fast.config import Config, build_config
from synco_fast.runtime.errors import ConfigError
from synco_fast.runtime.files import read_json
from synco_fast.runtime.run_config import read_run_config
from synco_fast.training.metrics import read_metrics

__all__ = ["Run", "read_run"]


@dataclass(frozen=True)
class Run:
    """A run folder, read.

    Attributes:
        folder: Where it is.
        config: What was done.
        summary: The content of ``summary.json``; empty where the run has not come to an end.
        environment: Versions, device, commit.
        train: Lines of ``metrics.jsonl`` about training.
        evaluations: Lines about the periodic kNN.
        results: By name, the JSON files below ``evaluation/``.
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
        """The kNN accuracy of ``evaluate knn``, or else the last one of the run itself."""
        found = self.results.get("knn", {}).get("knn", self.summary.get("knn_after"))
        return float(found) if found is not None else None

    @property
    def linear(self) -> float | None:
        """The linear probe's accuracy: of the published protocol, or else of the fast variant."""
        for name in ("linear", "linear_fast"):
            if name in self.results:
                return float(self.results[name]["top1"])
        return None

    def top1(self, evaluation: str) -> float | None:
        """The accuracy that ``evaluation/NAME.json`` gives."""
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
        ConfigError: It is none, or a file in it is broken.
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
