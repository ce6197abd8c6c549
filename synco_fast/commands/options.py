"""What the verbs of ``synco-fast evaluate`` share: options, and how they print."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.commands.parser import two_columns

if TYPE_CHECKING:
    from synco_fast.evaluation.context import Setting

__all__ = ["add_setting", "print_result", "setting_of"]


def add_setting(command: argparse.ArgumentParser) -> None:
    """The options that every evaluation takes."""
    command.add_argument("checkpoint", type=Path, help="a run folder, a checkpoint, or an imported file")
    command.add_argument("--data", metavar="SOURCE", help="the run's own source by default")
    command.add_argument("--out", type=Path, metavar="DIR", help="figures, caches, states; RUN/evaluation by default")
    command.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    command.add_argument("--precision", choices=("auto", "fp32", "tf32", "bf16", "fp16"), default="auto")
    command.add_argument("--workers", type=int, help="decoding processes; 0 for none")
    command.add_argument("--fresh", action="store_true", help="take up nothing that an earlier call left")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")


def setting_of(options: argparse.Namespace) -> Setting:
    """The same options, typed."""
    from synco_fast.evaluation.context import Setting
    from synco_fast.runtime.errors import ConfigError

    if options.workers is not None and options.workers < 0:
        raise ConfigError(f"workers: found {options.workers}, expected 0 or more")
    return Setting(options.data, options.out, options.device, options.precision, options.workers, options.fresh)


def print_result(
    result: dict[str, Any], options: argparse.Namespace, console: Console, rows: Sequence[tuple[str, str]]
) -> None:
    """The closing table, and ``--json``; only by the first process of a job."""
    from synco_fast.runtime.distributed import Place
    from synco_fast.runtime.files import write_json

    if not Place.find().first:
        return
    if options.json is not None:
        write_json(options.json, result)
    table = two_columns(f"{result['evaluation']} of {result['checkpoint']}")
    for name, value in result["headline"].items():
        table.add_row(name, f"{value:.1%}", style="bold")
    detection = result["evaluation"].startswith("detection")
    table.add_row("before training (chance)" if detection else "chance", f"{result['chance']:.1%}")
    for name, text in rows:
        table.add_row(name, text)
    if result.get("backbone_unchanged"):
        table.add_row("backbone", "unchanged")
    console.print(table)
