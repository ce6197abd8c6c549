"""The progress of a run: epoch, latest figures, notes."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path

from rich.console import Console

from synco_fast.runtime.progress import ProgressBar

__all__ = ["Reporter"]


class Reporter:
    """The progress bar of a run, and its notes; both also go to a log file, with the time.

    Args:
        console: The console.
        steps: Length of the run in steps.
        done: Completed steps.
        log: ``train.log`` of the run folder, to which lines are appended; None for no log.
    """

    def __init__(self, console: Console, steps: int, done: int, log: Path | None) -> None:
        self._log = None if log is None else log.open("a", encoding="utf-8", buffering=1)
        self._bar = ProgressBar(console, "starting", steps, done, unit="step").start()
        self.write(f"starting: {done:,} of {steps:,} steps done")

    def write(self, text: str) -> None:
        """Append a line to the log only; a disk that is full stops the run elsewhere, with a clear error."""
        if self._log is None:
            return
        with suppress(OSError):
            self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")

    def step(self, step: int, title: str) -> None:
        """Advance by one step."""
        self._bar.update(step, title=title)

    def line(self, step: int, title: str, *figures: str) -> None:
        """Show the latest figures as text, most important first."""
        self._bar.update(step, *figures, title=title)
        self.write("  ".join([f"{title}: step {step:,} of {self._bar.total:,}", *figures]))

    def stage(self, text: str) -> None:
        """Show at once that another stage, such as an evaluation, has started."""
        self._bar.stage(text)

    def note(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self._bar.note(text, style)
        self.write(text)

    def close(self) -> None:
        """Remove the bar, and close the log."""
        self._bar.close()
        if self._log is not None:
            with suppress(OSError):
                self._log.close()
