"""What a `Trainer` trains: the contract between the run around the steps and what a step does."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

from synco_fast.runtime.distributed import HostGroup
from synco_fast.runtime.optim_step import SkippedSteps
from synco_fast.training.metrics import MetricLog
from synco_fast.training.throughput import Throughput

__all__ = ["Notes", "Plan", "RunConfig", "Task"]

SummaryT = TypeVar("SummaryT", covariant=True)


class RunConfig(Protocol):
    """A configuration that a run folder keeps."""

    def to_yaml(self) -> str:
        """As a file that reads back to the same configuration."""
        ...

    def model_dump(self, *, mode: str) -> dict[str, Any]:
        """As plain values where ``mode`` is ``json``."""
        ...


@dataclass(frozen=True)
class Plan:
    """What the trainer needs to know of a run.

    Attributes:
        steps: Its length.
        batch: Images a step, over all processes.
        log_every: Steps between lines of the log.
        keep: How many checkpoints are kept.
        max_skipped: The run is aborted after more consecutive skipped steps.
        max_skipped_key: What the configuration calls that.
        max_time: Minutes after which it stops; None for no limit.
        settling: First steps that count in no measure of speed.
        wandb: A project of Weights & Biases, if any.
    """

    steps: int
    batch: int
    log_every: int
    keep: int
    max_skipped: int
    max_skipped_key: str
    max_time: float | None = None
    settling: int = 3
    wandb: str | None = None


class Notes:
    """Lines for the person at the terminal; those of a run that has not begun wait for it."""

    def __init__(self) -> None:
        self._waiting: list[tuple[str, str | None]] = []
        self._show: Callable[[str, str | None], None] | None = None

    def __call__(self, line: str, style: str | None = "yellow") -> None:
        """Show a line."""
        if self._show is None:
            self._waiting.append((line, style))
        else:
            self._show(line, style)

    def show_by(self, show: Callable[[str, str | None], None]) -> None:
        """Show the lines that wait, and every later one at once."""
        self._show = show
        for line, style in self._waiting:
            show(line, style)
        self._waiting.clear()


class Task(Protocol[SummaryT]):
    """A step, its batches, and what is due when. A round is what lies between two evaluations, such as an epoch.

    Attributes:
        control: What the processes of the job agree by.
        plan: What the trainer needs to know.
        device: Where it computes.
        skipped: Counts the steps that were skipped.
        note: Takes lines to show; made by the task, shown by the trainer.
    """

    @property
    def config(self) -> RunConfig:
        """Kept in the run folder."""
        ...

    @property
    def facts(self) -> Mapping[str, Any]:
        """What ``environment.json`` says of the run beside versions and device; known once it began."""
        ...

    control: HostGroup
    plan: Plan
    device: torch.device
    skipped: SkippedSteps
    note: Notes

    # -- the steps ----------------------------------------------------------------------------------------------

    def begin(self, folder: Path, *, fresh: bool) -> None:
        """Get ready for ``folder``, which may not exist yet; ``fresh`` where no checkpoint was loaded."""
        ...

    def round_end(self, step: int) -> int:
        """The step at which the round of step ``step`` ends."""
        ...

    def batches(self, step: int) -> Iterable[Any]:
        """The batches from a step to the end of its round."""
        ...

    def train_step(self, batch: Any, step: int) -> None:
        """One step, counted from 0."""
        ...

    def finite(self) -> bool:
        """Whether every parameter is finite; waits for the device."""
        ...

    def fingerprint(self) -> int:
        """A hash of what must be the same on all processes."""
        ...

    # -- what is shown and logged -------------------------------------------------------------------------------

    def title(self, step: int) -> str:
        """What the progress bar calls the round of a step."""
        ...

    def figures(self, step: int, speed: dict[str, float]) -> tuple[dict[str, float], list[str]]:
        """A line of the log after ``step`` steps, and in words what the progress bar shows of it."""
        ...

    def artifacts(self, step: int) -> None:
        """Draw what the end of a round, or the start of the run, leaves in the run folder."""
        ...

    def evaluation_due(self, step: int) -> bool:
        """Whether the run is evaluated after ``step`` steps, which end a round."""
        ...

    def evaluate(self, step: int, log: MetricLog) -> None:
        """Evaluate, into the log; called by all processes at the same step."""
        ...

    def describe_step(self, step: int) -> str:
        """A step, counted from 0, in the words of a message."""
        ...

    def advice(self) -> str:
        """What to try where training diverges."""
        ...

    # -- state --------------------------------------------------------------------------------------------------

    def checkpoint_due(self, step: int) -> bool:
        """Whether a checkpoint is written after ``step`` steps, beside those at a stop and at the end."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides the steps to come; called by all processes at the same step.

        Raises:
            DataError: The processes together have met too many corrupt images.
        """
        ...

    def load_state_dict(self, state: dict[str, Any], path: Path) -> None:
        """Take over from the checkpoint at ``path``.

        Raises:
            UserError: It is of another kind of run, architecture or set of images.
        """
        ...

    def close(self) -> None:
        """Free processes and memory, also after an error."""
        ...

    def summary(self, step: int, *, finished: bool, throughput: Throughput) -> SummaryT:
        """Draw the curves, write ``summary.json``, and return it."""
        ...
