"""What the head returns."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Contrast", "Statistics", "mean_of_finite"]


class Statistics(NamedTuple):
    """What a trainer logs, a value per query and without gradient.

    Attributes:
        positive: q.k, (B,).
        hard: Mean of q.n over Q^N, (B,); NaN where N = 0 or a mask left no key.
        synthetic: Mean of q.s by family, (B, 6), in the order of `FAMILIES`; NaN where a family has no negatives.
        rank: How many negatives, queue keys and synthetic ones, are more similar to q than k is, (B,) int64. 0 is what
            the field's contrastive top-1 accuracy counts.
        queue_rank: The same among queue keys alone, (B,) int64: comparable between methods and across a warm-up.
    """

    positive: Tensor
    hard: Tensor
    synthetic: Tensor
    rank: Tensor
    queue_rank: Tensor


class Contrast(NamedTuple):
    """The loss of each query, (B,), which carries the gradient to q, and the statistics beside it."""

    loss: Tensor
    statistics: Statistics


def mean_of_finite(similarity: Tensor) -> Tensor:
    """Means over the last dimension without the -inf of masked keys and without NaN; NaN where nothing is left."""
    return similarity.masked_fill(similarity == -torch.inf, torch.nan).nanmean(dim=-1)
