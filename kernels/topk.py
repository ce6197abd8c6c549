"""Exact top-N without sorting the queue: estimate a threshold from a sample, then select among the keys above it.

The queue is read once, in blocks, and each row keeps only the keys with a similarity above its threshold. The N largest
of these candidates are selected, with ties going to the smallest queue index, and stay in queue order. The estimate
affects speed only. A row that kept too few or too many keys is selected again from all its similarities, so the result
is exact for every input.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["SAMPLE", "Candidates", "count_marks", "largest", "select_whole_rows", "stride_and_rank"]

#: Most queue keys in the sample for the threshold.
SAMPLE = 4096

#: A row that keeps more than this multiple of the expected number of keys is selected again from all similarities.
_EXCESS = 2

#: Blocks of the queue whose candidates are compacted together.
_TOGETHER = 8

#: Similarities of R rows to the keys [start, stop) of the queue, (R, stop - start); -inf for masked keys.
Similarities = Callable[[Tensor, int, int], Tensor]


def stride_and_rank(length: int, hard: int, size: int | None = None) -> tuple[int, int] | None:
    """The stride at which to sample the queue, and the rank in the sample that gives the threshold.

    Of the N largest of K similarities, a sample of S holds about mu = N S / K, with standard deviation sqrt(mu). The
    rank is six standard deviations above mu, and a little more for the skewed tail of small mu. If keys at a stride
    behave like random ones, the threshold is then too high for one row in billions.

    Args:
        length: K.
        hard: N.
        size: Most keys of the sample; None for `SAMPLE`.

    Returns:
        Stride and rank (counted from 1), or None if the sample could not exclude at least a quarter of the queue.
    """
    stride = math.ceil(length / (size or SAMPLE))
    sample = math.ceil(length / stride)
    expected = hard * sample / length
    rank = math.ceil(expected + 6 * math.sqrt(expected) + 4)
    return (stride, rank) if 4 * rank <= 3 * sample else None


class Candidates:
    """The candidates above each row's threshold, collected block by block. CPU and float32 only.

    The sizes depend on the data. A similarity and its queue index are packed into one integer, which is smaller for a
    more similar key. Comparing these integers also breaks ties.
    """

    def __init__(self, threshold: Tensor, expected: int) -> None:
        """Start empty.

        Args:
            threshold: (R, 1) float32. A key is kept unless its similarity is below or equal, so NaN is kept.
            expected: Expected number of keys that a row keeps.
        """
        self._threshold = threshold
        self._limit = int(_EXCESS * expected)
        self._count = torch.zeros(len(threshold), dtype=torch.int64)
        self._found: list[_Found] = []

    def add(self, similarity: Tensor, start: int) -> None:
        """Keep the similarities above the threshold, for queue keys ``start``, ``start + 1``, ...

        Args:
            similarity: (R, C), contiguous.
            start: Queue index of the first column. Successive calls must have ascending indices.
        """
        kept = torch.le(similarity, self._threshold).logical_not_()
        full = self._count > self._limit
        if full.any():
            # Such a row is selected again in any case; dropping its keys bounds the memory.
            kept[full] = False
        counts = count_marks(kept).to(torch.int64)
        self._count += counts
        # NumPy finds sparse nonzeros faster than PyTorch.
        flat = torch.from_numpy(np.flatnonzero(kept.numpy()))
        values = similarity.view(-1).index_select(0, flat)
        self._found.append(_Found(flat.to(torch.int32), values, counts, start, similarity.shape[1]))

    def select(self, hard: int, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exact N largest of each row, if the candidates contain them. Call it once, after all keys were added.

        Args:
            hard: N.
            needed: The number of keys that each row must have kept, (R,): N, or fewer if a mask leaves fewer.

        Returns:
            Similarities (R, N) and queue indices (R, N) int64 in queue order, with -inf and 0 after a row's last key;
            and the rows, (R,) bool, whose result is invalid because they kept too few or too many keys.
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
            # All fill values of a short row are equal, and there may be more of them than needed.
            kept &= kept.cumsum(dim=1) <= hard
        return *_unpack(packed[kept].view(-1, hard)), failed

    @staticmethod
    def _place(blocks: list[_Found], packed: Tensor, filled: Tensor) -> Tensor:
        """Append the candidates of some blocks to rows of ``packed`` that hold ``filled``; returns their number."""
        flat, values = torch.cat([found.flat for found in blocks]), torch.cat([found.values for found in blocks])
        counts = torch.stack([found.counts for found in blocks])
        where = torch.tensor([(found.start, found.columns) for found in blocks])
        row = torch.arange(len(filled))
        # Keys of a block are ordered by row, so a whole run shares the offsets that block and row add.
        before = filled + counts.cumsum(0) - counts
        ran = (counts.view(-1).cumsum(0) - counts.view(-1)).view_as(counts)
        runs = torch.stack((row * packed.shape[1] + before - ran, where[:, :1] - row * where[:, 1:]), dim=-1)
        shift = torch.repeat_interleave(runs.view(-1, 2), counts.view(-1), dim=0, output_size=len(flat))
        place = shift[:, 0] + torch.arange(len(flat))
        packed.view(-1).index_copy_(0, place, _pack(values, shift[:, 1] + flat))
        return counts.sum(dim=0)


class _Found(NamedTuple):
    """The candidates of one block: flat positions, similarities, number per row; the block's first key and width."""

    flat: Tensor
    values: Tensor
    counts: Tensor
    start: int
    columns: int


