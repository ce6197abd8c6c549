"""``synco-fast bench optimizer``."""

from __future__ import annotations

import argparse

from rich.console import Console

from synco_fast.bench.subjects import OPTIMIZERS
from synco_fast.commands.options import add_options, write_results
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast bench optimizer``."""
    command = commands.add(
        "bench optimizer",
        _bench_optimizer,
        "Time of an optimizer step on a backbone's parameters: PyTorch's, LARS and LAMB, timm's, and NVIDIA apex's "
        "where it is installed.",
        "synco-fast bench optimizer --backbone resnet50 --json optimizer.json",
    )
    command.add_argument("--backbone", default="resnet50", help="a torchvision model, or timm/NAME")
    command.add_argument(
        "--subjects", nargs="+", choices=tuple(OPTIMIZERS), help="all that run on this machine by default"
    )
    add_options(command, "device")
    command.add_argument("--repeats", type=positive, default=10, help="timed steps a round")
    command.add_argument("--rounds", type=positive, default=5, help="rounds over all subjects")
    add_options(command, "json")


def _bench_optimizer(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.bench.optimizer import measure_optimizers, unavailable
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.precision import resolve_device
    from synco_fast.runtime.progress import ProgressBar

    device = resolve_device(options.device)
    reasons = {subject: unavailable(subject, device) for subject in OPTIMIZERS}
    subjects = options.subjects or [subject for subject in OPTIMIZERS if not reasons[subject]]
    for subject in subjects:
        if reasons[subject]:
            raise UserError(f"subjects: found {subject}, expected others on this machine: {reasons[subject]}")
    with ProgressBar(console, "measuring", len(subjects) * options.rounds, unit="form") as bar:
        results = measure_optimizers(
            subjects, options.backbone, device, repeats=options.repeats, rounds=options.rounds, advance=bar.advance
        )
    environment = describe_environment(device)
    without = {subject: reason for subject, reason in reasons.items() if reason}
    about = {"environment": environment, "device": device.type, "backbone": options.backbone}
    write_results(options, about | {"results": results, "unavailable": without})
    count = results[0]["parameters"] / 1e6
    title = f"{environment['device']}, {options.backbone}, {count:,.1f} M parameters"
    table = figures_table(title, ["optimizer"], ["ms", "operations", "host waits"])
    table.add_column("what")
    for row in results:
        cells = f"{1e3 * row['median_s']:,.3f}", f"{row['operations']:,}", "yes" if row["waits"] else "no"
        table.add_row(row["subject"], *cells, row["about"])
    console.print(table)
    say(console, "with the gradient's norm and the skipping of bad steps; operations as PyTorch dispatches them")
    return 0
