"""The progress bar: a bar on a terminal and in a notebook, plain lines elsewhere."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from synco_fast.runtime.console import in_notebook, say

__all__ = ["LINE_EVERY", "ProgressBar"]

#: Seconds between plain lines where there is no terminal.
LINE_EVERY = 15.0
#: Seconds between updates of a notebook's bar, each of which is a message to the browser.
_DRAW_EVERY = 0.25
#: Terminal width from which the elapsed time is shown too.
_WIDE = 100


class ProgressBar:
    """Progress through ``total`` units of work, as a context manager.

    On a terminal it is one line that fits the width: title, bar, percentage, as many figures as fit, and the time left.
    In a notebook it is an element of the cell's output, which stays. Elsewhere, including a dumb terminal, it prints a
    plain line at the start and one every 15 s.

    Args:
        console: Where to write; None for silence.
        title: The work in a few words.
        total: Total units; None if unknown.
        done: Units already done.
        unit: Name of a unit in plain lines, such as ``step``.
    """

    def __init__(
        self, console: Console | None, title: str, total: int | None, done: int = 0, *, unit: str = ""
    ) -> None:
        self.console, self.title, self.total, self.done, self._unit = console, title, total, done, f"{unit} ".lstrip()
        self._figures: Sequence[str] = ()
        self._began, self._first, self._last, self._told = time.monotonic(), done, 0.0, -1
        self._bar: Progress | None = None
        self._cell: _Cell | None = None
        if console is not None and not console.quiet and console.file is sys.stdout and in_notebook():
            self._cell = _Cell()
        elif console is not None and console.is_terminal and not console.is_dumb_terminal:
            wide = console.width >= _WIDE
            self._bar = Progress(
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(bar_width=24 if wide else 8),
                TaskProgressColumn(),
                _Figures(console.width, elapsed=wide),
                *([TimeElapsedColumn()] if wide else []),
                _TimeLeft(),
                console=console,
                transient=True,
            )
            self._task = self._bar.add_task(title, total=total, completed=done, figures=())

    def __enter__(self) -> ProgressBar:
        """Show the bar."""
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self.close()

    def start(self) -> ProgressBar:
        """Show the bar outside of a ``with`` block."""
        if self._bar is not None:
            self._bar.start()
        else:
            self._line()
        return self

    def close(self) -> None:
        """Remove the bar; a plain line, or a notebook's bar, says where it ended."""
        if self._bar is not None:
            self._bar.stop()
        elif self._told != self.done:
            self._line()

    def advance(self, units: int = 1, *figures: str) -> None:
        """Advance by so many units.

        Args:
            units: 0 to change only the figures.
            figures: The latest figures as text, most important first; if none are given, the former ones stay.
        """
        self.update(self.done + units, *figures)

    def update(self, done: int, *figures: str, title: str | None = None) -> None:
        """Set the number of done units; see `advance`."""
        self.done, self.title = done, title or self.title
        self._figures = figures or self._figures
        if self._bar is not None:
            self._bar.update(self._task, completed=done, description=self.title, figures=self._figures)
        elif time.monotonic() - self._last >= (LINE_EVERY if self._cell is None else _DRAW_EVERY):
            self._line()

    def stage(self, title: str) -> None:
        """Show another title at once, also in plain lines."""
        self.title = title
        if self._bar is not None:
            self._bar.update(self._task, description=title)
            self._bar.refresh()
        else:
            self._line()

    def restart(self, title: str, total: int) -> None:
        """Restart the bar for other work."""
        self.title, self.total, self.done, self._figures = title, total, 0, ()
        self._began, self._first = time.monotonic(), 0
        if self._bar is not None:
            self._bar.reset(self._task, total=total, description=title, figures=())
        else:
            self._line()

    def note(self, text: str, style: str | None = None) -> None:
        """Print a line above the bar."""
        if self.console is not None:
            say(self.console, text, style)

    def _line(self) -> None:
        """The plain line, or the notebook's bar."""
        self._last, self._told = time.monotonic(), self.done
        if self.console is None:
            return
        words = [self.title if self.total is None else f"{self.title}: {self._unit}{self.done:,} of {self.total:,}"]
        words += self._figures
        if self.total is not None and self._first < self.done < self.total:
            spent = self._last - self._began
            words.append(f"{clock(spent / (self.done - self._first) * (self.total - self.done))} left")
        text = "  ".join(words)
        if self._cell is not None:
            self._cell.show(text, self.done, self.total)
        else:
            say(self.console, text)


class _Cell:
    """A bar in the output of a notebook's cell, replaced in place. The line alone is shown where HTML is not."""

    def __init__(self) -> None:
        self._display: Any = import_module("IPython.display").display
        self._handle: Any = None

    def show(self, text: str, done: int, total: int | None) -> None:
        amount = "" if total is None else f' value="{done}" max="{max(total, 1)}"'
        bar = f'<progress{amount} style="width: 14em; vertical-align: middle"></progress>'
        content = {"text/plain": text, "text/html": f"{bar} {html.escape(text)}"}
        if self._handle is None:
            self._handle = self._display(content, raw=True, display_id=True)
        else:
            self._handle.update(content, raw=True)


class _Figures(ProgressColumn):
    """As many of a task's figures as fit in the line."""

    def __init__(self, width: int, *, elapsed: bool) -> None:
        super().__init__()
        # Bar, percentage, times, and a space after each column.
        self._room = width - (24 + 8 if elapsed else 8) - 5 - 13 - 4

    def render(self, task: Task) -> Text:
        room = self._room - len(task.description)
        shown = ""
        for figure in task.fields["figures"]:
            longer = f"{shown}  {figure}" if shown else figure
            if len(longer) > room:
                break
            shown = longer
        return Text(shown, no_wrap=True)


class _TimeLeft(ProgressColumn):
    """The time left; a question mark until it is known."""

    max_refresh = 0.5

    def render(self, task: Task) -> Text:
        left = task.time_remaining
        return Text("? left" if left is None else f"{clock(left)} left", style="progress.remaining", no_wrap=True)


def clock(seconds: float) -> str:
    """``2:05`` for 125 s, ``1:00:00`` for an hour."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
