"""The console: names of files and sources are printed as they are, whatever rich would make of them."""

from __future__ import annotations

import os
import sys
from contextlib import suppress

from rich.console import Console

__all__ = ["LastingConsole", "in_notebook", "open_console", "say"]


class LastingConsole(Console):
    """A console that goes on without output where its reader has ended, such as ``tee`` after Ctrl-C.

    Otherwise rich exits, and a run would end there without a checkpoint.
    """

    def on_broken_pipe(self) -> None:
        """Redirect to /dev/null what goes to the pipe: this stream, and standard output and error if they do."""
        own = self.file.fileno()
        lost = os.fstat(own)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in {own, 1, 2}:
            with suppress(OSError):
                if os.path.samestat(os.fstat(stream), lost):
                    os.dup2(nowhere, stream)
        os.close(nowhere)


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel. IPython is not imported here: a kernel has imported it already."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return getattr(shell, "kernel", None) is not None


def open_console() -> Console:
    """Standard output; in a notebook as plain text, where rich would make one HTML element of every line.

    In lines and in cells of tables, ``[final]`` is no markup and ``:key:`` is no emoji.
    """
    return LastingConsole(markup=False, emoji=False, highlight=False, force_jupyter=False if in_notebook() else None)


def say(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is; a terminal wraps it."""
    console.print(line, style=style, markup=False, emoji=False, highlight=False, soft_wrap=True)
