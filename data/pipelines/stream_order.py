"""Order of a stream: which reader reads what, and its shuffle buffer; functions of seed and epoch alone.

An epoch permutes the shards. A fixed number of readers share them, whatever the number of ranks and workers; each reads
front to back through a shuffle buffer, and gives an equal share of every step. So a step has the same images for any
number of ranks and workers, and a run resumes in the middle of an epoch by counting, without decoding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from synco_fast.data.pipelines.base import epoch_order
from synco_fast.data.seeding import derive_seed, uniforms

__all__ = ["Piece", "ShuffleBuffer", "plan_epoch"]

#: Keep the draws of shards and of buffers apart from each other, and from those of views.
_SHARDS, _BUFFERS = 0x5A4D, 0xB0FF
#: Numbers drawn at a time.
_DRAWN = 1024


@dataclass(frozen=True)
class Piece:
    """Consecutive images of a shard.

    Attributes:
        shard: Its number.
        first: The first image, from 0.
        count: How many; None for all that follow.
        turn: How often they came in the epoch before.
    """

    shard: int
    first: int = 0
    count: int | None = None
    turn: int = 0


def plan_epoch(
    shards: int, counts: Sequence[int] | None, *, readers: int, share: int, seed: int, epoch: int
) -> list[list[Piece]]:
    """What each reader reads in an epoch, in order; a reader that needs more starts over.

    With counts, the permuted shards are one sequence of images, of which each reader takes the next ``share``: no image
    is read twice, and those left over, fewer than a step, are others in each epoch. Without, whole shards are dealt in
    turn, so that a reader whose shards have fewer images starts over, and others do not reach the end of theirs.

    Args:
        shards: Number of shards.
        counts: Images in each shard, if known.
        readers: Number of readers; at most ``shards`` without counts.
        share: Images that each reader gives in the epoch.
        seed, epoch: Whole numbers from 0.
    """
    order = epoch_order(shards, seed=derive_seed(seed, _SHARDS), epoch=epoch).tolist()
    if counts is None:
        return [[Piece(shard) for shard in order[reader::readers]] for reader in range(readers)]
    ends = np.cumsum([counts[shard] for shard in order], dtype=np.int64)
    return [_pieces(order, ends, reader * share, share) for reader in range(readers)]


def _pieces(order: list[int], ends: NDArray[np.int64], start: int, length: int) -> list[Piece]:
    """The next ``length`` images from ``start`` in a sequence of shards that repeats."""
    found: list[Piece] = []
    total = int(ends[-1])
    while length:
        turn, inside = divmod(start, total)
        place = int(np.searchsorted(ends, inside, side="right"))
        first = inside - (int(ends[place - 1]) if place else 0)
        count = min(length, int(ends[place]) - inside)
        found.append(Piece(order[place], first, count, turn))
        start, length = start + count, length - count
    return found


class ShuffleBuffer:
    """The order in which a shuffle buffer gives out the images that are put into it.

    It holds positions, not images, so that any state of it can be computed without reading. At first it takes the first
    ``size`` positions. Each draw gives out one at random, and the next position takes its place, until there are none
    left.

    Args:
        length: Number of positions.
        size: Positions in the buffer.
        words: Seed, epoch and reader, on which the draws depend.

    Attributes:
        slots: The positions in the buffer.
        taken: How many positions have entered it.
    """

    def __init__(self, length: int, size: int, *words: int) -> None:
        self._length, self._words, self._given = length, words, 0
        self.taken = min(size, length)
        self.slots = list(range(self.taken))
        self._draws: NDArray[np.float64] = np.empty(0)

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        if not self.slots:
            raise StopIteration
        block, inside = divmod(self._given, _DRAWN)
        if not inside or not len(self._draws):
            self._draws = uniforms(*self._words, _BUFFERS, block, count=_DRAWN)[0]
        place = int(self._draws[inside] * len(self.slots))
        position = self.slots[place]
        self._given += 1
        if self.taken < self._length:
            self.slots[place] = self.taken
            self.taken += 1
        else:
            self.slots[place] = self.slots[-1]
            self.slots.pop()
        return position