def count_marks(marks: Tensor) -> Tensor:
    """The number of true values in each row of a contiguous bool tensor, (R,) int32."""
    rows, columns = marks.shape
    if columns % 8:
        return marks.view(torch.int8).sum(dim=1, dtype=torch.int32)
    # Read eight bools as one 64-bit word. Sums of up to 255 words do not carry, so the bools are never copied wider.
    words = torch.split(marks.view(torch.int64), 255, dim=1)
    return sum(
        (part.sum(dim=1).view(torch.uint8).view(rows, 8).sum(dim=1, dtype=torch.int32) for part in words),
        torch.zeros(rows, dtype=torch.int32, device=marks.device),
    )


def largest(values: Tensor, rank: int) -> Tensor:
    """The ``rank``-th largest value of each row of a CPU tensor, (R, 1). Overwrites the tensor."""
    # NumPy's partition works in place, unlike `topk`. Both treat NaN as the largest.
    array = values.numpy()
    array.partition(array.shape[1] - rank, axis=1)
    return values[:, -rank, None].clone()


def _pack(similarity: Tensor, index: Tensor) -> Tensor:
    """Pack float32 similarities and indices below 2**32 into int64: descending similarity, then ascending index."""
    # Canonical zero and NaN. NaN comes first, as in PyTorch's sort.
    canonical = torch.where(similarity.isnan(), torch.nan, similarity + 0.0)
    return (~_ordered(canonical.view(torch.int32))).to(torch.int64) << 32 | index


def _unpack(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `_pack`."""
    return _ordered(~(packed >> 32).to(torch.int32)).view(torch.float32), packed & 0xFFFFFFFF


def _ordered(bits: Tensor) -> Tensor:
    """Order-preserving int32 of the bits of float32 numbers, and back."""
    return bits ^ (bits >> 31 & 0x7FFFFFFF)


def select_whole_rows(
    similarities: Similarities, rows: Tensor, length: int, hard: int, budget: int
) -> tuple[Tensor, Tensor]:
    """The exact N largest from whole rows of similarities, a few rows at a time. No host synchronisation.

    Args:
        similarities: See `Similarities`.
        rows: The rows to select, (R,) int64.
        length: K.
        hard: N.
        budget: Bytes for the temporaries of one block, which has at least one row.

    Returns:
        Similarities and queue indices, (R, N) each, in queue order, masked keys last.
    """
    # A stable sort holds values and indices, both twice.
    step = max(1, budget // (32 * length))
    values, indices = [], []
    for block in torch.split(rows, step):
        ordered, index = similarities(block, 0, length).sort(dim=1, descending=True, stable=True)
        # Masked keys get an index beyond the queue, so that the same sort puts them last.
        chosen = (index[:, :hard] + length * ordered[:, :hard].isneginf()).sort(dim=1)
        values.append(ordered[:, :hard].gather(1, chosen.indices))
        indices.append(chosen.values % length)
    return torch.cat(values), torch.cat(indices)
