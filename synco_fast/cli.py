"""The command ``synco-fast``: it parses, runs a verb and turns errors into one line."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TextIO

from rich.console import Console
from rich.markup import escape

from synco_fast.version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``synco-fast`` and return its exit code: 0 done, 2 for input that a person can mend, 130 after Ctrl-C."""
    from synco_fast.runtime.errors import UserError

    words = list(sys.argv[1:] if arguments is None else arguments)
    # Where decoding processes share the cores with the encoder, threads that spin take the time of those that work, and
    # threads that sleep at once wake up late for the head's many short steps: they spin for some tens of microseconds.
    # GNU OpenMP reads this once, when torch is first imported. Benchmarks have the cores to themselves.
    if words[:1] not in (["bench"], ["profile"]):
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")
    options, rest = _parser().parse_known_args(words)
    if rest and not options.overrides:
        options.parser.error(f"unknown argument {rest[0]}")
    console = Console()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            code: int = options.run(options, rest, console)
    except UserError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        return 130
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """One line for what this package warns of, from one process of a job; Python's own form for the rest."""
    from synco_fast.runtime.migrations import OldLayoutWarning

    if not issubclass(category, OldLayoutWarning):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno))
    elif os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
        Console(stderr=True).print(escape(str(message)), style="yellow", highlight=False, soft_wrap=True)


def _parser() -> argparse.ArgumentParser:
    from synco_fast.commands import COMMANDS, Verbs

    parser = argparse.ArgumentParser(
        prog="synco-fast", description="Contrastive pretraining of image encoders with synthetic hard negatives."
    )
    parser.add_argument("--version", action="version", version=f"synco-fast {__version__}")
    verbs = Verbs(parser)
    for command in COMMANDS:
        command.add(verbs)
    return parser
