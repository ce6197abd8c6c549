"""``synco-fast data demo``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.commands.options import add_options, path
from synco_fast.commands.parser import Commands, positive
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast data demo``."""
    command = commands.add(
        "data demo", _data_demo, "Write the built-in demo images to a folder.", "synco-fast data demo datasets/demo"
    )
    command.add_argument("folder", type=path, help="the folder to write, new or of the same demo images")
    command.add_argument("--train", type=positive, default=200, metavar="N", help="training images per class")
    command.add_argument("--validation", type=positive, default=50, metavar="N", help="held-out images per class")
    add_options(command, "seed")


def _data_demo(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.data.sources.demo import CLASSES, make_demo
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.progress import ProgressBar

    total = len(CLASSES) * (options.train + options.validation)
    try:
        with ProgressBar(console, "drawing images", total) as bar:
            folder = make_demo(
                options.folder,
                train=options.train,
                validation=options.validation,
                seed=options.seed,
                tick=bar.advance,
            )
    except ValueError as error:
        raise UserError(str(error)) from error
    each = f"{options.train} training and {options.validation} held-out images each"
    say(console, f"{len(CLASSES)} classes, {each}: {folder}")
    return 0
