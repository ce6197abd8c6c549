"""The tree of subcommands: ``synco-fast COMMAND ...`` and ``synco-fast GROUP COMMAND ...``."""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from rich.console import Console

from synco_fast.runtime.errors import UserError

__all__ = ["GROUPS", "Commands", "Parser", "Run", "between", "near", "positive", "whole"]

Run = Callable[[argparse.Namespace, Console], int]
"""A subcommand: takes parsed options, with unparsed words as ``rest``, and the console; returns the exit code."""

GROUPS = {
    "evaluate": "Evaluate a checkpoint.",
    "data": "Work with image sources.",
    "bench": "Measure a component on this machine.",
    "profile": "Profile a component.",
}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument in one line, like all other errors."""

    def error(self, message: str) -> NoReturn:
        """Raise what the command line prints.

        Raises:
            UserError: Always.
        """
        if choice := re.fullmatch(r"(.*): invalid choice: '(.*)' \(choose from (.*)\)", message):
            names = re.findall(r"[^\s',]+", choice[3])
            message = f"{choice[1]}: found {choice[2]!r}, expected {', '.join(names)}{near(choice[2], names)}"
        if found := re.fullmatch(r"(.*): invalid (\w+) value: (.*)", message):
            message = f"{found[1]}: found {found[3]}, expected a {'' if found[2] == 'float' else 'whole '}number"
        raise UserError(f"{message.removeprefix('argument ').removeprefix('--')}; see '{self.prog} --help'")

    @property
    def words(self) -> list[str]:
        """The options of this command."""
        return list(self._option_string_actions)

    @property
    def metavars(self) -> dict[str, str | tuple[str, ...] | None]:
        """What the help calls the value of each argument, such as ``FILE`` or ``DIR``, by the argument's name."""
        return {action.dest: action.metavar for action in self._actions}


def near(word: str, names: Sequence[str]) -> str:
    """The nearest name, as a part of a message; empty if none is near."""
    found = difflib.get_close_matches(word, names, n=1)
    return f"; did you mean {found[0]}?" if found else ""


class Commands:
    """Adds subcommands to a parser; ``add("data demo", ...)`` creates the group ``data`` on first use."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._top = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
        self._groups: dict[str, argparse._SubParsersAction[argparse.ArgumentParser]] = {}

    def add(
        self,
        name: str,
        run: Run,
        about: str,
        example: str,
        *,
        overrides: bool = False,
        alone: bool = False,
        more: str = "",
    ) -> argparse.ArgumentParser:
        """Add a subcommand and return its parser, to which the caller adds arguments.

        Args:
            name: ``COMMAND`` or ``GROUP COMMAND``.
            run: Called with the parsed options.
            about: One sentence for the help.
            example: A whole command line for the help.
            overrides: Whether words that the parser does not know are allowed (``--section.key VALUE``).
            alone: Whether only rank 0 of a job runs it: every rank would write the same files.
            more: Text after the example in the help.
        """
        group, _, last = name.rpartition(" ")
        command = (self._group(group) if group else self._top).add_parser(
            last,
            help=about.replace("%", "%%"),
            description=_wrapped(about),
            epilog=f"example:\n  {example}{more and f'{chr(10)}{chr(10)}{more}'}",
            formatter_class=_WithDefaults,
        )
        command.set_defaults(run=run, overrides=overrides, alone=alone, parser=command)
        return command

    def _group(self, name: str) -> argparse._SubParsersAction[argparse.ArgumentParser]:
        if name not in self._groups:
            parser = self._top.add_parser(name, help=GROUPS[name], description=GROUPS[name])
            self._groups[name] = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
        return self._groups[name]


class _WithDefaults(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default where its help does not say it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        about, default = action.help or "", action.default
        if isinstance(default, bool) or not isinstance(default, int | float | str | Path) or default == "auto":
            return about
        if "default" in about or default == argparse.SUPPRESS:
            return about
        return f"{about}; {default:g} by default" if isinstance(default, float) else f"{about}; %(default)s by default"


def _wrapped(text: str) -> str:
    """Text as wide as the terminal; the formatter that keeps the example's lines does not wrap it."""
    return textwrap.fill(text, max(40, shutil.get_terminal_size().columns - 2))


def whole(word: str) -> int:
    """Argument type: a whole number, 0 or more."""
    return between(word, 0)


def positive(word: str) -> int:
    """Argument type: a whole number above 0."""
    return between(word, 1)


def between(word: str, least: int, most: int | None = None) -> int:
    """A whole number between bounds, both of which are allowed.

    Raises:
        argparse.ArgumentTypeError: It is none; `Parser.error` says it as all other errors.
    """
    try:
        number = int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {word!r}, expected a whole number") from None
    if number < least or (most is not None and number > most):
        raise argparse.ArgumentTypeError(
            f"found {number}, expected {least} {'or more' if most is None else f'to {most}'}"
        )
    return number
