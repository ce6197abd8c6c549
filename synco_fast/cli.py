"""The command ``synco-fast``: parse, run a subcommand, print errors as one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, TextIO

from rich.text import Text

from synco_fast.runtime.console import LastingConsole, open_console
from synco_fast.version import __version__

if TYPE_CHECKING:
    from synco_fast.runtime.errors import UserError

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``synco-fast`` and return its exit code: 0 on success, 2 for bad input, 130 after Ctrl-C."""
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.files import UNWRITABLE

    words = list(sys.argv[1:] if arguments is None else arguments)
    # A name that the terminal's encoding lacks, as in a locale without UTF-8, must not end a run.
    if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")
    # Decoding processes share the cores with the encoder. Threads that spin take time from those that work; those that
    # sleep at once wake up late for the loss's many short steps. So they spin for some tens of microseconds. GNU OpenMP
    # reads this once, when torch is first imported. Benchmarks have the cores to themselves.
    if words[:1] not in (["bench"], ["profile"]):
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    try:
        try:
            return _run(words)
        except UserError as error:
            return _failed(error)
        except OSError as error:
            if error.errno not in UNWRITABLE:
                raise
            where = error.filename or "a file"
            return _failed(UserError(f"{where}: found no way to read or write it ({error.strerror})"))
        except RuntimeError as error:
            from synco_fast.data.loader import killed_worker

            said = killed_worker(error)
            if said is None:
                raise
            return _failed(UserError(said))
    except KeyboardInterrupt:
        return 130


def _run(words: list[str]) -> int:
    from synco_fast.commands.options import check_input, check_output
    from synco_fast.commands.parser import near
    from synco_fast.runtime.dist_env import DistEnv
    from synco_fast.runtime.errors import UserError

    parser = _parser()
    _complete(parser)
    options, rest = parser.parse_known_args(words)
    if rest and not options.overrides:
        options.parser.error(f"found the unknown argument {rest[0]}{near(rest[0], options.parser.words)}")
    options.rest = rest
    if options.alone and not DistEnv.detect().is_main:
        return 0
    with warnings.catch_warnings():
        warnings.showwarning = _show_note
        try:
            check_output(options)
            check_input(options)
            if "check" in options:
                options.check(options)
            code: int = options.run(options, open_console())
        except UserError as error:
            error.awaited = options.joint
            raise
    return code


def _failed(error: UserError) -> int:
    """Print an error, once in a job where every rank has it, with rank and machine where one may; the exit code."""
    from synco_fast.runtime.dist_env import DistEnv
    from synco_fast.runtime.errors import UserError

    try:
        env = DistEnv.detect()
    except UserError:
        env = DistEnv()
    line = f"{error}{env.place}"
    if env.is_main and not error.said:
        _tell("error", "bold red", line)
    # On one machine the launcher ends them; on others they would wait until their timeout.
    if error.awaited and env.world > env.local_world:
        from synco_fast.runtime.distributed import refuse

        refuse(env, error)
    if not env.is_main:
        env.wait_for_turn(error)
        if not error.said:
            _tell("error", "bold red", line)
    return 2


def _tell(word: str, style: str, said: str) -> None:
    """Print a line to standard error, its first word in colour."""
    LastingConsole(stderr=True).print(Text.assemble((f"{word}:", style), f" {said}"), soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    from synco_fast.commands import COMMANDS, Commands
    from synco_fast.commands.parser import Parser

    parser = Parser(
        prog="synco-fast", description="Contrastive pretraining of image encoders with synthetic hard negatives."
    )
    parser.add_argument("--version", action="version", version=f"synco-fast {__version__}")
    commands = Commands(parser)
    for command in COMMANDS:
        command.add(commands)
    return parser


def _complete(parser: argparse.ArgumentParser) -> None:
    """Answer a shell that asks for completions, and end; argcomplete's way, where it is installed."""
    if "_ARGCOMPLETE" in os.environ:
        try:
            import argcomplete
        except ImportError:
            return
        argcomplete.autocomplete(parser)


def _show_note(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print this package's warnings as one line, on one process of a job; other warnings in Python's own form."""
    if not issubclass(category, UserWarning) or ("synco_fast" not in filename and "argparse" in filename):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
    elif os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        _tell("note", "yellow", str(message))
