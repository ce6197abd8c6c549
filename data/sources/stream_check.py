"""Checking a stream: decode every image of its shards once, and count them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch.utils.data import Dataset

from synco_fast.data.errors import CorruptImageError
from synco_fast.data.loader import Loader
from synco_fast.data.sources.decode import decode_image
from synco_fast.data.sources.stream import StreamSplit
from synco_fast.data.sources.stream_counts import Stamp, stamp_of
from synco_fast.data.sources.stream_reader import ShardError, read_images

__all__ = ["CheckedShard", "check_stream"]


@dataclass
class CheckedShard:
    """The result for one shard.

    Attributes:
        images: How many it holds.
        stamp: Its stamp before it was read, see `synco_fast.data.sources.stream_counts`.
        corrupt: Reason by name, for images that do not decode.
        damage: Why the shard ends early; empty if it does not.
    """

    images: int = 0
    stamp: Stamp = None
    corrupt: dict[str, str] = field(default_factory=dict)
    damage: str = ""


class _Shards(Dataset[CheckedShard]):
    def __init__(self, split: StreamSplit) -> None:
        self.split = split

    def __getitem__(self, number: int) -> CheckedShard:
        found = CheckedShard(stamp=stamp_of(self.split.shards[number]))
        try:
            for _, name, content in read_images(self.split.shards[number], lambda _: True, self.split.limits):
                found.images += 1
                try:
                    if isinstance(content, CorruptImageError):
                        raise content
                    assert content is not None
                    decode_image(content, name, self.split.limits)
                except CorruptImageError as error:
                    found.corrupt[name] = str(error)
        except ShardError as error:
            found.damage = str(error)
        return found


def check_stream(
    split: StreamSplit,
    *,
    workers: int | None = None,
    tick: Callable[[int, int], None] = lambda shards, corrupt: None,
) -> list[CheckedShard]:
    """Decode every image of every shard, each worker a shard at a time.

    Args:
        split: The shards.
        workers: Processes that read and decode; by default one for each core.
        tick: Called after each shard with the number of shards done and of corrupt images.

    Raises:
        DataError: A shard cannot be read, or a worker was killed.
    """
    done: list[CheckedShard] = []
    corrupt = 0
    for shard in Loader(_Shards(split), range(len(split.shards)), workers=workers, keep=False):
        done.append(shard)
        corrupt += len(shard.corrupt)
        tick(len(done), corrupt)
    return done
