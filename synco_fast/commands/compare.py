"""``synco-fast compare``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from synco_fast.commands.options import add_options, load_torch, path, write_results
from synco_fast.commands.parser import Commands
from synco_fast.runtime.console import say

__all__ = ["add"]

#: With more figures than these, and than groups, each has a row instead of a column.
_COLUMNS = 4


def add(commands: Commands) -> None:
    """Add ``synco-fast compare``."""
    command = commands.add(
        "compare",
        _compare,
        "Compare runs in a table and a picture; runs that differ only by seed give mean and standard deviation.",
        "synco-fast compare runs/moco-0 runs/moco-1 runs/synco-0 runs/synco-1 --out comparison.png",
        alone=True,
    )
    command.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run folders")
    command.add_argument(
        "--out", type=path, default=Path("comparison.png"), metavar="FILE", help="the picture to write"
    )
    add_options(command, "json")


def _compare(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.runtime.errors import ConfigError

    if options.out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise ConfigError(f"out: found {options.out.name!r}, expected a name that ends in .png, .svg or .pdf")
    load_torch(console)
    from synco_fast.report.compare import SPEED, compare_runs, draw_comparison, shown_figures
    from synco_fast.report.runs import mean_and_deviation
    from synco_fast.runtime.environment import describe_environment

    groups = compare_runs(options.runs)
    draw_comparison(groups, options.out)
    shown = shown_figures(groups)
    rows = [["method", "seeds", "epochs x batch", *shown]]
    for group in groups:
        cells = [_cell(mean_and_deviation(group.values(name)), speed=name == SPEED) for name in shown]
        rows.append([group.title, str(len(group.runs)), group.budget, *cells])
    if len(shown) > max(_COLUMNS, len(groups)):
        rows = [list(column) for column in zip(*rows, strict=True)]
    many = len(options.runs)
    table = Table(title=f"{many} runs; mean and standard deviation over seeds" if many > 1 else "1 run")
    for title in rows[0]:
        # In columns that fold, rich would cut the words of a title.
        table.add_column(Text(title), overflow="fold", min_width=max(map(len, title.split()), default=0))
    for row in rows[1:]:
        table.add_row(*map(Text, row))
    console.print(table)
    for run in (run for group in groups for run in group.runs):
        for note in run.notes:
            say(console, f"note: {run.folder}/evaluation/{note}")
    say(console, f"picture: {options.out}")
    figures = [
        {
            "method": group.title,
            "runs": [str(run.folder) for run in group.runs],
            "seeds": [run.config.seed for run in group.runs],
            "budget": group.budget,
            **{
                name: {"values": group.values(name), "mean": found[0], "deviation": found[1]}
                for name in shown
                if (found := mean_and_deviation(group.values(name)))
            },
        }
        for group in groups
    ]
    write_results(options, {"groups": figures, "environment": describe_environment()})
    return 0


def _cell(found: tuple[float, float] | None, *, speed: bool) -> str:
    if found is None:
        return ""
    mean, deviation = found
    if speed:
        return f"{mean:,.0f}" + (f" ± {deviation:,.0f}" if deviation else "")
    return f"{mean:.1%}" + (f" ± {100 * deviation:.1f}" if deviation else "")
