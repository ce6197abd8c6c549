"""A study's results: means and deviations over seeds, and differences paired by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synco_fast.report.runs import Run, accuracy_columns, mean_and_deviation, read_run
from synco_fast.runtime.results import columns
from synco_fast.study.evaluations import Evaluation
from synco_fast.study.execute import evaluations_of, run_folder
from synco_fast.study.plan import UNTRAINED, Trial

__all__ = ["SUPERVISED", "Difference", "Row", "Study", "collect", "student_t"]

#: Stands for a method in the row of encoders that were trained on labels from the start.
SUPERVISED = "supervised"


@dataclass(frozen=True)
class Row:
    """The runs of one method in one setting.

    Attributes:
        config, setting, method: Shared by the runs; the method may be ``untrained`` or ``supervised``.
        seeds: Seeds of the finished runs, in order.
        values: By figure and seed.
        untrained: kNN before the first step, by seed.
    """

    config: str
    setting: str
    method: str
    seeds: tuple[int, ...]
    values: dict[str, dict[int, float]]
    untrained: dict[int, float]

    def summary(self, figure: str) -> tuple[float, float] | None:
        """Mean and sample standard deviation over seeds (0 for one seed); None where nothing was measured."""
        return mean_and_deviation(self.values.get(figure, {}).values())


@dataclass(frozen=True)
class Difference:
    """A method minus the baseline, or a setting minus the first one, at the same seeds.

    Attributes:
        config, setting, method, figure: What is compared.
        baseline: The method, or the setting, that it is compared with.
        values: By seed, in [-1, 1].
    """

    config: str
    setting: str
    method: str
    baseline: str
    figure: str
    values: dict[int, float]

    @property
    def mean(self) -> float:
        """The mean over seeds."""
        return statistics.mean(self.values.values())

    @property
    def deviation(self) -> float:
        """The sample standard deviation over seeds; 0 for one seed."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else 0.0

    @property
    def error(self) -> float | None:
        """The standard error of the mean; None for one seed."""
        return self.deviation / math.sqrt(len(self.values)) if len(self.values) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95 % interval of the mean, by Student's t of seeds - 1 degrees of freedom; None for one seed."""
        if self.error is None:
            return None
        half = student_t(len(self.values) - 1) * self.error
        return self.mean - half, self.mean + half

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "config": self.config,
            "setting": self.setting,
            "method": self.method,
            "baseline": self.baseline,
            "figure": self.figure,
            **_described(self.values),
            "standard_error": self.error,
            "interval_95": self.interval,
        }


@dataclass(frozen=True)
class Study:
    """The results of a study's finished runs.

    Attributes:
        rows: Rows in the order of the trials.
        differences: Every method minus the baseline in the same setting, over shared seeds.
        setting_differences: Every setting minus the first one with the same method, over shared seeds.
        runs: Finished runs by trial.
        missing: Trials without a finished run, and evaluations that a run lacks or that were made with other options.
        notes: A line about each result of another checkpoint than the run's newest, which is skipped.
    """

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    setting_differences: tuple[Difference, ...]
    runs: dict[str, Run]
    missing: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def figures(self) -> list[str]:
        """The titles of the columns: of accuracies that any run has, in order."""
        return accuracy_columns(list(self.runs.values()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": [
                {
                    "config": row.config,
                    "setting": row.setting,
                    "method": row.method,
                    "seeds": list(row.seeds),
                    "untrained": _described(row.untrained),
                    "figures": {name: _described(row.values[name]) for name in row.values},
                }
                for row in self.rows
            ],
            "differences": [found.as_dict() for found in self.differences],
            "setting_differences": [found.as_dict() for found in self.setting_differences],
            "missing": list(self.missing),
            "notes": list(self.notes),
        }


