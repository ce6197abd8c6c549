"""ShuffleBN (MoCo, arXiv 1911.05722 section 3.3): the permutation of the key batch."""

from __future__ import annotations

import torch
from torch import Tensor

from synco_fast.kernels.rng import philox

__all__ = ["key_order"]

#: Used in the counter where families of negatives have their numbers (`synco_fast.kernels.rng`), which are far smaller.
_SHUFFLE = 1 << 31


def key_order(
    length: int, *, seed: int, step: int | Tensor, direction: int = 0, device: torch.device | str | None = None
) -> Tensor:
    """A permutation of the batch, (length,) int64: the key computed at place i is that of row ``order[i]``.

    It sorts Philox words with the row as counter: the same on every device and rank, drawn where it is used, without
    state.

    Args:
        length: B, the global batch.
        seed, step: As the loss takes them; an int64 tensor keeps the step on the device.
        direction: 0, and 1 for the second direction of a symmetric loss.
        device: Where the order is computed.
    """
    row = torch.arange(length, dtype=torch.int64, device=device)
    words = philox((row, direction, _SHUFFLE, 0), (seed, step))
    return torch.argsort(words[0], stable=True)
