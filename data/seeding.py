"""Counter-based random numbers: seeds and uniforms as functions of a few integers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["derive_seed", "uniforms"]

_GOLDEN = 0x9E3779B97F4A7C15


def derive_seed(*words: int) -> int:
    """A seed in [0, 2**32) from a few integers in [0, 2**64), such as seed, epoch and image.

    The finaliser of splitmix64, folded over the words. The result has 32 bits, because PyTorch's generator on the CPU
    ignores the upper bits of a larger seed.
    """
    state = 0
    for word in words:
        state = (state + word + _GOLDEN) % 2**64
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 32


def uniforms(*words: int | NDArray[np.int64], count: int) -> NDArray[np.float64]:
    """Numbers in [0, 1), each row a function of its words: splitmix64 from the state that the words fold to.

    Args:
        words: Integers from 0, or (n,) arrays of them, such as seed, epoch and images.
        count: Numbers in a row.

    Returns:
        (n, count) float64 with 53 random bits each.
    """
    state = np.zeros(1, dtype=np.uint64)
    for word in words:
        state = _finalise(state + np.asarray(word).astype(np.uint64) + np.uint64(_GOLDEN))
    steps = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    return (_finalise(state[:, None] + steps) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _finalise(z: NDArray[np.uint64]) -> NDArray[np.uint64]:
    z = (z ^ z >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ z >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return z ^ z >> np.uint64(31)