def collect(
    folder: Path,
    trials: Sequence[Trial],
    *,
    baseline: str | None = None,
    evaluations: Sequence[Evaluation] = (),
    supervised: Evaluation | None = None,
) -> Study:
    """Read the finished runs of a study.

    Args:
        folder: The study's folder.
        trials: From `plan`.
        baseline: The method that the others are compared with; the first by default.
        evaluations: Of every run.
        supervised: The evaluation that trained untrained encoders on labels: it gets a row of its own.

    Raises:
        ConfigError: A run cannot be read.
    """
    runs: dict[str, Run] = {}
    for trial in trials:
        if (run_folder(folder, trial) / "config.yaml").is_file():
            run = read_run(run_folder(folder, trial))
            if run.summary.get("finished"):
                runs[trial.name] = run
    grouped: dict[tuple[str, str, str], list[Trial]] = {}
    for trial in trials:
        grouped.setdefault((*trial.group, trial.method), []).append(trial)
    rows, bounds = [], []
    for (config, setting, method), inside in grouped.items():
        done = {trial.seed: runs[trial.name] for trial in inside if trial.name in runs}
        accuracies = {seed: run.accuracies for seed, run in done.items()}
        present = {
            name: {seed: found[name] for seed, found in accuracies.items() if name in found}
            for name in accuracy_columns(list(done.values()))
        }
        untrained = {
            seed: float(value) for seed, run in done.items() if (value := run.summary.get("knn_before")) is not None
        }
        labelled: dict[str, dict[int, float]] = {}
        if supervised and method == UNTRAINED:
            results = [result for run in done.values() if (result := supervised.result(run)) is not None]
            labelled = {title: present.pop(title) for title in columns(results)}
        rows.append(Row(config, setting, method, tuple(done), present, untrained))
        if labelled:
            seeds = tuple(seed for seed in done if any(seed in by_seed for by_seed in labelled.values()))
            bounds.append(Row(config, setting, SUPERVISED, seeds, labelled, {}))
    rows += bounds
    missing = [trial.name for trial in trials if trial.name not in runs]
    missing += [
        f"{trial.name}, {evaluation.text}"
        for trial in trials
        if trial.name in runs
        for evaluation in evaluations_of(trial, evaluations, supervised)
        if not evaluation.done(runs[trial.name])
    ]
    notes = [f"{name}: {note}" for name, run in runs.items() for note in run.notes]
    methods, settings = _differences(rows, baseline), _setting_differences(rows)
    return Study(tuple(rows), tuple(methods), tuple(settings), runs, tuple(missing), tuple(notes))


def _differences(rows: list[Row], baseline: str | None) -> list[Difference]:
    found: list[Difference] = []
    first = baseline or next((row.method for row in rows if row.method not in (UNTRAINED, SUPERVISED)), "")
    for row in rows:
        same = [other for other in rows if (other.config, other.setting) == (row.config, row.setting)]
        base = next((other for other in same if other.method == first), None)
        if base is None or row.method == first:
            continue
        found += _paired(row, base, first)
    return found


def _setting_differences(rows: list[Row]) -> list[Difference]:
    found: list[Difference] = []
    for row in rows:
        base = next(other for other in rows if (other.config, other.method) == (row.config, row.method))
        if base.setting != row.setting:
            found += _paired(row, base, base.setting)
    return found


def _paired(row: Row, base: Row, name: str) -> list[Difference]:
    """The differences of two rows in every figure that they share a seed of."""
    found = []
    for figure, values in row.values.items():
        others = base.values.get(figure, {})
        shared = {seed: value - others[seed] for seed, value in values.items() if seed in others}
        if shared:
            found.append(Difference(row.config, row.setting, row.method, name, figure, shared))
    return found


def student_t(freedom: int, level: float = 0.95) -> float:
    """The value that Student's t with ``freedom`` degrees of freedom stays below in size with probability ``level``."""

    def inside(angle: float) -> float:
        """P(|t| < sqrt(freedom) tan(angle)), a finite sum for whole degrees of freedom."""
        odd = freedom % 2
        term, total = (math.cos(angle) if odd else 1.0), 0.0
        for number in range(1 + odd, freedom, 2):
            total += term
            term *= math.cos(angle) ** 2 * number / (number + 1)
        return (angle + math.sin(angle) * total) * 2 / math.pi if odd else math.sin(angle) * total

    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < level else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _described(values: dict[int, float]) -> dict[str, Any]:
    found = mean_and_deviation(values.values())
    mean, deviation = found or (None, None)
    return {"mean": mean, "deviation": deviation, "by_seed": {str(seed): value for seed, value in values.items()}}
