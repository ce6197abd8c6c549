"""``synco-fast evaluate knn``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from rich.console import Console

from synco_fast.commands.options import add_setting, print_result, setting_of
from synco_fast.commands.parser import Verbs

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast evaluate knn``."""
    command = verbs.add(
        "evaluate knn",
        _evaluate_knn,
        "Weighted kNN accuracy of a checkpoint's backbone on the held-out split.",
        "synco-fast evaluate knn runs/demo-20260101-120000 --neighbours 20 200",
    )
    add_setting(command)
    command.add_argument(
        "--neighbours", type=int, nargs="+", metavar="K", help="20, 200 and the run's own by default, where they fit"
    )
    command.add_argument("--temperature", type=float, help="of the neighbours' weights")


def _evaluate_knn(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.evaluation.weighted_knn import evaluate_knn
    from synco_fast.runtime.errors import ConfigError

    if options.neighbours and min(options.neighbours) < 1:
        raise ConfigError(f"neighbours: found {min(options.neighbours)}, expected 1 or more")
    if options.temperature is not None and options.temperature <= 0:
        raise ConfigError(f"temperature: found {options.temperature:g}, expected above 0")
    result = evaluate_knn(
        options.checkpoint,
        setting_of(options),
        neighbours=tuple(options.neighbours) if options.neighbours else None,
        temperature=options.temperature,
        console=console,
    )
    rows = [
        ("temperature", f"{result['temperature']:g}"),
        ("images to choose from", f"{result['bank']:,}"),
        ("held-out images", f"{result['queries']:,}"),
    ]
    print_result(result, options, console, rows)
    return 0
