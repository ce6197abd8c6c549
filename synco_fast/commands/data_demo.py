"""``synco-fast data demo``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from synco_fast.commands.parser import Verbs

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast data demo``."""
    command = verbs.add(
        "data demo", _data_demo, "Draw the embedded image set into a folder.", "synco-fast data demo datasets/demo"
    )
    command.add_argument("folder", type=Path)
    command.add_argument("--train", type=int, default=200, help="training images a class")
    command.add_argument("--validation", type=int, default=50, help="held-out images a class")
    command.add_argument("--seed", type=int, default=0)


def _data_demo(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.data.sources.demo import CLASSES, make_demo
    from synco_fast.runtime.errors import UserError

    try:
        folder = make_demo(options.folder, train=options.train, validation=options.validation, seed=options.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    console.print(
        f"{len(CLASSES)} classes, {options.train} training and {options.validation} held-out images each: {folder}",
        highlight=False,
        soft_wrap=True,
    )
    return 0
