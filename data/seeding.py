"""Seeds that follow from other seeds."""

from __future__ import annotations

__all__ = ["derive_seed"]


def derive_seed(*words: int) -> int:
    """A seed in [0, 2**32) from a few whole numbers in [0, 2**64), such as seed, epoch and image.

    The finaliser of splitmix64, folded over the words. Thirty-two bits, because PyTorch's generator on the CPU ignores
    the rest of a larger seed: shifting one number past another would lose it.
    """
    state = 0
    for word in words:
        state = (state + word + 0x9E3779B97F4A7C15) % 2**64
        state = ((state ^ state >> 30) * 0xBF58476D1CE4E5B9) % 2**64
        state = ((state ^ state >> 27) * 0x94D049BB133111EB) % 2**64
        state ^= state >> 31
    return state >> 32
