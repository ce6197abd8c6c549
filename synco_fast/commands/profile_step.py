"""``synco-fast profile step``."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from rich.console import Console

from synco_fast.commands.options import SOURCE, add_options, load_torch, path, write_results
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands, positive
from synco_fast.commands.tables import figures_table
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast profile step``."""
    command = commands.add(
        "profile step",
        _profile_step,
        "Show where a training step spends its time, by phase, and write a trace. Any key of the configuration "
        "can be set as --section.key VALUE.",
        "synco-fast profile step --config demo --data demo --steps 10",
        overrides=True,
    )
    command.add_argument("--config", metavar="PRESET", default="demo", help="a preset or a YAML file")
    command.add_argument("--data", metavar="SOURCE", help=f"{SOURCE}; short for --data.source, the preset's by default")
    command.add_argument("--steps", type=positive, default=10, help="timed steps")
    command.add_argument(
        "--out", type=path, metavar="DIR", help="folder of the trace; profiles/PRESET-DATE-TIME by default"
    )
    add_options(command, "json")


def _profile_step(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.presets import load_config

    overrides = overrides_of(options.rest)
    if options.data is not None:
        overrides["data.source"] = options.data
    config = load_config(options.config, overrides)
    # The profiler's log lines would mix with the table; these are read when torch is imported.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    load_torch(console)
    from synco_fast.training.tuning.profiler import profile_step

    folder = options.out or Path("profiles") / f"{config.preset}-{time.strftime('%Y%m%d-%H%M%S')}"
    report = profile_step(config, folder, steps=options.steps)
    write_results(options, report)
    table = figures_table("", ["phase"], ["ms", "share"])
    for name, found in report["phases"].items():
        table.add_row(name, f"{found['ms']:,.2f}", f"{found['share']:.1%}")
    title = f"{config.method.name}, {config.model.backbone}, batch {config.training.batch}: "
    title += f"{report['step_ms']:,.1f} ms a step, {report['images_per_second']:,.0f} images/s"
    say(console, title)
    console.print(table)
    say(console, f"peak memory held: {report['peak_mib']:,.0f} MiB")
    for line in [*report["notes"], *report["files"]]:
        say(console, line)
    return 0
