"""Counter-based random numbers of the loss (Philox): no generator state.

Every draw is a Philox-4x32-10 block (Salmon et al., SC 2011) with

    key     = (seed, step)
    counter = (global row, slot, family number, lane)

so all backends draw the same numbers, a resumed or re-sharded run draws them again, and nothing is stored for the
backward pass. Lane 0 of a slot holds the coefficient (word 0) and the picks (words 1 and 2, each extended below by 16
bits of word 3). Lanes 1, 2, ... hold the normal vector, four components in each lane.

A pick below n uses 48 random bits, so the relative bias between positions is at most n / 2^48 (4e-12 at n = 1,024). A
coefficient uses 23 bits and is always below the upper end of its range, in every dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from synco_fast.kernels.negatives import Family, Negatives

__all__ = ["STREAM", "WORD", "Draw", "draw", "philox"]

#: Version of the random numbers. Version 1 used 32 bits for a pick, from Q^N ordered by similarity; version 2 is
#: described above. A run with synthetic negatives resumes bit for bit only with the version that started it.
STREAM = 2

#: Exclusive upper bound of Philox words, seeds, steps, rows and slots.
WORD = 1 << 32
_MASK = WORD - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10

Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Draw(NamedTuple):
    """The random draws of one family for R rows and n slots.

    Attributes:
        first: Position of n_i in Q^N, which is ordered by queue index. (R, n) int64.
        second: Position of n_j, independent of ``first``, (R, n) int64; None if the family is not paired.
        coefficient: t, uniform over the family's range, (R, n); None if the family has no range.
        noise: e, standard normal, (R, n, D); None if the family has no noise.
    """

    first: Tensor
    second: Tensor | None
    coefficient: Tensor | None
    noise: Tensor | None


def philox(counter: tuple[Tensor | int, ...], key: tuple[Tensor | int, Tensor | int]) -> Words:
    """Philox-4x32-10 on int64 tensors that hold 32-bit words.

    Args:
        counter: Four words, each an int or an int64 tensor, that broadcast to one shape.
        key: Two words, ints or 0-dimensional int64 tensors (a tensor keeps the step counter on the device).

    Returns:
        Four int64 tensors of the broadcast shape, values in [0, 2**32).
    """
    device = next((word.device for word in counter if isinstance(word, Tensor)), None)
    # Broadcast late: the first rounds mix small tensors, and only the third combines the whole counter.
    # `full`, not a copy from the host: the host would wait for a copy, and a CUDA graph cannot capture one.
    c0, c1, c2, c3 = (
        word if isinstance(word, Tensor) else torch.full((), word, dtype=torch.int64, device=device) for word in counter
    )
    # `torch.compile` takes the product of an index and a number for an index of 32 bits, but not that of a masked one.
    c0, c2 = c0 & _MASK, c2 & _MASK
    k0, k1 = key
    for _ in range(_ROUNDS):
        # int64 products wrap, but both 32-bit halves are those of the true product. The odd words keep the upper half
        # of their product until the mask below removes it.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0 = (p1 >> 32 ^ c1).bitwise_xor_(k0).bitwise_and_(_MASK)
        c2 = (p0 >> 32 ^ c3).bitwise_xor_(k1).bitwise_and_(_MASK)
        c1, c3 = p1, p0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    c0, c1, c2, c3 = torch.broadcast_tensors(c0, c1 & _MASK, c2, c3 & _MASK)
    return c0, c1, c2, c3


def uniform(word: Tensor, dtype: torch.dtype) -> Tensor:
    """Map a 32-bit word to (0, 1): (upper 23 bits + 1/2) / 2^23, exact in float32, never 0 or 1."""
    return ((word >> 9).to(dtype) + 0.5) * 2.0**-23


def pick(word: Tensor, more: Tensor, size: Tensor | int) -> Tensor:
    """Map a 32-bit word and 16 more bits to an index below ``size`` (at most 2**31), with bias at most size / 2**48."""
    # Computes floor((word * 2^16 + more) * size / 2^48), whose products would not fit into 64 bits.
    return word * size + (more * size >> 16) >> 32


def largest_below(low: float, high: float, dtype: torch.dtype) -> float:
    """The largest number of [low, high) in a dtype; a limit for draws, which rounding could take to ``high``."""
    if low == high:
        return high
    if high == 0:
        return -torch.finfo(dtype).tiny
    digits = 1 - round(math.log2(torch.finfo(dtype).eps))
    fraction, exponent = math.frexp(high)
    whole = round(fraction * 2**digits)
    # Floating-point numbers are twice as dense below a power of two.
    below = whole - 0.5 if whole == 2 ** (digits - 1) else whole - 1
    return max(low, math.ldexp(below, exponent - digits))


def normal(words: Words, dtype: torch.dtype) -> Tensor:
    """Map four words to four standard normal numbers (Box-Muller), along a new last dimension of size 4."""
    u0, u1, u2, u3 = (uniform(word, dtype) for word in words)
    near, far = (-2 * u0.log()).sqrt(), (-2 * u2.log()).sqrt()
    one, two = 2 * math.pi * u1, 2 * math.pi * u3
    return torch.stack((near * one.cos(), near * one.sin(), far * two.cos(), far * two.sin()), dim=-1)


def draw(
    negatives: Negatives,
    rows: int,
    dim: int,
    *,
    seed: int,
    step: int | Tensor,
    first_row: int = 0,
    available: Tensor | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Draw]:
    """The picks and coefficients that `synthetic_contrast` uses for the same seed, step and rows.

    Args:
        negatives: Families, counts and ranges.
        rows: R, the number of queries.
        dim: D, the length of a noise vector.
        seed: The run's seed, in [0, 2**32).
        step: The training step, in [0, 2**32); a 0-dimensional int64 tensor keeps it on the device.
        first_row: Global index of the first query: with R queries per rank, rank r passes r * R.
        available: Number of queue keys that each row may use, (R,) int64, for a mask that can leave fewer than N. Picks
            stay below min(N, available). Rows without keys pick position 0, which the caller must not use.
        device: Device of the draws.
        dtype: Dtype of coefficients and noise. 16-bit numbers are computed in float32 and rounded once.

    Returns:
        A `Draw` for every family with a nonzero count, by family name.
    """
    exact = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    row = torch.arange(first_row, first_row + rows, dtype=torch.int64, device=device)[:, None]
    size: Tensor | int = negatives.hard
    if available is not None:
        size = available.to(torch.int64).clamp(max=negatives.hard)[:, None]

    families = list(negatives.active())
    counts = [negatives.count_of(family) for family in families]
    if not families:
        return {}
    # Draw lane 0 of all families at once: a few calls on larger tensors, not the same number for each family.
    slots = [torch.arange(count, dtype=torch.int64, device=device) for count in counts]
    numbers = [torch.full_like(slot, family.number) for family, slot in zip(families, slots, strict=True)]
    lane_0 = philox((row, torch.cat(slots), torch.cat(numbers), 0), (seed, step))
    of_family = zip(*(torch.split(word, counts, dim=1) for word in lane_0), strict=True)

    def one(family: Family, slot: Tensor, words: Words) -> Draw:
        coefficient = noise = second = None
        first = pick(words[1], words[3] >> 16, size)
        if family.paired:
            second = pick(words[2], words[3] & 0xFFFF, size)
        if family.ranged:
            low, high = negatives.range_of(family)
            coefficient = (low + (high - low) * uniform(words[0], exact)).to(dtype)
            coefficient.clamp_(max=largest_below(low, high, dtype))
        if family.noisy:
            lane = torch.arange(1, 1 + math.ceil(dim / 4), dtype=torch.int64, device=device)
            blocks = philox((row[..., None], slot[:, None], family.number, lane), (seed, step))
            noise = normal(blocks, exact).flatten(-2)[..., :dim].to(dtype)
        return Draw(first, second, coefficient, noise)

    return {
        family.name: one(family, slot, words) for family, slot, words in zip(families, slots, of_family, strict=True)
    }
