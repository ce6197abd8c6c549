"""``synco-fast validate --part norm``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    from synco_fast.runtime.files import write_json
    from synco_fast.runtime.progress import ProgressBar

    wanted = norm_cases([getattr(torch, name) for name in options.dtypes], large=device.type == "cuda")
    verdicts: list[NormVerdict] = []
    with ProgressBar(console, "comparing", len(wanted), unit="case") as bar:
        for case in wanted:
            verdicts += validate_norm([case], device)
            bar.advance()
    if options.json is not None:
        figures = {"environment": describe_environment(device), "device": device.type}
        write_json(options.json, figures | {"cases": [verdict.as_dict() for verdict in verdicts]})
    skipped = unserved_by_triton(torch.empty(1, 1, 1, 1, device=device))
    _print(verdicts, device.type, skipped, console)
    return int(any(verdict.misses for verdict in verdicts))


def _print(verdicts: list[NormVerdict], device: str, skipped: str | None, console: Console) -> None:
    table = Table(
        title=f"largest error as a share of its bound, on {device}",
        caption=f"triton not run: {skipped}" if skipped else None,
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for name in ("form", "dtype"):
        table.add_column(name, no_wrap=True)
    for name in ("y", "dx", "dw, db", "running", "cases"):
        table.add_column(name, justify="right", no_wrap=True)
    keys = dict.fromkeys((verdict.backend, verdict.case.dtype) for verdict in verdicts)
    for backend, dtype in keys:
        group = [verdict for verdict in verdicts if (verdict.backend, verdict.case.dtype) == (backend, dtype)]
        shares = [
            max(verdict.errors[name] / (verdict.bounds[name] or 1) for verdict in group for name in names)
            for names in (("y",), ("dx",), ("dw", "db"), ("running_mean", "running_var"))
        ]
        bad = sum(bool(verdict.misses) for verdict in group)
        cases = Text(f"{bad} bad", "bold red") if bad else Text(f"{len(group)} ok", "green")
        table.add_row(backend, str(dtype).removeprefix("torch."), *(f"{share:.0%}" for share in shares), cases)
    console.print(table)
    missed = [verdict for verdict in verdicts if verdict.misses]
    for verdict in missed:
        case = verdict.case
        about = f"{verdict.backend} {case.dtype} {case.shape} groups={case.groups} relu={case.relu}"
        about += f" residual={case.residual} training={case.training} mean={case.mean:g}"
        line = Text.assemble(("missed", "red"), f" {about}: {', '.join(verdict.misses)}")
        console.print(line, soft_wrap=True)
    style = "bold red" if missed else "green"
    outcome = (
        f"{len(missed)} of {len(verdicts)} cases missed" if missed else f"{len(verdicts)} cases within their bounds"
    )
    console.print(outcome, style=style)
