"""The progress bar of everything that takes long."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["LINE_EVERY", "progress_bar"]

#: Seconds between the plain lines that stand for the bar where there is no terminal.
LINE_EVERY = 15.0


def progress_bar(console: Console) -> Progress:
    """A bar, not yet started, of a description, a share, figures (the task field ``figures``) and the time."""
    return Progress(
        TextColumn("[bold]{task.description}"),
        BarColumn(bar_width=24),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
        console=console,
    )
