"""``synco-fast validate --part norm``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from synco_fast.commands.options import write_results
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    import torch

    from synco_fast.kernels.norm.validation import NormVerdict

__all__ = ["validate_batch_norm"]


def validate_batch_norm(options: argparse.Namespace, device: torch.device, console: Console) -> int:
    """Compare the forms of the batch norm with the formula in float64; 1 on a miss.

    Args:
        options: ``dtypes`` and ``json`` are read.
        device: Where all of them compute.
        console: Takes a table and a line for each miss.
    """
    import torch

    from synco_fast.kernels.norm import unserved_by_triton
    from synco_fast.kernels.norm.validation import norm_cases, validate_norm
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.progress import ProgressBar

    wanted = norm_cases([getattr(torch, name) for name in options.dtypes], large=device.type == "cuda")
    verdicts: list[NormVerdict] = []
    with ProgressBar(console, "comparing", len(wanted), unit="case") as bar:
        for case in wanted:
            verdicts += validate_norm([case], device)
            bar.advance()
    figures = {"environment": describe_environment(device), "device": device.type}
    write_results(options, figures | {"cases": [verdict.as_dict() for verdict in verdicts]})
    skipped = unserved_by_triton(torch.empty(1, 1, 1, 1, device=device))
    _print(verdicts, device.type, skipped, console)
    return int(any(verdict.misses for verdict in verdicts))


def _print(verdicts: list[NormVerdict], device: str, skipped: str | None, console: Console) -> None:
    title = f"largest error as a share of its bound, on {device}"
    caption = f"triton not run: {skipped}" if skipped else None
    table = figures_table(title, ["form", "dtype"], ["y", "dx", "dw, db", "running", "cases"], caption=caption)
    keys = dict.fromkeys((verdict.backend, verdict.case.dtype) for verdict in verdicts)
    for backend, dtype in keys:
        group = [verdict for verdict in verdicts if (verdict.backend, verdict.case.dtype) == (backend, dtype)]
        shares = [
            max(verdict.errors[name] / (verdict.bounds[name] or 1) for verdict in group for name in names)
            for names in (("y",), ("dx",), ("dw", "db"), ("running_mean", "running_var"))
        ]
        bad = sum(bool(verdict.misses) for verdict in group)
        outcome = Text(f"{bad} bad", "bold red") if bad else Text(f"{len(group)} ok", "green")
        table.add_row(backend, str(dtype).removeprefix("torch."), *(f"{share:.0%}" for share in shares), outcome)
    console.print(table)
    missed = [verdict for verdict in verdicts if verdict.misses]
    for verdict in missed:
        case = verdict.case
        about = f"{verdict.backend} {case.dtype} {case.shape} groups={case.groups} relu={case.relu}"
        about += f" residual={case.residual} training={case.training} mean={case.mean:g}"
        say(console, f"missed {about}: {', '.join(verdict.misses)}", "red")
    if missed:
        say(console, f"{len(missed)} of {len(verdicts)} cases missed", "bold red")
    else:
        say(console, f"{len(verdicts)} cases within their bounds", "green")
