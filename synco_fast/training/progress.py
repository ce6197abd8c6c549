"""The progress of a run: epoch, latest figures, notes."""

from __future__ import annotations

from rich.console import Console

from synco_fast.runtime.progress import ProgressBar

__all__ = ["Reporter"]


class Reporter:
    """The progress bar of a run, and its notes.

    Args:
        console: The console.
        steps: Length of the run in steps.
        done: Completed steps.
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self._bar = ProgressBar(console, "starting", steps, done, unit="step").start()

    def step(self, step: int, title: str) -> None:
        """Advance by one step."""
        self._bar.update(step, title=title)

    def line(self, step: int, title: str, *figures: str) -> None:
        """Show the latest figures as text, most important first."""
        self._bar.update(step, *figures, title=title)

    def stage(self, text: str) -> None:
        """Show at once that another stage, such as an evaluation, has started."""
        self._bar.update(self._bar.done, title=text)

    def note(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        self._bar.note(text, style)

    def close(self) -> None:
        """Remove the bar."""
        self._bar.close()
