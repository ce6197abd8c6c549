"""The contract of a task, which a `Trainer` runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.optim_step import SkippedSteps
from synco_fast.training.run.throughput import Throughput
from synco_fast.training.run.writers import MetricLog

__all__ = ["Notes", "RunConfig", "Task", "TrainerSettings"]

SummaryT = TypeVar("SummaryT", covariant=True)


class RunConfig(Protocol):
    """The configuration in a run folder."""

    def to_yaml(self) -> str:
        """The configuration as YAML, which reads back to the same."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """The configuration as plain values, with ``mode`` ``json``."""
        ...


@dataclass(frozen=True)
class TrainerSettings:
    """The trainer's settings of a run.

    Attributes:
        steps: Length of the run in steps.
        batch: Images per step, over all processes.
        log_every: Steps between log lines.
        keep: Checkpoints to keep.
        max_skipped: Consecutive skipped steps above which the run is aborted.
        max_skipped_key: Its key in the configuration.
        max_time: Minutes after which the run stops; None for no limit.
        settling: First steps that are excluded from throughput.
        trackers: By name in `TRACKERS` of `synco_fast.training.run.writers`, a project or experiment; None for one that
            is off.
        keep_best: Whether the checkpoint of the highest score is kept as ``best.pt``.
        stop_at: Step after which this start of the run stops, as after a signal; None for no limit.
    """

    steps: int
    batch: int
    log_every: int
    keep: int
    max_skipped: int
    max_skipped_key: str
    max_time: float | None = None
    settling: int = 3
    trackers: Mapping[str, str | None] = field(default_factory=dict)
    keep_best: bool = False
    stop_at: int | None = None

    @property
    def end(self) -> int:
        """The last step of this start."""
        return self.steps if self.stop_at is None else min(self.steps, self.stop_at)


class Notes:
    """Notes to print; kept until the run starts."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str | None]] = []
        self._show: Callable[[str, str | None], None] | None = None

    def __call__(self, line: str, style: str | None = "yellow") -> None:
        """Print a note, or keep it until the run starts."""
        if self._show is None:
            self._waiting.append((line, style))
        else:
            self._show(line, style)

    def show_by(self, show: Callable[[str, str | None], None]) -> None:
        """Print the kept notes, and later ones at once."""
        self._show = show
        for line, style in self._waiting:
            show(line, style)
        self._waiting.clear()


class Task(Protocol[SummaryT]):
    """What a `Trainer` runs. A round is the time between two evaluations, such as an epoch.

    Attributes:
        control: Communication between the processes.
        settings: The trainer's settings.
        device: The device.
        skipped: Counter of skipped steps.
        note: Takes notes; created by the task, printed by the trainer.
    """

    @property
    def config(self) -> RunConfig:
        """The configuration, saved in the run folder."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """Entries of ``environment.json`` beside versions and device; final after `begin`."""
        ...

    control: HostGroup
    settings: TrainerSettings
    device: torch.device
    skipped: SkippedSteps
    note: Notes

    # -- the steps ----------------------------------------------------------------------------------------------

    def begin(self, folder: Path, *, fresh: bool) -> None:
        """Prepare a run in ``folder``, which may not exist yet; ``fresh`` without a loaded checkpoint."""
        ...

    def round_end(self, step: int) -> int:
        """The step at which the round of step ``step`` ends."""
        ...

    def view_size(self, step: int) -> int | None:
        """Side of the views of a step, counted from 0, if it changes during the run."""
        ...

    def batches(self, step: int) -> Iterable[Any]:
        """The batches from a step to the end of its round."""
        ...

    def train_step(self, batch: Any, step: int) -> None:
        """One step, counted from 0."""
        ...

    def not_finite(self) -> str | None:
        """The first parameter or buffer that holds NaN or infinity; waits for the device."""
        ...

    def replica_hash(self) -> int:
        """A hash of what must be equal on all processes."""
        ...

    # -- what is shown and logged -------------------------------------------------------------------------------

    def title(self, step: int) -> str:
        """The round of a step, for the progress bar."""
        ...

    def figures(self, step: int, speed: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """The log line after ``step`` steps, and text for the progress bar."""
        ...

    def artifacts(self, step: int) -> None:
        """Draw plots at the start of the run and at the end of a round."""
        ...

    def evaluation_due(self, step: int) -> bool:
        """Whether to evaluate after ``step`` steps, at the end of a round."""
        ...

    def evaluate(self, step: int, log: MetricLog) -> float | None:
        """Evaluate and log; called by all processes at the same step.

        Returns:
            A score of which more is better, on rank 0; None without one.
        """
        ...

    def describe_step(self, step: int) -> str:
        """A step, counted from 0, as text for messages."""
        ...

    def advice(self) -> str:
        """What to try if training diverges."""
        ...

    # -- state --------------------------------------------------------------------------------------------------

    def checkpoint_due(self, step: int) -> bool:
        """Whether to write a checkpoint after ``step`` steps, besides those at a stop and at the end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The state of training; called by all processes at the same step.

        Raises:
            DataError: All processes together found too many corrupt images.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Load from the checkpoint at ``path``.

        Raises:
            UserError: It belongs to another kind of run, architecture or set of images.
        """
        ...

    def close(self) -> None:
        """Free processes and memory, also after an error."""
        ...

    def summary(
        self, step: int, *, finished: bool, throughput: Throughput, best: dict[str, Any] | None = None
    ) -> SummaryT:
        """Draw the curves, write ``summary.json``, and return it; ``best``: score and step of ``best.pt``, if any."""
        ...
