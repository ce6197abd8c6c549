"""What an evaluation shows: a bar on a terminal, plain lines anywhere else, nothing from the other ranks."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import Progress

from synco_fast.evaluation.ranks import rank
from synco_fast.runtime.progress import LINE_EVERY, progress_bar

__all__ = ["Bar"]


class Bar:
    """Progress through ``total`` units of work, as a context.

    Args:
        console: Where to write; None for silence.
        title: What is going on.
        total: Units in all.
        done: Units that are done already.
    """

    def __init__(self, console: Console | None, title: str, total: int, done: int = 0) -> None:
        self.console = console if rank() == 0 else None
        self.title, self.total, self.done, self._last = title, total, done, time.monotonic()
        self._figures = ""
        self._bar: Progress | None = None
        if self.console is not None and self.console.is_terminal:
            self._bar = progress_bar(self.console)
            self._task = self._bar.add_task(title, total=total, completed=done, figures="")

    def __enter__(self) -> Bar:
        """Show the bar."""
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take it down."""
        if self._bar is not None:
            self._bar.stop()

    def advance(self, units: int, figures: str | None = None) -> None:
        """So much more is done."""
        self.done += units
        if self._bar is not None:
            self._figures = self._figures if figures is None else figures
            self._bar.update(self._task, completed=self.done, figures=self._figures)
        elif self.console is not None and time.monotonic() - self._last >= LINE_EVERY:
            self._last = time.monotonic()
            text = f"{self.title}: {self.done:,} of {self.total:,}{f'  {figures}' if figures else ''}"
            self.console.print(text, highlight=False, soft_wrap=True)
