"""``synco-fast pretrain-generator``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from synco_fast.commands.options import add_options, check_source, load_torch, path, write_results
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands
from synco_fast.commands.tables import two_columns

if TYPE_CHECKING:
    from synco_fast.generated.kid import Features

__all__ = ["KEYS", "add"]

#: The keys of its configuration, which is imported later than the help is printed.
KEYS = (
    *(
        "source",
        "fraction",
        "workers",
        "max_corrupt",
        "seed",
        "size",
        "latent",
        "width",
        "steps",
        "batch",
        "lr",
        "betas",
    ),
    *("r1", "r1_every", "augment", "average", "collapse", "kid_every", "kid_images", "encoder", "device", "precision"),
    *("channels_last", "max_time", "max_skipped", "log_every", "sample_every", "checkpoint_every", "keep"),
)


def add(commands: Commands) -> None:
    """Add ``synco-fast pretrain-generator``."""
    command = commands.add(
        "pretrain-generator",
        _pretrain_generator,
        "Train a generator on unlabelled images, for --generated.pair joint. Keys are set as --key VALUE.",
        "synco-fast pretrain-generator --data demo --out runs/generator --size 64 --steps 20000",
        overrides=True,
        alone=True,
        more=f"keys: {', '.join(f'--{key}' for key in KEYS)}\nconfig.yaml in the run folder has the value of each.",
    )
    command.add_argument(
        "--data",
        metavar="SOURCE",
        help="a folder, tar:FOLDER, list:FILE, parquet:FOLDER, hf:NAME, idx:FOLDER, cifar:FOLDER, stl10:FOLDER or demo",
    )
    command.add_argument("--out", type=path, metavar="DIR", help="the run folder; runs/generator-DATE-TIME by default")
    command.add_argument("--resume", type=path, metavar="RUN", help="resume the run in this folder")
    add_options(command, json="write the summary here as well")


def _pretrain_generator(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.generated.config import build_generator_config
    from synco_fast.runtime.errors import ConfigError
    from synco_fast.runtime.migrations import migrate_generator_config
    from synco_fast.runtime.run_config import read_run_config

    values = overrides_of(options.rest)
    if options.data is not None:
        values["source"] = options.data
    if options.resume is not None:
        if options.out is not None:
            raise ConfigError("resume: found --out with it, expected --key VALUE alone")
        saved = read_run_config(options.resume, "pretrain-generator")
        values = {**migrate_generator_config(saved), **migrate_generator_config(values)}
    elif "source" not in values:
        raise ConfigError("data: found none, expected --data SOURCE, or --resume RUN")
    config = build_generator_config(values)
    check_source(config.source)
    load_torch(console)
    from synco_fast.generated.stage_one import GeneratorTraining
    from synco_fast.training.run.loop import Trainer
    from synco_fast.training.run.run_folder import choose_run_folder

    folder = options.resume or choose_run_folder(options.out, "generator", config.source)
    task = GeneratorTraining(config, _features(config.encoder) if config.encoder and config.kid_every else None)
    summary = Trainer(task, folder, resume=options.resume, console=console).run()
    write_results(options, summary)
    done = "" if summary["finished"] else f", stopped on request: resume with --resume {folder}"
    table = two_columns(f"generator on {summary['source']}: {summary['steps']:,} steps{done}")
    kid = "not measured" if summary["kid"] is None else f"{summary['kid']:.4f} on {summary['kid_network']}"
    spread = "not measured" if summary["diversity"] is None else f"{summary['diversity']:.2f} of the real images'"
    rate = summary["images_per_second"]
    for name, value in (
        ("KID", kid),
        ("diversity", spread),
        ("images per second", f"{rate:,.0f}" if rate else "not measured"),
        ("training time", f"{summary['training_seconds']:,.0f} s"),
        ("run folder", summary["run"]),
        ("checkpoint", summary["checkpoint"]),
        ("samples", summary["samples"]),
        ("curves", summary["curves"]),
    ):
        table.add_row(name, value)
    console.print(table)
    return 0


def _features(encoder: str) -> Features:
    """The network of KID: the backbone of a checkpoint of pretrain."""
    from synco_fast.export.load import backbone_of, read_weights
    from synco_fast.generated.kid import Features

    weights = read_weights(Path(encoder))
    config = weights.config
    return Features(backbone_of(weights), config.augment, f"{config.model.backbone} of {weights.file}")
