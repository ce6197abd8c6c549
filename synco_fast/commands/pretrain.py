"""``synco-fast pretrain``."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.commands.options import add_options, path
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands, two_columns

if TYPE_CHECKING:
    from synco_fast.config import Config, TrainingConfig
    from synco_fast.runtime.distributed import HostGroup

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast pretrain``."""
    command = commands.add(
        "pretrain",
        _pretrain,
        "Pretrain an encoder. Any key of the configuration can be set as --section.key VALUE.",
        "synco-fast pretrain --config demo --data demo --method.name mochi --training.epochs 10",
        overrides=True,
        more="'synco-fast presets NAME' prints every key with its meaning, range and default.",
    )
    command.add_argument("--config", metavar="PRESET", help="a preset (see 'synco-fast presets') or a YAML file")
    command.add_argument(
        "--data", metavar="SOURCE", help="a folder, tar:FOLDER, list:FILE, idx:FOLDER or demo; short for --data.source"
    )
    command.add_argument("--seed", type=int, help="seed of weights, order, views and draws")
    command.add_argument("--out", type=path, metavar="DIR", help="the run folder; runs/PRESET-DATE-TIME by default")
    command.add_argument("--resume", type=path, metavar="RUN", help="resume the run in this folder")
    command.add_argument(
        "--continue", action="store_true", dest="go_on", help="resume the run in --out if there is one"
    )
    command.add_argument("--max-steps", type=int, metavar="N", help="stop there this time; the run does not keep it")
    command.add_argument(
        "--max-time", type=float, metavar="MINUTES", help="stop then this time; the run does not keep it"
    )
    add_options(command, json="write the summary here as well")


def _pretrain(options: argparse.Namespace, rest: Sequence[str], console: Console) -> int:
    config, limits, resume = _what_to_do(options, overrides_of(rest))

    from synco_fast.evaluation.knn import PeriodicKnn
    from synco_fast.evaluation.monitor import HealthMonitor
    from synco_fast.runtime.distributed import DistEnv, init_distributed
    from synco_fast.runtime.files import write_json
    from synco_fast.training.loop import Trainer
    from synco_fast.training.pretraining import Pretraining

    env = DistEnv.detect()
    with init_distributed(env, config.training.device, timeout=config.training.timeout) as control:
        folder = resume or _new_folder(options.out, config, control)
        task = Pretraining(config, control=control, evaluate=PeriodicKnn(), monitor=HealthMonitor(), limits=limits)
        summary = Trainer(task, folder, resume=resume, console=console).run()
    if env.is_main:
        if options.json is not None:
            write_json(options.json, summary.as_dict())
        _print_summary(summary, console)
    return 0


def _what_to_do(options: argparse.Namespace, overrides: dict[str, Any]) -> tuple[Config, TrainingConfig, Path | None]:
    """The configuration, which the run keeps; the limits of this start; and the run to resume."""
    from synco_fast.config import build_config
    from synco_fast.presets import load_config
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.run_config import read_run_config

    for key, value in (("data.source", options.data), ("seed", options.seed)):
        if value is not None:
            overrides[key] = value
    values, resume = None, None
    if options.go_on:
        if options.out is None or options.resume is not None:
            raise ConfigError("continue: found without --out or beside --resume, expected --config PRESET --out RUN")
        values, resume = _begun(options)
    elif options.resume is not None:
        if options.config is not None or options.out is not None:
            raise ConfigError("resume: found --config or --out beside it, expected --section.key VALUE alone")
        values, resume = read_run_config(options.resume), options.resume
    elif options.config is None:
        raise ConfigError("config: found none, expected --config PRESET, or --resume RUN; see 'synco-fast presets'")

    def build(overrides: dict[str, Any]) -> Config:
        return load_config(options.config, overrides) if values is None else build_config(values, overrides)

    limits = {"training.max_steps": options.max_steps, "training.max_time": options.max_time}
    given = {key: value for key, value in limits.items() if value is not None}
    config = build(overrides)
    return config, (build({**overrides, **given}) if given else config).training, resume


def _begun(options: argparse.Namespace) -> tuple[dict[str, Any] | None, Path | None]:
    """What ``--continue`` finds in ``--out``: the settings of the run there, and its folder."""
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.run_config import has_checkpoints, holds_run, read_run_config

    if not holds_run(options.out):
        if options.config is None:
            raise ConfigError(f"continue: found no run in {options.out}, expected --config PRESET to start one")
        return None, None
    try:
        return read_run_config(options.out), options.out
    except ConfigError as error:
        if options.config is None or has_checkpoints(options.out):
            raise
        # Nothing is lost where nothing was trained.
        warnings.warn(f"{error}; --continue starts it anew", stacklevel=1)
        return None, options.out


def _new_folder(out: Path | None, config: Config, control: HostGroup) -> Path:
    """The folder of a new run; rank 0 chooses it, since the name holds the time."""
    from synco_fast.runtime.errors import UserError
    from synco_fast.training.run_folder import choose_run_folder

    chosen: Path | UserError | None = None
    if control.env.is_main:
        try:
            chosen = choose_run_folder(out, config.preset)
        except UserError as error:
            chosen = error
    chosen = control.broadcast(chosen)
    if isinstance(chosen, UserError):
        raise chosen
    assert chosen is not None
    return chosen


def _print_summary(summary: Any, console: Console) -> None:
    def percent(share: float | None) -> str:
        return "not evaluated" if share is None else f"{share:.1%}"

    done = "" if summary.finished else f", stopped on request: resume with --resume {summary.run}"
    table = two_columns(f"{summary.method} on {summary.source}: {summary.epochs:g} epochs{done}")
    rows = [
        ("kNN before", percent(summary.knn_before)),
        ("kNN after", percent(summary.knn_after)),
        ("chance", percent(summary.chance)),
        ("effective rank", "not evaluated" if summary.feature_rank is None else f"{summary.feature_rank:.1f}"),
        (
            "images per second",
            f"{summary.images_per_second:,.0f} ({summary.data_wait:.0%} of the time waiting for data)",
        ),
        ("training time", f"{summary.training_seconds:,.0f} s, {summary.steps:,} steps"),
        ("corrupt images", f"{summary.corrupt_images}"),
        ("implementation", ", ".join(f"{part} {form['name']}" for part, form in summary.forms.items())),
        ("run folder", summary.run),
        ("checkpoint", summary.checkpoint),
        ("curves", summary.curves),
        ("augmented pairs", summary.pairs),
    ]
    for name, value in rows:
        if name != "corrupt images" or summary.corrupt_images:
            table.add_row(name, value, style="bold" if name == "kNN after" else None)
    console.print(table)
