"""The evaluations of a study, parsed by the subcommands themselves before anything runs."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from synco_fast.commands.options import check_input
from synco_fast.commands.parser import Commands, Parser, near
from synco_fast.runtime.errors import ConfigError, UserError

if TYPE_CHECKING:
    from synco_fast.study.evaluations import Evaluation

__all__ = ["parse_evaluations", "parse_supervised"]

#: Options of an evaluation that leave its result as it is, beside what the parser keeps in the same place.
_NEUTRAL = frozenset(
    {"checkpoint", "device", "workers", "fresh", "json", "data", "out", "run", "overrides", "parser", "check"}
)


def parse_evaluations(given: Sequence[str]) -> list[Evaluation]:
    """The values of ``--evaluate``.

    Raises:
        ConfigError: One cannot be run, or two would write the same file.
    """
    found: dict[tuple[str, str | None], Evaluation] = {}
    for words in given:
        evaluation = _parse(words, "evaluate")
        other = found.setdefault((evaluation.name, evaluation.data), evaluation)
        if other is not evaluation:
            raise ConfigError(
                f"evaluate: found {other.text!r} and {words!r}, expected one: both write {other.name}.json"
            )
    return list(found.values())


def parse_supervised(given: str | None, others: Sequence[Evaluation]) -> Evaluation | None:
    """The value of ``--supervised``, beside the evaluations of every run.

    Raises:
        ConfigError: It is no fine-tuning, or one of the others writes the same file.
    """
    if given is None:
        return None
    evaluation = _parse(given, "supervised")
    if evaluation.words[0] != "finetune":
        raise ConfigError(f"supervised: found {given!r}, expected 'finetune --percent N'")
    for other in others:
        if (other.name, other.data) == (evaluation.name, evaluation.data):
            raise ConfigError(
                f"supervised: found {given!r} and --evaluate {other.text!r}, expected one: both write {other.name}.json"
            )
    return evaluation


def _parse(given: str, key: str) -> Evaluation:
    """The words after ``evaluate``, as its subcommand reads them."""
    from synco_fast.commands import COMMANDS

    try:
        words = shlex.split(given)
        if not words:
            raise ConfigError("found no words, expected an evaluation such as 'linear --fast'")
        parser = Parser(prog="synco-fast")
        commands = Commands(parser)
        for command in COMMANDS:
            command.add(commands)
        options, rest = parser.parse_known_args(["evaluate", words[0], "RUN", *words[1:]])
        if rest:
            raise ConfigError(f"found the unknown argument {rest[0]}{near(rest[0], options.parser.words)}")
        if options.out is not None:
            raise ConfigError("out: found one, expected none: each result goes into its run's folder")
        check_input(argparse.Namespace(data=options.data))
        # An evaluation without a check of its own writes a result of its own name.
        name = options.check(options) if "check" in options else words[0]
    except SystemExit as left:  # of --help
        raise ConfigError(f"{key} {given!r}: found a call for help, expected an evaluation") from left
    except UserError as error:
        raise ConfigError(f"{key} {given!r}: {error}") from error
    except ValueError as error:  # of shlex
        raise ConfigError(f"{key} {given!r}: found words that cannot be split ({error})") from error
    from synco_fast.study.evaluations import Evaluation

    return Evaluation(tuple(words), name, options.data, _changed(options))


def _changed(options: argparse.Namespace) -> dict[str, object]:
    """The options that change the result, where they are not the default, as JSON keeps them."""
    found = {}
    for name, value in vars(options).items():
        if name not in _NEUTRAL and value != options.parser.get_default(name):
            found[name] = str(value) if isinstance(value, Path) else value
    return found
