"""``synco-fast data pack``."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.commands.options import add_options, load_torch, path, write_results
from synco_fast.commands.parser import Commands, between, positive
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    from synco_fast.data.pipelines.pack_quality import PackQuality
    from synco_fast.data.sources.pack_index import PackIndex
    from synco_fast.runtime.progress import ProgressBar

__all__ = ["add"]

#: How many corrupt images are named on the screen; all of them are in the JSON file.
_NAMED = 20


def add(commands: Commands) -> None:
    """Add ``synco-fast data pack``."""
    command = commands.add(
        "data pack",
        _data_pack,
        "Shrink the images of a source once and write JPEG tar shards, so that training decodes fewer pixels. The same "
        "command resumes an interrupted pack. Train with --data tar:OUT.",
        "synco-fast data pack /data/imagenet /data/imagenet-320 --short-side 320 --quality 90",
    )
    command.add_argument("source", help="a folder, tar:FOLDER, list:FILE, parquet:FOLDER or hf:NAME")
    command.add_argument("out", type=path, help="a new or empty folder, or an interrupted pack")
    command.add_argument(
        "--short-side",
        type=positive,
        default=320,
        help="short side in pixels, 320 by default; larger images are shrunk",
    )
    quality = partial(between, least=1, most=100)
    command.add_argument("--quality", type=quality, default=90, help="JPEG quality, 1 to 100, 90 by default")
    command.add_argument("--shard-size", type=positive, default=256, metavar="MIB", help="size of a shard in MiB")
    command.add_argument("--view", type=positive, default=224, help="view size for measuring the loss of quality")
    add_options(command, "workers", json="write the results and all corrupt images here")


def _data_pack(options: argparse.Namespace, console: Console) -> int:
    load_torch(console)
    from synco_fast.data.augment.recipe import Recipe
    from synco_fast.data.errors import printable
    from synco_fast.data.pipelines.pack_quality import measure_quality
    from synco_fast.data.sources.open import open_shards, open_source
    from synco_fast.data.sources.pack import PackSettings, pack_source
    from synco_fast.runtime.environment import describe_environment
    from synco_fast.runtime.errors import UserError
    from synco_fast.runtime.progress import ProgressBar

    source = open_source(options.source)
    for line in source.missing:
        say(console, printable(line), "yellow")
    settings = PackSettings(options.short_side, options.quality, options.shard_size << 20)
    start = time.perf_counter()
    try:
        with ProgressBar(console, "packing", None) as bar:
            packed = pack_source(source, options.out, settings, workers=options.workers, tick=_tick_of(bar))
    except OSError as error:
        raise UserError(
            f"data: cannot write the pack in {options.out} ({error.strerror or error}); the same command resumes it"
        ) from error
    spent = time.perf_counter() - start
    quality = measure_quality(source.train, open_shards(options.out).train, packed["train"], Recipe(size=options.view))
    figures = _figures(packed, quality)
    about = {"source": options.source, "out": str(options.out), **asdict(settings), "seconds": spent}
    write_results(options, {"environment": describe_environment(), **about, **figures})
    _print(options, figures, quality, spent, console)
    return 0


def _figures(packed: dict[str, PackIndex], quality: PackQuality) -> dict[str, Any]:
    indices = list(packed.values())
    return {
        "images": {title: len(index) for title, index in packed.items()},
        "kept": sum(index.kept for index in indices),
        "bytes_read": sum(index.read for index in indices),
        "bytes_packed": sum(sum(index.shards.values()) for index in indices),
        "shards": sum(len(index.shards) for index in indices),
        "corrupt": {name: reason for index in indices for name, reason in index.excluded.items()},
        "loss_of_quality": asdict(quality),
    }


def _print(
    options: argparse.Namespace, figures: dict[str, Any], quality: PackQuality, spent: float, console: Console
) -> None:
    for reason in list(figures["corrupt"].values())[:_NAMED]:
        say(console, reason, "yellow")
    if len(figures["corrupt"]) > _NAMED:
        say(console, f"... and {len(figures['corrupt']) - _NAMED:,} more; --json FILE names them all", "yellow")
    from synco_fast.data.errors import printable

    unit, size = ("GiB", 2**30) if figures["bytes_read"] >= 2**30 else ("MiB", 2**20)
    read, packed = (figures[name] / size for name in ("bytes_read", "bytes_packed"))
    table = two_columns(f"pack of {printable(options.source)}")
    table.add_row("images", ", ".join(f"{count:,} {title}" for title, count in figures["images"].items()))
    table.add_row("corrupt", f"{len(figures['corrupt']):,}")
    table.add_row("kept as they were", f"{figures['kept']:,}")
    shrunk = f"{packed / max(read, 1e-12):.0%}"
    shards = f"{figures['shards']:,} shard{'' if figures['shards'] == 1 else 's'}"
    table.add_row(unit, f"{read:.2f} to {packed:.2f} ({shrunk}) in {shards}")
    table.add_row(
        f"views of {options.view} pixels",
        f"differ by {quality.mean:.1f} levels of 255 on average, the worst of {quality.views} by {quality.worst:.1f}, "
        f"a pixel by up to {quality.largest:.0f}",
    )
    table.add_row(
        f"crops below {options.view} pixels", f"{quality.small:.1%}, in the source {quality.small_source:.1%}"
    )
    table.add_row("time", f"{spent:,.0f} s")
    table.add_row("train with", f"--data tar:{printable(str(options.out))}")
    console.print(table)


def _tick_of(bar: ProgressBar) -> Callable[[str, int, int, int], None]:
    """A tick that shows one split after the other in the same bar."""
    shown = ""

    def tick(title: str, done: int, total: int, corrupt: int) -> None:
        nonlocal shown
        if title != shown:
            shown = title
            bar.restart(f"packing {title}", total)
        bar.update(done, f"{corrupt:,} corrupt")

    return tick
