"""``synco-fast evaluate finetune``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from synco_fast.commands.options import add_setting, print_result, setting_of
from synco_fast.commands.parser import Verbs

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast evaluate finetune``."""
    command = verbs.add(
        "evaluate finetune",
        _evaluate_finetune,
        "Accuracy after fine-tuning on a few labels: batch 1024, 60 epochs on 1 %, 30 on 10 %, rates swept.",
        "synco-fast evaluate finetune runs/synco-r50-200 --data /data/imagenet --percent 10",
    )
    add_setting(command)
    command.add_argument("--percent", type=float, default=1.0, help="of each class's training images")
    command.add_argument("--list", type=Path, metavar="FILE", help="train on the images that this file names instead")
    command.add_argument("--epochs", type=int, help="60 on 1 percent, 30 on more by default")
    command.add_argument("--batch", type=int, help="images a step over all processes, 1024 by default")
    command.add_argument("--lr", type=float, nargs="+", help="of the backbone; 0.005 to 0.1 by default")
    command.add_argument("--head-lr", type=float, help="of the classifier, 0.5 by default")
    command.add_argument("--seed", type=int, default=0, help="decides which images, order and crops")


def _evaluate_finetune(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.evaluation.finetune import RATES, evaluate_finetune, published_plan
    from synco_fast.runtime.errors import ConfigError

    given = {name: getattr(options, name) for name in ("epochs", "batch", "head_lr")}
    given = {name: value for name, value in given.items() if value is not None}
    for name, value in given.items():
        if value <= 0:
            raise ConfigError(f"{name}: found {value}, expected above 0")
    result = evaluate_finetune(
        options.checkpoint,
        setting_of(options),
        percent=options.percent,
        listed=options.list,
        rates=tuple(options.lr) if options.lr else RATES,
        plan=replace(published_plan(options.percent), seed=options.seed, **given),
        console=console,
    )
    rows = [
        ("accuracy by lr", "  ".join(f"{rate}: {value:.1%}" for rate, value in result["rates"].items())),
        ("labelled images", f"{result['images']:,}"),
        ("epochs, batch", f"{result['epochs']}, {result['batch']}"),
    ]
    print_result(result, options, console, rows)
    return 0
