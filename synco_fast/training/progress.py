"""The progress of a run: the epoch, the latest figures, and notes beside them."""

from __future__ import annotations

from rich.console import Console

from synco_fast.runtime.progress import ProgressBar

__all__ = ["Reporter"]


class Reporter:
    """Progress through ``steps`` steps, and notes beside it.

    Args:
        console: Where to write.
        steps: Length of the run.
        done: Steps that are done already.
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self._bar = ProgressBar(console, "starting", steps, done, unit="step").start()

    def step(self, step: int, title: str) -> None:
        """One more step is done."""
        self._bar.update(step, title=title)

    def line(self, step: int, title: str, *figures: str) -> None:
        """Show the latest figures in words, the most important first."""
        self._bar.update(step, *figures, title=title)

    def stage(self, text: str) -> None:
        """Say at once that something else than training has begun, such as an evaluation."""
        self._bar.update(self._bar.done, title=text)

    def note(self, text: str, style: str | None = None) -> None:
        """A line that stays, above the bar."""
        self._bar.note(text, style)

    def close(self) -> None:
        """Take the bar down."""
        self._bar.close()
