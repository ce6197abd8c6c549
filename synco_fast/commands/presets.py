"""``synco-fast presets``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from synco_fast.commands.parser import Verbs

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast presets``."""
    command = verbs.add("presets", _presets, "List the presets, or show one whole.", "synco-fast presets demo")
    command.add_argument("name", nargs="?", help="show this preset's resolved configuration as YAML")


def _presets(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.presets import PRESETS, load_config

    if options.name is not None:
        sys.stdout.write(load_config(options.name).to_yaml())
        return 0
    table = Table()
    table.add_column("preset", no_wrap=True)
    table.add_column("what for", overflow="fold")
    for name, values in PRESETS.items():
        table.add_row(name, values["about"])
    console.print(table)
    return 0
