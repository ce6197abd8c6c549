"""``synco-fast report``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.commands.options import add_options, load_torch, path
from synco_fast.commands.parser import Commands
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast report``."""
    command = commands.add(
        "report",
        _report,
        "Write a self-contained HTML report of a run that works offline.",
        "synco-fast report runs/demo-20260101-120000",
        alone=True,
    )
    command.add_argument("run_folder", type=path, metavar="RUN", help="a run folder")
    command.add_argument("--out", type=path, metavar="FILE", help="the file; RUN/report.html by default")
    command.add_argument("--data", metavar="SOURCE", help="where the images are now; the run's own source by default")
    add_options(command, "workers")


def _report(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.runtime.files import check_writable

    out = options.out or options.run_folder / "report.html"
    check_writable(out, "out", file=True)
    load_torch(console)
    from synco_fast.evaluation.context import EvalOptions
    from synco_fast.report.page import write_report

    page = write_report(
        options.run_folder, out, EvalOptions(data=options.data, out=out.parent, workers=options.workers)
    )
    say(console, f"report: {page}")
    return 0
