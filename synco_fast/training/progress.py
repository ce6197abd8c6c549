"""What a run shows: a progress bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import Progress

from synco_fast.runtime.progress import LINE_EVERY, progress_bar

__all__ = ["Reporter"]


class Reporter:
    """Progress through ``steps`` steps, and notes beside it.

    Args:
        console: Where to write; a bar is drawn where it is a terminal.
        steps: Length of the run.
        done: Steps that are done already.
    """

    def __init__(self, console: Console, steps: int, done: int = 0) -> None:
        self.console, self.steps, self._start, self._first = console, steps, time.monotonic(), done
        self._last_line = 0.0
        self._figures = ""
        self._bar: Progress | None = None
        if console.is_terminal:
            self._bar = progress_bar(console)
            self._task = self._bar.add_task("pretrain", total=steps, completed=done, figures="")
            self._bar.start()

    def step(self, step: int, epoch: str) -> None:
        """One more step is done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=epoch)

    def figures(self, step: int, epoch: str, values: dict[str, float]) -> None:
        """Show the latest figures: loss, contrastive accuracy, throughput, share of time waiting for data."""
        self.line(
            step,
            epoch,
            f"loss {values['loss']:.3f}  acc {values['queue_top1']:.1%}  "
            f"{values['images_per_second']:,.0f} img/s  data wait {values['data_wait']:.0%}",
        )

    def line(self, step: int, epoch: str, text: str) -> None:
        """Show the latest figures as words: in the bar, or as a line every few seconds."""
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=epoch, figures=text)
            return
        now = time.monotonic()
        if now - self._last_line >= LINE_EVERY or step >= self.steps:
            self._last_line = now
            spent = now - self._start
            left = spent / max(1, step - self._first) * (self.steps - step)
            self.console.print(
                f"{epoch}  step {step}/{self.steps}  {text}  left {_clock(left)}", highlight=False, soft_wrap=True
            )

    def note(self, text: str, style: str | None = None) -> None:
        """A line that stays, above the bar."""
        self.console.print(text, style=style, highlight=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.stop()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
