"""``synco-fast evaluate finetune``."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from synco_fast.commands.options import (
    add_eval_options,
    add_options,
    check_ranges,
    eval_options,
    load_torch,
    print_result,
)
from synco_fast.commands.parser import Commands
from synco_fast.runtime.results import finetuning_name

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast evaluate finetune``."""
    command = commands.add(
        "evaluate finetune",
        _evaluate_finetune,
        "Accuracy after fine-tuning on few labels: batch 1024, 60 epochs on 1 %, 30 on 10 %, learning rates swept.",
        "synco-fast evaluate finetune runs/synco-r50-200 --data /data/imagenet --percent 10",
        joint=True,
    )
    add_eval_options(command)
    command.add_argument("--percent", type=float, default=1.0, help="percentage of each class's training images")
    command.add_argument("--list", type=Path, metavar="FILE", help="train on the images listed in this file instead")
    command.add_argument("--epochs", type=int, help="60 on 1 percent of the images, 30 on more by default")
    command.add_argument("--batch", type=int, help="images per step over all processes, 1024 by default")
    command.add_argument("--lr", type=float, nargs="+", help="learning rates of the backbone; 0.005 to 0.1 by default")
    command.add_argument("--head-lr", type=float, help="learning rate of the classifier, 0.5 by default")
    add_options(command, seed="seed of subset, order and crops")
    command.set_defaults(check=_check)


def _check(options: argparse.Namespace) -> str:
    """Check the ranges of the options; the name of the result."""
    from synco_fast.runtime.errors import ConfigError

    check_ranges(options, epochs=0, batch=0, head_lr=0, lr=0, percent=0)
    if options.percent > 100:
        raise ConfigError(f"percent: found {options.percent:g}, expected above 0, up to 100")
    if options.list is not None and not options.list.is_file():
        raise ConfigError(f"list: cannot read {options.list} (no such file)")
    return finetuning_name(options.percent, options.list)


def _evaluate_finetune(options: argparse.Namespace, console: Console) -> int:
    given = check_ranges(options, epochs=0, batch=0, head_lr=0)
    load_torch(console)
    from synco_fast.evaluation.finetune import RATES, evaluate_finetune, published_protocol

    result = evaluate_finetune(
        options.checkpoint,
        eval_options(options),
        percent=options.percent,
        listed=options.list,
        rates=tuple(options.lr) if options.lr else RATES,
        protocol=lambda percent: replace(published_protocol(percent), seed=options.seed, **given),
        console=console,
    )
    rows = [
        ("accuracy by lr", "  ".join(f"{rate}: {value:.1%}" for rate, value in result["rates"].items())),
        ("labelled images", f"{result['images']:,}"),
        ("epochs, batch", f"{result['epochs']}, {result['batch']}"),
    ]
    print_result(result, options, console, rows)
    return 0
