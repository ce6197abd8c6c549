"""The console: names of files and sources are printed as they are, whatever rich would make of them."""

from __future__ import annotations

import sys

from rich.console import Console

__all__ = ["in_notebook", "open_console", "say"]


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel. IPython is not imported here: a kernel has imported it already."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def open_console() -> Console:
    """Standard output; in a notebook as plain text, where rich would make one HTML element of every line.

    In lines and in cells of tables, ``[final]`` is no markup and ``:key:`` is no emoji.
    """
    return Console(markup=False, emoji=False, highlight=False, force_jupyter=False if in_notebook() else None)


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is; a terminal wraps it."""
    console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
