"""``synco-fast export``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.commands.options import CHECKPOINT, add_options, load_torch, path, write_results
from synco_fast.commands.parser import Commands
from synco_fast.commands.tables import two_columns
from synco_fast.export.formats import FORMATS

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast export``."""
    command = commands.add(
        "export",
        _export,
        "Export a checkpoint's backbone for another tool, with a model card.",
        "synco-fast export runs/demo-20260101-120000 --format timm --out exported",
        alone=True,
    )
    command.add_argument("checkpoint", type=path, help=CHECKPOINT)
    command.add_argument("--format", required=True, choices=FORMATS, help="docs/export.md says what loads each")
    command.add_argument("--out", type=path, metavar="DIR", help="the folder; RUN/export/FORMAT by default")
    command.add_argument("--licence", metavar="TEXT", help="licence stated in the model card; not stated by default")
    add_options(command, json="write a summary here as well")


def _export(options: argparse.Namespace, console: Console) -> int:
    load_torch(console)
    from synco_fast.export.save import export_checkpoint
    from synco_fast.runtime.environment import describe_environment

    done = export_checkpoint(options.checkpoint, options.format, options.out, licence=options.licence)
    table = two_columns(f"{options.checkpoint} for {done.format}")
    for file in done.files:
        table.add_row("file", str(done.folder / file))
    for name, value in done.checks.items():
        table.add_row(name, f"{value:.1e}")
    console.print(table)
    figures = {"format": done.format, "folder": str(done.folder), "files": list(done.files), "checks": done.checks}
    write_results(options, {**figures, "environment": describe_environment()})
    return 0
