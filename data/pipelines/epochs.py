"""Order of images: the batches of an epoch on each rank, and replacement of corrupt images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

from torch.utils.data import Sampler

from synco_fast.data.errors import CorruptImageError, DataError
from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.seeding import uniforms

__all__ = ["EpochBatches", "EpochPipeline", "Position", "replace_corrupt"]

#: An epoch, and the number of the image that is due.
Position = tuple[int, int]

#: Images after a corrupt one that are tried in its place, and those elsewhere in the set that are tried after them.
_NEIGHBOURS, _ELSEWHERE = 64, 960

T = TypeVar("T")


class EpochBatches(Sampler[list[Position]]):
    """The batches of the current epoch on one rank.

    All ranks share one permutation of the images: step n takes the n-th B of them, and each rank its own block of
    these. So no image comes twice in an epoch, and a step has the same images for any number of ranks. An incomplete
    last batch, of different images in each epoch, is skipped.

    Args:
        length: Images in the set.
        batch: B, images in a step, over all ranks.
        seed: Seed of the order, together with the epoch.
        rank, world: Rank of this process, and number of processes.

    Attributes:
        share: Images per step on one rank, B / world.

    Raises:
        DataError: The set holds fewer images than a step takes, B is not a multiple of ``world``, or the rank is
            out of range.
    """

    def __init__(self, length: int, batch: int, seed: int, rank: int = 0, world: int = 1) -> None:
        if not 0 <= rank < world:
            raise DataError(f"rank: found {rank}, expected 0 to {world - 1}")
        if batch % world:
            raise DataError(f"training.batch: found {batch}, expected a multiple of {world}, the number of processes")
        if batch > length:
            raise DataError(f"training.batch: found {batch}, expected up to {length}, the number of training images")
        self.length, self.batch, self.seed, self.rank = length, batch, seed, rank
        self.share = batch // world
        self.epoch = self.start = 0

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and its first batch."""
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return self.length // self.batch

    def __iter__(self) -> Iterator[list[Position]]:
        epoch = self.epoch
        order = epoch_order(self.length, seed=self.seed, epoch=epoch)
        for number in range(self.start, len(self)):
            first = number * self.batch + self.rank * self.share
            yield [(epoch, index) for index in order[first : first + self.share].tolist()]


class EpochPipeline:
    """The part of a `Pipeline` that follows the batches of an epoch."""

    _batches: EpochBatches

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch that the next iteration yields, and its first batch."""
        self._batches.set_epoch(epoch, start)


def replace_corrupt(length: int, wanted: int, read: Callable[[int], T]) -> tuple[T, int, dict[int, str]]:
    """Read image ``wanted``, or a readable one in its place.

    Files beside each other are often damaged together, so the search goes on elsewhere after some neighbours. Which
    images it tries depends on ``length`` and ``wanted`` alone.

    Args:
        length: Images in the set.
        wanted: The image that is due.
        read: Reads an image by number, or raises `CorruptImageError`.

    Returns:
        The result of ``read``, the number of that image, and the reason by number for corrupt ones on the way.

    Raises:
        DataError: All are corrupt, or, of more than a thousand, all of about a thousand that were tried.
    """
    corrupt: dict[int, str] = {}
    for index in _replacements(length, wanted):
        if index in corrupt:
            continue
        try:
            return read(index), index, corrupt
        except CorruptImageError as error:
            corrupt[index] = str(error)
    raise DataError(
        f"data: found {len(corrupt):,} corrupt images, all that were tried of {length:,}; the first: {corrupt[wanted]}"
    )


def _replacements(length: int, wanted: int) -> Iterator[int]:
    """The images to try for one that is due: itself, its neighbours, some anywhere; of a small set all."""
    for shift in range(min(_NEIGHBOURS, length)):
        yield (wanted + shift) % length
    if length > _NEIGHBOURS:
        yield from (uniforms(length, wanted, count=_ELSEWHERE)[0] * length).astype(int).tolist()
    if length <= _NEIGHBOURS + _ELSEWHERE:
        yield from range(length)
