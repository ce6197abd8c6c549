"""The progress of a run: the epoch, the latest figures, and notes beside them."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console

from synco_fast.runtime.progress import ProgressBar

__all__ = ["Reporter", "figures_of"]


class Reporter:
    """Progress through ``steps`` steps, and notes beside it.

    Args:
        console: Where to write.
        steps: Length of the run.
        done: Steps that are done already.
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self._bar = ProgressBar(console, "starting", steps, done, unit="step").start()

    def step(self, step: int, epoch: str) -> None:
        """One more step is done."""
        self._bar.update(step, title=epoch)

    def figures(self, step: int, epoch: str, values: Mapping[str, float]) -> None:
        """Show the latest figures; those that the method does not measure are absent."""
        self._bar.update(step, *figures_of(values), title=epoch)

    def line(self, step: int, epoch: str, text: str) -> None:
        """Show the latest figures as words."""
        self._bar.update(step, text, title=epoch)

    def stage(self, text: str) -> None:
        """Say at once that something else than training has begun, such as an evaluation."""
        self._bar.update(self._bar.done, title=text)

    def note(self, text: str, style: str | None = None) -> None:
        """A line that stays, above the bar."""
        self._bar.note(text, style)

    def close(self) -> None:
        """Take the bar down."""
        self._bar.close()


def figures_of(values: Mapping[str, float]) -> tuple[str, ...]:
    """Loss, contrastive accuracy, images a second and the share of time spent waiting for data, in words."""
    shown = (
        ("loss", "loss {:.3f}"),
        ("queue_top1", "acc {:.1%}"),
        ("images_per_second", "{:,.0f} img/s"),
        ("data_wait", "data wait {:.0%}"),
    )
    return tuple(text.format(values[name]) for name, text in shown if name in values)
