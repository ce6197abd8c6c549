"""``synco-fast data show``."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.console import Console

from synco_fast.commands.options import SOURCE, load_torch, path
from synco_fast.commands.overrides import overrides_of
from synco_fast.commands.parser import Commands, positive, whole
from synco_fast.runtime.console import say

__all__ = ["add"]


def add(commands: Commands) -> None:
    """Add ``synco-fast data show``."""
    command = commands.add(
        "data show",
        _data_show,
        "Draw augmented pairs as a run would see them, from the pipeline that it would choose. Any key of the "
        "configuration can be set as --section.key VALUE.",
        "synco-fast data show /data/imagenet --augment.size 96 --out pairs.png",
        overrides=True,
    )
    command.add_argument("source", help=SOURCE)
    command.add_argument("--config", metavar="PRESET", help="a preset or a YAML file; the defaults if unset")
    command.add_argument("--pairs", type=positive, default=24, help="pairs to draw, 24 by default")
    command.add_argument("--epoch", type=whole, default=0, metavar="N", help="the epoch whose views are drawn")
    command.add_argument("--out", type=path, default=Path("pairs.png"), metavar="FILE", help="the PNG to write")


def _data_show(options: argparse.Namespace, console: Console) -> int:
    from synco_fast.config import build_config
    from synco_fast.presets import load_config
    from synco_fast.runtime.errors import ConfigError

    if options.out.suffix.lower() != ".png":
        raise ConfigError(f"out: found {options.out.name!r}, expected a name that ends in .png")
    overrides = overrides_of(options.rest) | {"data.source": options.source}
    config = load_config(options.config, overrides) if options.config else build_config({}, overrides)
    load_torch(console)
    from synco_fast.data.pipelines.build import choose_pipeline
    from synco_fast.data.sources.open import open_source
    from synco_fast.runtime.precision import Precision, resolve_device
    from synco_fast.training.run.plots import draw_pairs
    from synco_fast.training.step.pipeline import open_pipeline

    device = resolve_device(config.training.device)
    split = open_source(config.data.source, config.data.limits, config.data.stream).train
    chosen = choose_pipeline(config.data.pipeline, split, device)
    dtype = Precision(config.training.precision, device).dtype
    pipeline = open_pipeline(config, split, device=device, dtype=dtype, batch=min(options.pairs, len(split)))
    pipeline.set_epoch(options.epoch)
    batch = next(iter(pipeline)).as_pixels(config.augment)
    draw_pairs(batch, options.out, pairs=options.pairs)
    pipeline.close()
    for reason in batch.corrupt.values():
        say(console, f"corrupt image, replaced by another: {reason}", "yellow")
    say(console, f"{len(batch.image_ids)} pairs of {len(split):,} images by {chosen} on {device.type}: {options.out}")
    return 0
