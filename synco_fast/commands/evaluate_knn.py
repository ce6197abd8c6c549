"""``synco-fast evaluate knn``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from synco_fast.commands.verbs import Verbs, two_columns

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast evaluate knn``."""
    command = verbs.add(
        "evaluate knn",
        _evaluate_knn,
        "Weighted kNN accuracy of a checkpoint's backbone on the held-out split.",
        "synco-fast evaluate knn runs/demo-20260101-120000 --neighbours 20",
    )
    command.add_argument("checkpoint", type=Path, help="a run folder or a checkpoint")
    command.add_argument("--data", metavar="SOURCE", help="the run's own source by default")
    command.add_argument("--neighbours", type=int, help="k")
    command.add_argument("--temperature", type=float, help="of the neighbours' weights")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")


def _evaluate_knn(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.evaluation.checkpoint import evaluate_knn
    from synco_fast.training.run import write_json

    result = evaluate_knn(
        options.checkpoint, source=options.data, neighbours=options.neighbours, temperature=options.temperature
    )
    if options.json is not None:
        write_json(options.json, result)
    table = two_columns(f"kNN of {result['checkpoint']}")
    for name, value in (
        ("accuracy", f"{result['knn']:.1%}"),
        ("chance", f"{result['chance']:.1%}"),
        ("k", str(result["neighbours"])),
        ("images to choose from", f"{result['bank']:,}"),
        ("held-out images", f"{result['queries']:,}"),
    ):
        table.add_row(name, value)
    console.print(table)
    return 0
