"""``synco-fast pretrain``."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.commands.options import SOURCE, add_options, check_source, load_torch, path, write_results
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.console import say
from synco_fast.runtime.dist_env import DistEnv

if TYPE_CHECKING:
    from synco_fast.config import Config, TrainingConfig

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast pretrain``."""
    command = commands.add(
        "pretrain",
        _pretrain,
        "Pretrain an encoder. Any key of the configuration can be set as --section.key VALUE.",
        "synco-fast pretrain --config demo --data demo --method.name mochi --training.epochs 10",
        overrides=True,
        joint=True,
        more="'synco-fast presets NAME' prints every key with its meaning, range and default.",
    )
    command.add_argument(
        "--config",
        metavar="PRESET",
        help="a preset (see 'synco-fast presets') or a YAML file; needed to start a run",
    )
    command.add_argument("--data", metavar="SOURCE", help=f"{SOURCE}; short for --data.source, the preset's by default")
    command.add_argument(
        "--init",
        metavar="WEIGHTS",
        help="start from a run, a checkpoint, a file of weights, torchvision/NAME or timm/NAME; short for --model.init",
    )
    command.add_argument(
        "--seed",
        type=int,
        help="seed of weights, order, views and draws; 0 in every preset",
    )
    command.add_argument("--out", type=path, metavar="DIR", help="the run folder; runs/PRESET-DATE-TIME by default")
    command.add_argument("--resume", type=path, metavar="RUN", help="resume the run in this folder")
    command.add_argument(
        "--continue", action="store_true", dest="go_on", help="resume the run in --out if there is one"
    )
    command.add_argument(
        "--max-steps", type=int, metavar="N", help="stop after step N this time; the configuration does not keep it"
    )
    command.add_argument(
        "--max-time",
        type=float,
        metavar="MINUTES",
        help="stop after so many minutes this time; the configuration does not keep it",
    )
    add_options(command, json="write the summary here as well")


def _pretrain(options: argparse.Namespace, console: Console) -> int:
    config, limits, resume = _what_to_do(options, overrides_of(options.rest))
    check_source(config.data.source)
    if DistEnv.detect().is_main:
        say(console, f"{config.method.name} on {config.data.source}")
    load_torch(console)
    from synco_fast.api import train

    trainer, summary = train(config, out=options.out, resume=resume, limits=limits, console=console)
    if trainer.env.is_main:
        write_results(options, summary.as_dict())
        _print_summary(summary, console)
    return 0


def _what_to_do(options: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Config, TrainingConfig, Path | None]:
    """The configuration, which the run keeps; the limits of this start; and the run to resume."""
    from synco_fast.config import build_config
    from synco_fast.presets import PRESETS, load_config
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.run_config import read_run_config

    for key, value in (("data.source", options.data), ("seed", options.seed), ("model.init", options.init)):
        if value is not None:
            overrides[key] = value
    values, resume = None, None
    if options.go_on:
        if options.out is None or options.resume is not None:
            raise ConfigError("continue: found no --out, or --resume with it, expected --config PRESET --out RUN")
        values, resume = _begun(options)
    elif options.resume is not None:
        if options.config is not None or options.out is not None or options.init is not None:
            raise ConfigError("resume: found --config, --out or --init with it, expected --section.key VALUE alone")
        values, resume = read_run_config(options.resume), options.resume
    elif options.config is None:
        raise ConfigError("config: found none, expected --config PRESET, or --resume RUN; see 'synco-fast presets'")

    def build(overrides: dict[str, Any]) -> Config:
        return load_config(options.config, overrides) if values is None else build_config(values, overrides)

    limits = {"training.max_steps": options.max_steps, "training.max_time": options.max_time}
    given = {key: value for key, value in limits.items() if value is not None}
    config = build(overrides)
    if values is None and "data.source" not in overrides and "data" not in PRESETS.get(options.config, {"data": None}):
        raise ConfigError(f"data: found none, expected --data SOURCE: the preset {options.config} names no images")
    return config, (build({**overrides, **given}) if given else config).training, resume


def _begun(options: argparse.Namespace) -> tuple[dict[str, Any] | None, Path | None]:
    """What ``--continue`` finds in ``--out``: the settings of the run there, and its folder."""
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.run_config import begins_as_run, has_checkpoints, holds_run, read_run_config

    if not holds_run(options.out):
        if options.config is None:
            raise ConfigError(f"continue: found no run in {options.out}, expected --config PRESET to start one")
        return None, None
    try:
        return read_run_config(options.out), options.out
    except ConfigError as error:
        if options.config is None or has_checkpoints(options.out) or not begins_as_run(options.out):
            raise
        # Nothing is lost where nothing was trained.
        warnings.warn(f"{error}; --continue starts over", stacklevel=1)
        return None, options.out


def _print_summary(summary: Any, console: Console) -> None:
    def percent(share: float | None) -> str:
        return "not evaluated" if share is None else f"{share:.1%}"

    best = summary.best
    done = "" if summary.finished else f", stopped on request: resume with --resume {summary.run}"
    epochs = f"{round(summary.epochs, 2):g} epoch{'' if summary.epochs == 1 else 's'}"
    table = two_columns(f"{summary.method} on {summary.source}: {epochs}{done}")
    by_size = summary.images_per_second_by_size
    rows = [
        ("kNN before", percent(summary.knn_before)),
        ("kNN after", percent(summary.knn_after)),
        *([("best kNN", f"{best['knn']:.1%} at epoch {best['epoch']:g}: {best['checkpoint']}")] if best else []),
        ("chance", percent(summary.chance)),
        ("effective rank", "not evaluated" if summary.feature_rank is None else f"{summary.feature_rank:.1f}"),
        (
            "images per second",
            f"{summary.images_per_second:,.0f} ({summary.data_wait:.0%} of the time waiting for data)"
            if summary.images_per_second
            else "not measured",
        ),
        ("by size of views", ", ".join(f"{size} px {rate:,.0f}" for size, rate in by_size.items())),
        ("training time", f"{summary.training_seconds:,.0f} s, {summary.steps:,} steps"),
        ("corrupt images", f"{summary.corrupt_images}"),
        ("implementation", ", ".join(f"{part} {form['name']}" for part, form in summary.forms.items())),
        ("run folder", summary.run),
        ("checkpoint", summary.checkpoint),
        ("curves", summary.curves),
        ("augmented pairs", summary.pairs),
    ]
    for name, value in rows:
        if value and (name != "corrupt images" or summary.corrupt_images):
            table.add_row(name, value, style="bold" if name == "kNN after" else None)
    console.print(table)
