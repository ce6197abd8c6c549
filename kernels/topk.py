"""Exact top-N without sorting the queue: a threshold from a sample, then the exact order of the keys above it.

The queue is read once, in blocks, and each row keeps only the keys whose similarity lies above its threshold; the N
largest (of equal ones, those with the smallest queue index) are then chosen among these few and stay in the order of
the queue. The estimate affects only the speed: a row that kept too few or too many is selected again from its whole row
of similarities, so the result is exact for every input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["SAMPLE", "Candidates", "count_marks", "largest", "select_whole_rows", "stride_and_rank"]

#: How many queue keys the threshold is estimated from, at most.
SAMPLE = 4096

#: A row that met more than this many times the keys that were expected is selected again from its whole row.
_EXCESS = 2

#: Blocks of the queue whose candidates are brought into place together.
_TOGETHER = 8

#: Similarities of R rows to the keys [start, stop) of the queue, (R, stop - start), -inf where a mask forbids the key.
Similarities = Callable[[Tensor, int, int], Tensor]


def stride_and_rank(length: int, hard: int, size: int | None = None) -> tuple[int, int] | None:
    """At what stride to sample the queue, and which rank in the sample is the threshold.

    Of the N largest of K similarities, a sample of S holds about mu = N S / K, spread by sqrt(mu). Six spreads above
    that (and a few for the skewed tail of small mu), the threshold is below the N-th largest but for one row in
    billions, where keys at a stride are as good as keys at random.

    Args:
        length: K.
        hard: N.
        size: Keys of the sample, at most; `SAMPLE` where it is None.

    Returns:
        Stride and rank (counted from 1), or None where the sample could not exclude at least a quarter of the queue.
    """
    stride = math.ceil(length / (size or SAMPLE))
    sample = math.ceil(length / stride)
    expected = hard * sample / length
    rank = math.ceil(expected + 6 * math.sqrt(expected) + 4)
    return (stride, rank) if 4 * rank <= 3 * sample else None


class Candidates:
    """The float32 keys above each row's threshold, gathered block by block. For CPU tensors: sizes depend on the data.

    A similarity and its queue index are packed into one integer, smaller the more similar the key is, so that one
    comparison of plain integers settles ties too.
    """

    def __init__(self, threshold: Tensor, expected: int) -> None:
        """Start empty.

        Args:
            threshold: (R, 1) float32; a key is kept unless its similarity is below or equal (so NaN is kept).
            expected: How many keys a row is likely to keep.
        """
        self._threshold = threshold
        self._limit = int(_EXCESS * expected)
        self._count = torch.zeros(len(threshold), dtype=torch.int64)
        self._found: list[_Found] = []

    def add(self, similarity: Tensor, start: int) -> None:
        """Keep what is above the threshold among keys ``start``, ``start + 1``, ... of the queue.

        Args:
            similarity: (R, C), contiguous.
            start: Queue index of the first column; calls come in ascending order.
        """
        kept = torch.le(similarity, self._threshold).logical_not_()
        full = self._count > self._limit
        if full.any():
            # Such a row is selected again in any case, and what is held stays bounded.
            kept[full] = False
        counts = count_marks(kept).to(torch.int64)
        self._count += counts
        # NumPy finds the few that are set somewhat faster than PyTorch.
        flat = torch.from_numpy(np.flatnonzero(kept.numpy()))
        values = similarity.view(-1).index_select(0, flat)
        self._found.append(_Found(flat.to(torch.int32), values, counts, start, similarity.shape[1]))

    def select(self, hard: int, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exact N largest of each row where what was kept holds them; call it once, when all are added.

        Args:
            hard: N.
            needed: How many keys each row must have kept for that, (R,): N, or fewer where a mask leaves fewer.

        Returns:
            Similarities (R, N) and queue indices (R, N) int64 in the order of the queue, -inf and 0 beyond what a
            row has; and the rows, (R,) bool, whose result does not count because too few or too many keys were kept.
        """
        failed = (self._count < needed) | (self._count > self._limit)
        width = max(hard, int(self._count.max()))
        nothing = _pack(torch.full((1,), -torch.inf, dtype=torch.float32), torch.zeros(1, dtype=torch.int64))
        packed = nothing.expand(len(self._count), width).contiguous()
        filled = torch.zeros_like(self._count)
        for begin in range(0, len(self._found), _TOGETHER):
            filled += self._place(self._found[begin : begin + _TOGETHER], packed, filled)
        self._found.clear()
        last = torch.from_numpy(np.partition(packed.numpy(), hard - 1, axis=1)[:, hard - 1 : hard])
        kept = packed <= last
        if (count_marks(kept) > hard).any():
            # What fills a short row is equal throughout, and more than is wanted may be there.
            kept &= kept.cumsum(dim=1) <= hard
        return *_unpack(packed[kept].view(-1, hard)), failed

    @staticmethod
    def _place(blocks: list[_Found], packed: Tensor, filled: Tensor) -> Tensor:
        """Append what some blocks gave to the rows of ``packed``, of which ``filled`` are taken; how many they are."""
        flat, values = torch.cat([found.flat for found in blocks]), torch.cat([found.values for found in blocks])
        counts = torch.stack([found.counts for found in blocks])
        where = torch.tensor([(found.start, found.columns) for found in blocks])
        row = torch.arange(len(filled))
        # A block's keys are ordered by row: what block and row add to place and index is the same for a whole run.
        before = filled + counts.cumsum(0) - counts
        ran = (counts.view(-1).cumsum(0) - counts.view(-1)).view_as(counts)
        runs = torch.stack((row * packed.shape[1] + before - ran, where[:, :1] - row * where[:, 1:]), dim=-1)
        shift = torch.repeat_interleave(runs.view(-1, 2), counts.view(-1), dim=0, output_size=len(flat))
        place = shift[:, 0] + torch.arange(len(flat))
        packed.view(-1).index_copy_(0, place, _pack(values, shift[:, 1] + flat))
        return counts.sum(dim=0)


