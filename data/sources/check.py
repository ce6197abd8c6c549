"""Checking a source: decode every image once, and keep a manifest of those that decode."""

from __future__ import annotations

from collections.abc import Callable

from torch.utils.data import Dataset

from synco_fast.data.errors import CorruptImageError
from synco_fast.data.loader import Loader
from synco_fast.data.sources.manifest import ignore_manifests, manifest_path, write_manifest
from synco_fast.data.sources.open import Source, open_source
from synco_fast.data.sources.shards import ShardSplit
from synco_fast.data.sources.splits import FileSplit, Split

__all__ = ["find_corrupt", "keep_list", "open_afresh"]

_AT_A_TIME = 32


class _Tried(Dataset[dict[int, str]]):
    """Of some images, the reason by number of each corrupt one."""

    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, numbers: range) -> dict[int, str]:
        corrupt = {}
        for number in numbers:
            try:
                self.split.read(number)
            except CorruptImageError as error:
                corrupt[number] = str(error)
        return corrupt


def find_corrupt(
    split: Split, *, workers: int | None = None, tick: Callable[[int, int], None] = lambda images, corrupt: None
) -> dict[int, str]:
    """Decode every image; returns the reason by number of each corrupt one.

    Args:
        split: The images.
        workers: Processes that decode; by default one for each core.
        tick: Called every few images with the number of images done and of corrupt ones.

    Raises:
        DataError: The source is gone, or a worker was killed.
    """
    parts = [range(len(split))[first : first + _AT_A_TIME] for first in range(0, len(split), _AT_A_TIME)]
    corrupt: dict[int, str] = {}
    for part, found in zip(parts, Loader(_Tried(split), parts, workers=workers, keep=False), strict=True):
        corrupt |= found
        tick(part.stop, len(corrupt))
    return corrupt


def open_afresh(spec: str) -> Source:
    """Open a source without the manifests of earlier checks.

    Raises:
        DataError: As `open_source`.
    """
    with ignore_manifests():
        return open_source(spec)


def keep_list(split: Split, corrupt: dict[int, str]) -> str | None:
    """Save a manifest of a split without its corrupt images, for later runs.

    Returns:
        The file, or None if the split needs none or all images are corrupt.

    Raises:
        OSError: The user's cache cannot be written.
    """
    if not isinstance(split, FileSplit | ShardSplit):
        return None
    path = manifest_path(split.key)
    if len(corrupt) == len(split):
        path.unlink(missing_ok=True)
        return None
    write_manifest(path, split.manifest.without(corrupt))
    return str(path)
