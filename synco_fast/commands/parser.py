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
        joint: bool = False,
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
            joint: Whether the ranks of a job run it together.
            more: Text after the example in the help.
        """
        group, _, last = name.rpartition(" ")
        command = (self._group(group) if group else self._top).add_parser(
            last,
            help=about.replace("%", "%%"),
            description=_wrapped(about),
            epilog="\n\n".join(
                filter(None, (f"example:\n{_command_line(example)}", "\n".join(map(_wrapped, more.splitlines()))))
            ),
            formatter_class=_WithDefaults,
        )
        command.set_defaults(run=run, overrides=overrides, alone=alone, joint=joint, parser=command)
        return command

    def _group(self, name: str) -> argparse._SubParsersAction[argparse.ArgumentParser]:
        if name not in self._groups:
            parser = self._top.add_parser(name, help=GROUPS[name], description=GROUPS[name])
            self._groups[name] = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
        return self._groups[name]


class _WithDefaults(argparse.RawDescriptionHelpFormatter):
    """Adds an option's default where its help does not say it, and the names that a list of names is made of."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False)

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        if action.type in (int, whole, positive):
            return "N"
        return "X" if action.type is float else super()._get_default_metavar_for_optional(action)

    def _metavar_formatter(self, action: argparse.Action, default_metavar: str) -> Callable[[int], tuple[str, ...]]:
        if _lists_names(action):
            return lambda size: ("NAME",) * size
        return super()._metavar_formatter(action, default_metavar)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        about, default = action.help or "", action.default
        if _lists_names(action) and action.metavar is None:
            return f"{', '.join(map(str, action.choices or ()))}; {about}"
        if isinstance(default, bool) or not isinstance(default, int | float | str | Path) or default == "auto":
            return about
        if "default" in about or default == argparse.SUPPRESS:
            return about
        return f"{about}; {default:g} by default" if isinstance(default, float) else f"{about}; %(default)s by default"


def _lists_names(action: argparse.Action) -> bool:
    """Whether an option takes names that would fill the usage line: several of them, or one of many."""
    return action.choices is not None and (action.nargs == "+" or len(",".join(map(str, action.choices))) > 40)


def _command_line(words: str) -> str:
    """A command line in 80 columns, as a shell takes it, continued before an option."""
    lines = [""]
    for part in re.split(r" (?=-)", f"  {words}"):
        if lines[-1] and len(lines[-1]) + len(part) > 75:
            lines[-1] += " \\"
            lines.append(f"      {part}")
        else:
            lines[-1] += f"{' ' if lines[-1] else ''}{part}"
    return "\n".join(lines)


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
