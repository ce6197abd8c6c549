"""Streams of tar shards in WebDataset's layout, without random access: URLs, pipes of commands, and local files."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from synco_fast.data.errors import DataError, one_line
from synco_fast.data.sources.decode import LIMITS, Limits
from synco_fast.data.sources.stream_counts import find_counts
from synco_fast.data.sources.stream_reader import PIPE, is_url

__all__ = ["StreamSettings", "StreamSplit", "expand_shards", "refuse_stream"]

#: Upper bound of the number of shards.
_MOST_SHARDS = 1_000_000
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


@dataclass(frozen=True)
class StreamSettings:
    """How a stream is read.

    Attributes:
        images: Images of an epoch; None for those of the index.
        buffer: Images in the shuffle buffers, over all readers.
        readers: Readers side by side, over all ranks and workers; None for the largest divisor of the batch up to 16
            and up to the number of shards.
    """

    images: int | None = None
    buffer: int = 8192
    readers: int | None = None


class StreamSplit:
    """The images of some tar shards, which can only be read from front to back.

    Nothing is read before the first epoch, apart from an index of the number of images in each shard, if there is one.

    Args:
        shards: Paths, URLs or ``pipe:COMMAND``.
        title: The source's name in messages.
        settings: How it is read.
        limits: Size limits of an image.

    Attributes:
        counts: Images in each shard, if an index or an earlier check of the same files has them.
        note: A warning where these may be out of date.
    """

    def __init__(
        self,
        shards: Sequence[str],
        title: str = "stream",
        settings: StreamSettings | None = None,
        limits: Limits = LIMITS,
    ) -> None:
        self.shards, self.title, self.limits = tuple(shards), title, limits
        self.settings = settings or StreamSettings()
        self.labels: NDArray[np.int64] | None = None
        self.classes: tuple[str, ...] | None = None
        self.counts, self.note = find_counts(self.shards, self.title)

    def __len__(self) -> int:
        """The images of an epoch.

        Raises:
            DataError: Nobody says how many there are.
        """
        if self.settings.images is not None:
            return self.settings.images
        if self.counts is None:
            if self.note:
                raise DataError(f"data.images: found none, expected the number of images in an epoch; {self.note}")
            raise DataError(
                f"data.images: found none and no index beside the shards of {self.title}, expected the number of "
                f"images in an epoch; 'synco-fast data check {self.title}' counts them once and keeps the number"
            )
        return sum(self.counts)

    def name(self, index: int) -> str:
        """The name of an image by its id: its shard, and its place there."""
        return f"{self.shards[index >> 32]}[{index & 0xFFFFFFFF}]"

    def read_bytes(self, index: int) -> NoReturn:
        """There is no random access.

        Raises:
            DataError: Always.
        """
        refuse_stream(self, "random access")
        raise AssertionError

    def read(self, index: int) -> Image.Image:
        """As `read_bytes`."""
        self.read_bytes(index)


def refuse_stream(split: Any, what: str) -> None:
    """Refuse a stream where something reads images in another order than theirs.

    Raises:
        DataError: The split is a stream.
    """
    if isinstance(split, StreamSplit):
        raise DataError(
            f"data: found {split.title}, a stream, expected a source with random access for {what}, such as tar:FOLDER"
        )


def expand_shards(spec: str) -> list[str]:
    """The shards that a source names.

    Args:
        spec: Names separated by ``::``. In each, ``{000..146}`` stands for a range and ``{a,b}`` for alternatives, and
            ``*``, ``?`` and ``[...]`` match files, also those behind a URL. ``pipe:COMMAND`` is a shell command that
            writes a shard; in it, only ranges are expanded.

    Raises:
        DataError: There is no such shard, or a pattern cannot be matched.
    """
    shards = [shard for part in spec.split("::") if part for shard in _expand(part)]
    if not shards:
        raise DataError(f"data: found no shard at {spec}")
    if len(shards) > _MOST_SHARDS:
        raise DataError(f"data: found {len(shards):,} shards in {spec}, expected up to {_MOST_SHARDS:,}")
    return shards


def _expand(pattern: str) -> Iterator[str]:
    command = pattern.startswith(PIPE)
    for name in _braces(pattern if command else os.path.expanduser(pattern), only_ranges=command):  # noqa: PTH111
        if command or not glob.has_magic(name) or os.path.exists(name):  # noqa: PTH110 - a name may have brackets
            yield name
        elif is_url(name):
            yield from _matching_urls(name)
        else:
            yield from sorted(glob.glob(name, recursive=True))  # noqa: PTH207 - the pattern may be absolute


def _braces(pattern: str, *, only_ranges: bool) -> Iterator[str]:
    """Every name that the first braces to be expanded, and those behind them, stand for."""
    for found in _BRACES.finditer(pattern):
        between = _RANGE.fullmatch(found[1])
        if between is not None:
            first, last = int(between[1]), int(between[2])
            if last - first >= _MOST_SHARDS:
                raise DataError(f"data: found {found[0]} in {pattern}, expected up to {_MOST_SHARDS:,} shards")
            words = [str(number).zfill(len(between[1])) for number in range(first, last + 1)]
        elif "," in found[1] and not only_ranges:
            words = found[1].split(",")
        else:
            continue
        before, behind = pattern[: found.start()], pattern[found.end() :]
        for word in words:
            for rest in _braces(behind, only_ranges=only_ranges):
                yield f"{before}{word}{rest}"
        return
    yield pattern


def _matching_urls(pattern: str) -> list[str]:
    import fsspec

    try:
        system, path = fsspec.core.url_to_fs(pattern)
        return sorted(str(system.unstrip_protocol(name)) for name in system.glob(path))
    except Exception as error:  # of the network, of a missing package, of the protocol
        raise DataError(f"data: cannot list {pattern} ({one_line(error, 200)})") from error
