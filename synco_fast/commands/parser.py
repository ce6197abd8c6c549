"""The tree of verbs: ``synco-fast VERB ...`` and ``synco-fast GROUP VERB ...``."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

__all__ = ["Run", "Verbs", "positive", "two_columns"]

Run = Callable[[argparse.Namespace, Sequence[str], Console], int]
"""What a verb does: parsed options, the words that were not parsed, where to print; the exit code."""

GROUPS = {
    "evaluate": ("Judge a checkpoint.", "WHAT"),
    "data": ("Work with image sources.", "WHAT"),
    "bench": ("Measure a part on this machine.", "PART"),
    "profile": ("See where a part spends its time.", "PART"),
}


class Verbs:
    """Adds verbs to a parser; ``add("data demo", ...)`` opens the group ``data`` when it is first named."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._top = parser.add_subparsers(title="commands", required=True, metavar="VERB")
        self._groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}

    def add(self, name: str, run: Run, about: str, example: str, *, overrides: bool = False) -> argparse.ArgumentParser:
        """Add a verb and return its parser, to which the caller adds arguments.

        Args:
            name: ``VERB`` or ``GROUP VERB``.
            run: called with the parsed options.
            about: one sentence for the help.
            example: a whole command line for the help.
            overrides: whether words that no argument takes are passed on to ``run`` (``--section.key VALUE``).
        """
        group, _, last = name.rpartition(" ")
        command = (self._group(group) if group else self._top).add_parser(
            last,
            help=about,
            description=about,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run, overrides=overrides, parser=command)
        return command

    def _group(self, name: str) -> argparse._SubParsersAction[argparse.ArgumentParser]:
        if name not in self._groups:
            about, metavar = GROUPS[name]
            parser = self._top.add_parser(name, help=about, description=about)
            self._groups[name] = parser.add_subparsers(required=True, metavar=metavar)
        return self._groups[name]


def two_columns(title: str) -> Table:
    """A table of names and values, in which a long path is broken, never cut."""
    table = Table(title=title, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    return table


def positive(word: str) -> int:
    """A whole number above 0, as the type of an argument."""
    number = int(word)
    if number < 1:
        raise ValueError
    return number
