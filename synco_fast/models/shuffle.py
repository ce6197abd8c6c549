"""ShuffleBN (MoCo, arXiv 1911.05722 section 3.3): the permutation of the key batch."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from synco_fast.kernels.rng import philox

__all__ = ["key_order"]

#: Used in the counter where families of negatives have their numbers (`synco_fast.kernels.rng`), which are far smaller.
_SHUFFLE = 1 << 31
#: Steps whose permutations are drawn at once: a draw costs about a hundred small launches, whatever its size.
_AT_ONCE = 64


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
    if isinstance(step, Tensor):
        return _draw(length, seed, step, direction, device)
    block, place = divmod(step, _AT_ONCE)
    return _block(length, seed, block, direction, device)[place]


@lru_cache(maxsize=4)
def _block(length: int, seed: int, block: int, direction: int, device: torch.device | str | None) -> tuple[Tensor, ...]:
    """The permutations of `_AT_ONCE` steps from ``block * _AT_ONCE`` on; read-only."""
    steps = torch.arange(block * _AT_ONCE, (block + 1) * _AT_ONCE, dtype=torch.int64, device=device)
    return _draw(length, seed, steps[:, None], direction, device).unbind()


def _draw(length: int, seed: int, step: Tensor, direction: int, device: torch.device | str | None) -> Tensor:
    row = torch.arange(length, dtype=torch.int64, device=device)
    words = philox((row.expand(torch.broadcast_shapes(step.shape, row.shape)), direction, _SHUFFLE, 0), (seed, step))
    return torch.argsort(words[0], dim=-1, stable=True)
