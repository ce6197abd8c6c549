"""``synco-fast pretrain``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from synco_fast.commands.overrides import read_overrides
from synco_fast.commands.verbs import Verbs, two_columns

__all__ = ["add"]


def add(verbs: Verbs) -> None:
    """Add ``synco-fast pretrain``."""
    command = verbs.add(
        "pretrain",
        _pretrain,
        "Pretrain an encoder. Any key of the configuration can be set as --section.key VALUE.",
        "synco-fast pretrain --config demo --data demo --method.name mochi --training.epochs 10",
        overrides=True,
    )
    command.add_argument("--config", metavar="PRESET", help="a preset (see 'synco-fast presets') or a YAML file")
    command.add_argument(
        "--data", metavar="SOURCE", help="a folder, tar:FOLDER, list:FILE, idx:FOLDER or demo; short for --data.source"
    )
    command.add_argument("--seed", type=int, help="decides weights, order, views and draws")
    command.add_argument("--out", type=Path, metavar="DIR", help="the run folder; runs/PRESET-DATE-TIME by default")
    command.add_argument("--resume", type=Path, metavar="RUN", help="go on with the run in this folder")
    command.add_argument("--json", type=Path, metavar="FILE", help="write the summary here as well")


def _pretrain(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    from synco_fast.config import build_config
    from synco_fast.errors import ConfigError
    from synco_fast.presets import load_config
    from synco_fast.training.loop import Trainer
    from synco_fast.training.run import choose_run_folder, read_run_config, write_json

    overrides = read_overrides(rest)
    if options.data is not None:
        overrides["data.source"] = options.data
    if options.seed is not None:
        overrides["seed"] = options.seed
    if options.resume is not None:
        folder = options.resume
        if options.config is not None or options.out is not None:
            raise ConfigError("resume: found --config or --out beside it, allowed --section.key VALUE alone")
        config = build_config(read_run_config(folder), overrides)
        trainer = Trainer(config, folder, resume=folder, console=console)
    else:
        if options.config is None:
            raise ConfigError("config: found none, allowed --config PRESET, or --resume RUN; see 'synco-fast presets'")
        config = load_config(options.config, overrides)
        trainer = Trainer(config, choose_run_folder(options.out, config), console=console)
    summary = trainer.run()
    if options.json is not None:
        write_json(options.json, summary.as_dict())
    _print_summary(summary, console)
    return 0


def _print_summary(summary: Any, console: Console) -> None:
    def percent(share: float | None) -> str:
        return "not evaluated" if share is None else f"{share:.1%}"

    done = "" if summary.finished else f", stopped on request: go on with --resume {summary.run}"
    table = two_columns(f"{summary.method} on {summary.source}: {summary.epochs:g} epochs{done}")
    rows = [
        ("kNN before", percent(summary.knn_before)),
        ("kNN after", percent(summary.knn_after)),
        ("chance", percent(summary.chance)),
        (
            "images per second",
            f"{summary.images_per_second:,.0f} ({summary.data_wait:.0%} of the time waiting for data)",
        ),
        ("training time", f"{summary.training_seconds:,.0f} s, {summary.steps:,} steps"),
        ("broken images", f"{summary.broken_images}"),
        ("run folder", summary.run),
        ("checkpoint", summary.checkpoint),
        ("curves", summary.curves),
        ("augmented pairs", summary.pairs),
    ]
    for name, value in rows:
        if name != "broken images" or summary.broken_images:
            table.add_row(name, value, style="bold" if name == "kNN after" else None)
    console.print(table)
