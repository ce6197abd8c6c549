"""Reads every image of a split once, and keeps the list of those that can be read."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset

from synco_fast.data.errors import BrokenImageError
from synco_fast.data.sources.catalogue import catalogue_path, write_catalogue
from synco_fast.data.sources.open import Source, open_source
from synco_fast.data.sources.shards import ShardSplit
from synco_fast.data.sources.splits import FileSplit, Split
from synco_fast.data.workers import default_workers, start_worker

__all__ = ["find_broken", "keep_list", "open_afresh"]

_AT_A_TIME = 32


class _Tried(Dataset[tuple[int, str | None]]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, index: int) -> tuple[int, str | None]:
        try:
            self.split.read(index)
        except BrokenImageError as error:
            return index, str(error)
        return index, None


def find_broken(
    split: Split, *, workers: int | None = None, tick: Callable[[int, int], None] = lambda images, broken: None
) -> dict[int, str]:
    """Decode every image; by number of one that cannot be read, why.

    Args:
        split: The images.
        workers: Processes that decode; by default one for each core.
        tick: Called with how many images are done and how many of them are broken, every few images.
    """
    loader = DataLoader(
        _Tried(split),
        _AT_A_TIME,
        num_workers=default_workers() if workers is None else workers,
        collate_fn=list,
        worker_init_fn=start_worker,
        generator=torch.Generator().manual_seed(0),
    )
    broken: dict[int, str] = {}
    done = 0
    for tried in loader:
        broken.update((index, reason) for index, reason in tried if reason is not None)
        done += len(tried)
        tick(done, len(broken))
    return broken


def open_afresh(spec: str) -> Source:
    """Open a source without the lists that an earlier check kept of it.

    Raises:
        DataError: As `open_source`.
    """
    source, kept = open_source(spec), False
    for split in (source.train, source.validation):
        if isinstance(split, FileSplit | ShardSplit):
            path = catalogue_path(split.key)
            kept |= path.exists()
            path.unlink(missing_ok=True)
    return open_source(spec) if kept else source


def keep_list(split: Split, broken: dict[int, str]) -> str | None:
    """Keep the list of a split's images less the broken ones, for later runs.

    Returns:
        The file, or None for a split that needs none or whose every image is broken.

    Raises:
        OSError: The user's cache cannot be written.
    """
    if not isinstance(split, FileSplit | ShardSplit) or len(broken) == len(split):
        return None
    path = catalogue_path(split.key)
    write_catalogue(path, split.catalogue.without(broken))
    return str(path)
