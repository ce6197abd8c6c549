"""``synco-fast evaluate knn``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.commands.options import add_eval_options, check_ranges, eval_options, load_torch, print_result
from synco_fast.commands.parser import Commands

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast evaluate knn``."""
    command = commands.add(
        "evaluate knn",
        _evaluate_knn,
        "Weighted kNN accuracy of a checkpoint's backbone on the held-out split.",
        "synco-fast evaluate knn runs/demo-20260101-120000 --k 20 200",
        joint=True,
    )
    add_eval_options(command)
    command.add_argument(
        "--k",
        type=int,
        nargs="+",
        metavar="K",
        help="by default 20, 200 and the run's own, as far as there are enough images",
    )
    command.add_argument("--temperature", type=float, help="temperature of the votes; the run's own by default")
    command.set_defaults(check=_check)


def _check(options: argparse.Namespace) -> str:
    """Check the ranges of the options; the name of the result."""
    check_ranges(options, k=0, temperature=0)
    return "knn"


def _evaluate_knn(options: argparse.Namespace, console: Console) -> int:
    load_torch(console)
    from synco_fast.evaluation.knn import evaluate_knn

    result = evaluate_knn(
        options.checkpoint,
        eval_options(options),
        k=tuple(options.k) if options.k else None,
        temperature=options.temperature,
        console=console,
    )
    rows = [
        ("temperature", f"{result['temperature']:g}"),
        ("training images", f"{result['bank']:,}"),
        ("held-out images", f"{result['queries']:,}"),
    ]
    print_result(result, options, console, rows)
    return 0
