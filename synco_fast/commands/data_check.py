"""``synco-fast data check``."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console

from synco_fast.commands.options import SOURCE, add_options, load_torch, write_results
from synco_fast.commands.parser import Commands
from synco_fast.commands.tables import two_columns
from synco_fast.runtime.console import say

if TYPE_CHECKING:
    from synco_fast.data.sources.splits import Split
    from synco_fast.data.sources.stream import StreamSplit

__all__ = ["add"]

#: How many corrupt images are named on the screen; all of them are in the JSON file.
_NAMED = 50


def add(commands: Commands) -> None:
    """Add ``synco-fast data check``."""
    command = commands.add(
        "data check",
        _data_check,
        "Decode every image of a source, name the corrupt ones, and keep a manifest of the others, from which "
        "training starts at once. Exit code 1 if an image is corrupt.",
        "synco-fast data check /data/imagenet --json corrupt.json",
    )
    command.add_argument("source", help=SOURCE)
    add_options(command, "workers", json="write the results and all corrupt images here")


def _data_check(options: argparse.Namespace, console: Console) -> int:
    load_torch(console)
    from synco_fast.data.errors import printable
    from synco_fast.data.sources.check import find_corrupt, keep_list, open_afresh
    from synco_fast.data.sources.stream import StreamSplit
    from synco_fast.runtime.environment import describe_environment

    source = open_afresh(options.source)
    if source.layout:
        _warn(f"{options.source}: {source.layout}", console)
    start = time.perf_counter()
    figures: dict[str, Any] = {"source": options.source, "images": 0, "corrupt": {}, "lists": [], "truncated": {}}
    unread: Counter[str] = Counter()
    manifests: dict[str, str] = {}
    for title, split in (("training", source.train), ("held-out", source.validation)):
        if split is None:
            continue
        if isinstance(split, StreamSplit):
            _check_stream(split, figures, options.workers, console)
            continue
        corrupt = _with_progress(f"{title} images", split, find_corrupt, options.workers, console)
        figures["images"] += len(split)
        figures["corrupt"] |= {split.name(index): reason for index, reason in sorted(corrupt.items())}
        figures["truncated"] |= getattr(getattr(split, "manifest", None), "excluded", {})
        unread.update(getattr(getattr(split, "manifest", None), "unread", {}))
        try:
            kept = keep_list(split, corrupt)
        except OSError as error:
            _warn(f"cache: cannot write the manifest of {options.source} ({error}); runs do without", console)
        else:
            if kept:
                figures["lists"].append(kept)
                manifests[title] = kept
    spent = time.perf_counter() - start
    figures |= {"seconds": spent, "unread": dict(unread)}
    write_results(options, figures | {"environment": describe_environment()})
    if unread:
        kinds = ", ".join(f"{count:,} {printable(kind)}" for kind, count in unread.most_common())
        _warn(f"not read: {kinds}", console)
    wrong = [*figures["corrupt"].values(), *(f"{printable(name)}: {why}" for name, why in figures["truncated"].items())]
    for reason in wrong[:_NAMED]:
        _warn(reason, console)
    if len(wrong) > _NAMED:
        say(console, f"... and {len(wrong) - _NAMED:,} more; --json FILE names them all", "yellow")
    table = two_columns(f"check of {printable(options.source)}")
    share = len(figures["corrupt"]) / max(1, figures["images"])
    table.add_row("images", f"{figures['images']:,}")
    table.add_row("corrupt", f"{len(figures['corrupt']):,} ({share:.2%})")
    table.add_row("time", f"{spent:,.0f} s, {figures['images'] / max(spent, 1e-9):,.0f} images per second")
    for kept in figures["lists"] if "counts" in figures else ():
        table.add_row("index of the shards", kept)
    for title, kept in manifests.items():
        table.add_row(f"manifest, {title}", kept)
    console.print(table)
    return 1 if wrong else 0


def _check_stream(split: StreamSplit, figures: dict[str, Any], workers: int | None, console: Console) -> None:
    """Count and decode the images of every shard, and keep the counts."""
    from synco_fast.data.sources.stream_check import check_stream
    from synco_fast.data.sources.stream_counts import counts_beside, keep_counts
    from synco_fast.runtime.progress import ProgressBar

    with ProgressBar(console, "shards", len(split.shards)) as bar:
        found = check_stream(
            split, workers=workers, tick=lambda done, corrupt: bar.update(done, f"{corrupt:,} corrupt")
        )
    figures["images"] += sum(shard.images for shard in found)
    for name, shard in zip(split.shards, found, strict=True):
        figures["corrupt"] |= shard.corrupt
        figures["truncated"] |= {name: shard.damage} if shard.damage else {}
    counts = [shard.images for shard in found]
    figures["counts"] = dict(zip(split.shards, counts, strict=True))
    beside = counts_beside(split.shards)
    if beside is not None and [*beside] != counts:
        _warn(
            f"index beside the shards: found {sum(beside):,} images in it, expected {sum(counts):,}, as in the shards; "
            "runs follow the index, so correct or remove it",
            console,
        )
    try:
        figures["lists"].append(keep_counts(split.shards, counts, [shard.stamp for shard in found]))
    except OSError as error:
        _warn(f"cache: cannot write the index of {split.title} ({error}); runs need data.images", console)


def _warn(line: str, console: Console) -> None:
    from synco_fast.data.errors import printable

    say(console, printable(line), "yellow")


def _with_progress(
    title: str, split: Split, find: Callable[..., dict[int, str]], workers: int | None, console: Console
) -> dict[int, str]:
    from synco_fast.runtime.progress import ProgressBar

    with ProgressBar(console, title, len(split)) as bar:
        return find(split, workers=workers, tick=lambda done, corrupt: bar.update(done, f"{corrupt:,} corrupt"))
