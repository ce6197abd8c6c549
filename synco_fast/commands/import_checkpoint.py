"""``synco-fast import``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.commands.options import add_options, load_torch, path, write_results
from synco_fast.commands.parser import Commands
from synco_fast.commands.tables import two_columns
from synco_fast.methods import METHODS

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast import``."""
    command = commands.add(
        "import",
        _import,
        "Convert a published checkpoint of MoCo, MoCHi or SynCo, or a bare backbone, to a synco-fast checkpoint.",
        "synco-fast import moco_v2_800ep_pretrain.pth.tar --method moco --out moco-v2-800.pt",
        alone=True,
    )
    command.add_argument("file", type=path, help="the authors' layout (.pth.tar), or a backbone's state_dict")
    command.add_argument("--method", required=True, choices=tuple(METHODS), help="the method that pretrained it")
    command.add_argument("--backbone", metavar="NAME", help="the architecture, if the file does not name it")
    command.add_argument("--size", type=int, metavar="N", help="side of the images; 224, or 32 with a stem of 3 x 3")
    command.add_argument("--out", type=path, required=True, metavar="FILE", help="the checkpoint to write, .pt")
    add_options(command, json="write a summary here as well")


def _import(options: argparse.Namespace, console: Console) -> int:
    load_torch(console)
    from synco_fast.export.import_checkpoint import import_checkpoint
    from synco_fast.runtime.environment import describe_environment

    weights = import_checkpoint(
        options.file, options.out, method=options.method, backbone=options.backbone, size=options.size
    )
    model, recipe = weights.config.model, weights.config.augment
    figures = {
        "checkpoint": str(options.out),
        "method": options.method,
        "backbone": model.backbone + (", small stem" if model.small_stem else ""),
        "images": f"{recipe.size} pixels, cut from {recipe.resize}",
        "tensors": len(weights.state),
        **{name: value for name, value in weights.imported.items() if value is not None},
    }
    table = two_columns(f"imported {options.file}")
    for name, value in figures.items():
        table.add_row(name, str(value))
    console.print(table)
    write_results(options, {**figures, "environment": describe_environment()})
    return 0