class _Found(NamedTuple):
    """What one block of the queue gave: flat positions and similarities, how many a row, first key, block width."""

    flat: Tensor
    values: Tensor
    counts: Tensor
    start: int
    columns: int


def count_marks(marks: Tensor) -> Tensor:
    """How many are true in each row of contiguous marks, (R,) int32."""
    rows, columns = marks.shape
    if columns % 8:
        return marks.view(torch.int8).sum(dim=1, dtype=torch.int32)
    # Eight marks are the bytes of a word, and sums of up to 255 words do not carry: no wider copy of the marks is made.
    words = torch.split(marks.view(torch.int64), 255, dim=1)
    return sum(
        (part.sum(dim=1).view(torch.uint8).view(rows, 8).sum(dim=1, dtype=torch.int32) for part in words),
        torch.zeros(rows, dtype=torch.int32, device=marks.device),
    )


def largest(values: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest of each row of a CPU tensor, which is overwritten; (R, 1)."""
    # In place, which topk is not; both take NaN for the largest.
    array = values.numpy()
    array.partition(array.shape[1] - rank, axis=1)
    return values[:, -rank, None].clone()


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """Float32 similarities and indices below 2**32 as int64, ascending as similarities descend, then indices ascend."""
    # One zero and one NaN, which comes first as it does in PyTorch's sort.
    canonical = torch.where(similarity.isnan(), torch.nan, similarity + 0.0)
    return (~_ordered(canonical.view(torch.int32))).to(torch.int64) << 32 | index


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """What `_pack` was given."""
    return _ordered(~(packed >> 32).to(torch.int32)).view(torch.float32), packed & 0xFFFFFFFF


def _ordered(bits: Tensor) -> Tensor:
    """Bits of float32 numbers as int32 in the numbers' order, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def select_whole_rows(
    similarities: Similarities, rows: Tensor, length: int, hard: int, budget: int
) -> tuple[Tensor, Tensor]:
    """The exact N largest from whole rows of similarities, a few rows at a time; no host synchronisation.

    Args:
        similarities: See `Similarities`.
        rows: Which rows, (R,) int64.
        length: K.
        hard: N.
        budget: Bytes that the temporaries of one block may take (one row's are taken in any case).

    Returns:
        Similarities and queue indices, (R, N) each, in the order of the queue, masked keys last.
    """
    # A stable sort holds values and indices, each of them twice.
    step = max(1, budget // (32 * length))
    values, indices = [], []
    for block in torch.split(rows, step):
        ordered, index = similarities(block, 0, length).sort(dim=1, descending=True, stable=True)
        # Masked keys have an index beyond the queue here, so that one sort brings them last too.
        chosen = (index[:, :hard] + length * ordered[:, :hard].isneginf()).sort(dim=1)
        values.append(ordered[:, :hard].gather(1, chosen.indices))
        indices.append(chosen.values % length)
    return torch.cat(values), torch.cat(indices)
