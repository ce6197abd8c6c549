"""``synco-fast embed``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.commands.options import CHECKPOINT, add_options, eval_options, load_torch, path, write_results
from synco_fast.commands.parser import Commands
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.errors import ConfigError

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast embed``."""
    command = commands.add(
        "embed",
        _embed,
        "Write features, labels and paths of images to a file.",
        "synco-fast embed runs/demo-20260101-120000 --data /data/photos --out features.npz",
        alone=True,
    )
    command.add_argument("checkpoint", type=path, help=CHECKPOINT)
    command.add_argument("--data", metavar="SOURCE", help="the run's own source by default")
    command.add_argument(
        "--split", choices=("train", "val", "both"), default="both", help="which split; both by default"
    )
    command.add_argument("--out", type=path, required=True, metavar="FILE", help="the file to write, .npz or .parquet")
    add_options(command, "device", "precision", "workers", json="write a summary here as well")
    command.set_defaults(fresh=False)


def _embed(options: argparse.Namespace, console: Console) -> int:
    if options.out.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"out: found {options.out.name!r}, expected a name that ends in .npz or .parquet")
    load_torch(console)
    from synco_fast.evaluation.embed import embed

    result = embed(options.checkpoint, options.out, eval_options(options), splits=options.split, console=console)
    write_results(options, result)
    table = two_columns(f"features of {result['source']}")
    for name in ("file", "images", "width", "labelled", "corrupt"):
        table.add_row(name, f"{result[name]:,}" if isinstance(result[name], int) else str(result[name]))
    console.print(table)
    return 0
