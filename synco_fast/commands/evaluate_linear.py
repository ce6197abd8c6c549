"""``synco-fast evaluate linear``."""

from __future__ import annotations

import argparse
from dataclasses import replace

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

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast evaluate linear``."""
    command = commands.add(
        "evaluate linear",
        _evaluate_linear,
        "Accuracy of a linear classifier on the frozen backbone: 100 epochs, batch 256, lr 30, as in MoCo.",
        "torchrun --nproc-per-node 8 -m synco_fast evaluate linear runs/synco-r50-200 --data /data/imagenet",
        joint=True,
    )
    add_eval_options(command)
    command.add_argument("--fast", action="store_true", help="train on cached features, all learning rates in one pass")
    command.add_argument("--epochs", type=int, help="100 by default; the learning rate drops after 60 and 80 percent")
    command.add_argument("--batch", type=int, help="images per step over all processes, 256 by default")
    command.add_argument(
        "--lr",
        type=float,
        nargs="+",
        help="learning rate, 30 by default; with --fast one or more, eight from 0.03 to 100 by default",
    )
    add_options(command, "seed")
    command.set_defaults(check=_check)


def _check(options: argparse.Namespace) -> str:
    """Check the ranges of the options; the name of the result."""
    from synco_fast.runtime.errors import ConfigError

    check_ranges(options, epochs=0, batch=0, lr=0)
    if options.lr is not None and len(options.lr) != 1 and not options.fast:
        raise ConfigError(f"lr: found {len(options.lr)} rates, expected one, or several with --fast")
    return "linear_fast" if options.fast else "linear"


def _evaluate_linear(options: argparse.Namespace, console: Console) -> int:
    given = check_ranges(options, epochs=0, batch=0)
    load_torch(console)
    from synco_fast.evaluation.linear import FAST_RATES, PUBLISHED, evaluate_linear, evaluate_linear_fast

    protocol = replace(PUBLISHED, seed=options.seed, **given)
    if options.fast:
        rates = tuple(options.lr) if options.lr else FAST_RATES
        result = evaluate_linear_fast(
            options.checkpoint, eval_options(options), protocol=protocol, rates=rates, console=console
        )
        rows = [("accuracy by lr", "  ".join(f"{rate}: {value:.1%}" for rate, value in result["rates"].items()))]
    else:
        protocol = replace(protocol, head_lr=options.lr[0]) if options.lr else protocol
        result = evaluate_linear(options.checkpoint, eval_options(options), protocol=protocol, console=console)
        rows = [("top-1, best epoch", f"{result['best']:.1%}")]
    rows += [("epochs, batch, lr", f"{result['epochs']}, {result['batch']}, {result['lr']:g}")]
    if agreement := result["agreement"]:
        other = "published protocol" if options.fast else "cached features"
        text = f"{agreement['other_top1']:.1%}, so this is {agreement['difference_in_points']:+.1f} points"
        rows.append((other, text))
    elif options.fast:
        rows.append(("published protocol", "not run: 'evaluate linear' without --fast shows the agreement"))
    print_result(result, options, console, rows)
    return 0
