"""``synco-fast embed``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from synco_fast.commands.parser import Verbs, two_columns

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast embed``."""
    command = verbs.add(
        "embed",
        _embed,
        "Write features, labels and paths of images to a file.",
        "synco-fast embed runs/demo-20260101-120000 --data /data/photos --out features.npz",
    )
    command.add_argument("checkpoint", type=Path, help="a run folder, a checkpoint, or an imported file")
    command.add_argument("--data", metavar="SOURCE", help="the run's own source by default")
    command.add_argument("--split", choices=("train", "val", "both"), default="both", help="both by default")
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="ends in .npz or .parquet")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), default="auto")
    command.add_argument("--workers", type=int, help="decoding processes; 0 for none")
    command.add_argument("--json", type=Path, metavar="FILE", help="write what was done here as well")


def _embed(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.evaluation.context import Setting
    from synco_fast.evaluation.embed import embed
    from synco_fast.runtime.files import write_json

    setting = Setting(options.data, None, options.device, options.precision, options.workers)
    result = embed(options.checkpoint, options.out, setting, splits=options.split, console=console)
    if options.json is not None:
        write_json(options.json, result)
    table = two_columns(f"features of {result['source']}")
    for name in ("file", "images", "width", "labelled", "broken"):
        table.add_row(name, f"{result[name]:,}" if isinstance(result[name], int) else str(result[name]))
    console.print(table)
    return 0
