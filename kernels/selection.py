"""Q^N without sorting the queue: a threshold from a sample, the keys above it, and the exact order of those.

The queue is read once, in blocks, and each row keeps only the keys whose similarity lies above its threshold; the
order (similarity descending, queue index ascending) is then made among these few. The estimate decides speed alone:
a row that kept too few or too many is selected again from its whole row of similarities, so the result is exact for
every input.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["SAMPLE", "Candidates", "select_whole_rows", "stride_and_rank"]

#: How many queue keys the threshold is estimated from, at most.
SAMPLE = 4096

#: A row that met more than this many times the keys that were expected is selected again from its whole row.
_EXCESS = 2

#: Similarities of R rows to the keys [start, stop) of the queue, (R, stop - start), -inf where a mask forbids the key.
Similarities = Callable[[Tensor, int, int], Tensor]


def stride_and_rank(length: int, hard: int) -> tuple[int, int] | None:
    """At what stride to sample the queue, and which rank in the sample is the threshold.

    Of the N largest of K similarities, a sample of S holds about mu = N S / K, spread by sqrt(mu). Six spreads above
    that (and a few for the skewed tail of small mu), the threshold is below the N-th largest but for one row in
    billions, where keys at a stride are as good as keys at random.

    Args:
        length: K.
        hard: N.

    Returns:
        Stride and rank (counted from 1), or None where the sample could not exclude at least a quarter of the queue.
    """
    stride = math.ceil(length / SAMPLE)
    sample = math.ceil(length / stride)
    expected = hard * sample / length
    rank = math.ceil(expected + 6 * math.sqrt(expected) + 4)
    return (stride, rank) if 4 * rank <= 3 * sample else None


class Candidates:
    """The keys above each row's threshold, gathered block by block. For CPU tensors: sizes depend on the data."""

    def __init__(self, threshold: Tensor, expected: int) -> None:
        """Start empty.

        Args:
            threshold: (R, 1); a key is kept unless its similarity is below or equal (so NaN is kept).
            expected: How many keys a row is likely to keep.
        """
        self._threshold = threshold
        self._limit = int(_EXCESS * expected)
        self._count = torch.zeros(len(threshold), dtype=torch.int64)
        self._values = threshold.new_full((len(threshold), self._limit), -torch.inf)
        self._indices = torch.zeros(len(threshold), self._limit, dtype=torch.int32)

    def add(self, similarity: Tensor, start: int) -> None:
        """Keep what is above the threshold among keys ``start``, ``start + 1``, ... of the queue.

        Args:
            similarity: (R, C), contiguous.
            start: Queue index of the first column; calls come in ascending order.
        """
        kept = torch.le(similarity, self._threshold).logical_not_()
        flat = kept.view(-1).nonzero().squeeze(1)
        rows = flat // similarity.shape[1]
        found = torch.bincount(rows, minlength=len(self._count))
        # Row by row and ascending within each: a key's place is what the row had and how many came before it here.
        place = torch.arange(len(flat)) + (self._count - (found.cumsum(0) - found))[rows]
        self._count += found
        if (self._count > self._limit).any():
            fits = place < self._limit
            flat, rows, place = flat[fits], rows[fits], place[fits]
        self._values[rows, place] = similarity.view(-1).index_select(0, flat)
        self._indices[rows, place] = (flat - rows * similarity.shape[1] + start).to(torch.int32)

    def select(self, hard: int, needed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The exact N largest of each row where what was kept holds them.

        Args:
            hard: N.
            needed: How many keys each row must have kept for that, (R,): N, or fewer where a mask leaves fewer.

        Returns:
            Similarities (R, N) and queue indices (R, N) int64 in the documented order, -inf and 0 beyond what a row
            has; and the rows, (R,) bool, whose result does not count because too few or too many keys were kept.
        """
        failed = (self._count < needed) | (self._count > self._limit)
        width = min(self._limit, max(hard, int(self._count.max())))
        # The indices ascend within a row, so a stable sort leaves ties in their order.
        values, order = self._values[:, :width].sort(dim=1, descending=True, stable=True)
        return values[:, :hard], self._indices.to(torch.int64).gather(1, order[:, :hard]), failed


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
        Similarities and queue indices, (R, N) each, in the documented order.
    """
    # A stable sort holds values and indices, each of them twice.
    step = max(1, budget // (32 * length))
    values, indices = [], []
    for block in torch.split(rows, step):
        ordered, index = similarities(block, 0, length).sort(dim=1, descending=True, stable=True)
        values.append(ordered[:, :hard].clone())
        indices.append(index[:, :hard].clone())
    return torch.cat(values), torch.cat(indices)
