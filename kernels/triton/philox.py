"""The draws of `synco_fast.kernels.rng` inside a kernel.

Words, and so all picks, are equal to those of `rng.py` bit for bit; coefficients and normal numbers up to the
rounding of float32.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["normal", "philox", "pick", "uniform"]


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10 on uint32 values that broadcast: four words of the counter, two of the key; gives four words."""
    for _ in tl.static_range(10):
        low0, low1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, high1 = tl.umulhi(c0, 0xD2511F53), tl.umulhi(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """A word as a number in (0, 1), exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def pick(word, more, size):
    """A position below ``size`` from a word and 16 bits more: the upper word of (word * 2^16 + more) * size / 2^16."""
    low = word * size
    carried = low + tl.umulhi(more << 16, size) < low
    return (tl.umulhi(word, size) + carried.to(tl.uint32)).to(tl.int32)


@triton.jit
def _turned(u):
    """Cosine and sine of 2 pi u for u in [0, 1].

    Quarter turns are taken off exactly, and Taylor's polynomials serve the remaining eighth of a turn to one unit in
    the last place. The library's functions would keep a table on the stack for arguments that never occur here.
    """
    quarters = tl.floor(u * 4 + 0.5)
    x = (u - quarters * 0.25) * 6.283185307179586
    z = x * x
    sine = x * (1 + z * (-1.6666667e-1 + z * (8.3333333e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6))))
    cosine = 1 + z * (-0.5 + z * (4.1666667e-2 + z * (-1.3888889e-3 + z * (2.4801587e-5 + z * -2.7557319e-7))))
    quarter = quarters.to(tl.int32) & 3
    odd = (quarter & 1) == 1
    first = tl.where(odd, sine, cosine)
    second = tl.where(odd, cosine, sine)
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    second = tl.where(quarter >= 2, -second, second)
    return first, second


@triton.jit
def normal(w0, w1, w2, w3):
    """Four words as four standard normal numbers, by Box and Muller."""
    cosine, sine = _turned(uniform(w1))
    near = tl.sqrt(tl.maximum(-2 * tl.log(uniform(w0)), 0))
    far = tl.sqrt(tl.maximum(-2 * tl.log(uniform(w2)), 0))
    other_cosine, other_sine = _turned(uniform(w3))
    return near * cosine, near * sine, far * other_cosine, far * other_sine
