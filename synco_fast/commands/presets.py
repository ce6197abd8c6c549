"""``synco-fast presets``."""

from __future__ import annotations

import argparse
import sys

from rich.console import Console
from rich.table import Table

from synco_fast.commands.parser import Commands

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast presets``."""
    command = commands.add(
        "presets", _presets, "List the presets, or print one with all its keys.", "synco-fast presets demo"
    )
    command.add_argument(
        "name", nargs="?", help="print this preset as YAML, each key with its meaning; --config reads it back"
    )


def _presets(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.presets import PRESETS, load_config

    if options.name is not None:
        from synco_fast.explain import explain_config

        sys.stdout.write(explain_config(load_config(options.name)))
        return 0
    table = Table()
    table.add_column("preset", no_wrap=True)
    table.add_column("purpose", overflow="fold")
    for name, values in PRESETS.items():
        table.add_row(name, values["about"])
    console.print(table)
    return 0
