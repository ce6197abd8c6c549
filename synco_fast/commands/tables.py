"""The tables that subcommands print."""

from __future__ import annotations

import shutil
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

__all__ = ["figures_table", "two_columns"]


def two_columns(title: str) -> Table:
    """A table of names and values, as wide as its title; long paths wrap and are never truncated."""
    table = Table(title=title, show_header=False, min_width=min(len(title), shutil.get_terminal_size().columns))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def figures_table(
    title: str, texts: Sequence[str], numbers: Sequence[str], *, gap: int = 1, caption: str | None = None
) -> Table:
    """A table of figures without a frame, whose columns do not wrap.

    Args:
        title: The title.
        texts: Headings of the columns on the left.
        numbers: Headings of the columns behind them, which are aligned to the right.
        gap: Further spaces between columns.
        caption: A line below.
    """
    table = Table(title=title, caption=caption, box=SIMPLE_HEAD, padding=(0, gap, 0, 0))
    for name in texts:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
