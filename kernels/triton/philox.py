"""Philox random numbers inside a Triton kernel, the same as in `synco_fast.kernels.rng`.

The words, and so all picks, match `rng.py` bit for bit. Coefficients and normal numbers match up to float32 rounding.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["normal", "philox", "pick", "uniform"]


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32-10: four words of the counter and two of the key, uint32 and broadcastable, give four words."""
    for _ in tl.static_range(10):
        # One instruction gives both halves of a product.
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        high0, high1 = (p0 >> 32).to(tl.uint32), (p1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1.to(tl.uint32), high0 ^ c3 ^ k1, p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def uniform(word):
    """Map a word to (0, 1), exact in float32."""
    return ((word >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def pick(word, more, size):
    """Map a word and 16 more bits to an index below ``size``: the upper word of (word * 2^16 + more) * size / 2^16."""
    low = word * size
    carried = low + tl.umulhi(more << 16, size) < low
    return (tl.umulhi(word, size) + carried.to(tl.uint32)).to(tl.int32)


@triton.jit
def _turned(word):
    """Cosine and sine of 2 pi u for u = `uniform(word)`.

    Range reduction by quarter turns is exact, in integers. Taylor polynomials serve the remaining eighth of a turn, to
    one unit in the last place. The library functions would keep a table on the stack for arguments that never occur.
    """
    moved = (word >> 9) + (1 << 20)
    quarter = moved >> 21
    rest = (moved & ((1 << 21) - 1)).to(tl.int32) - (1 << 20)
    x = (rest.to(tl.float32) + 0.5) * 7.490140565847857e-07
    z = x * x
    sine = x * (1 + z * (-1.6666667e-1 + z * (8.3333333e-3 + z * (-1.9841270e-4 + z * 2.7557319e-6))))
    cosine = 1 + z * (-0.5 + z * (4.1666667e-2 + z * (-1.3888889e-3 + z * (2.4801587e-5 + z * -2.7557319e-7))))
    odd = (quarter & 1) == 1
    first = tl.where(odd, sine, cosine).to(tl.uint32, bitcast=True)
    second = tl.where(odd, cosine, sine).to(tl.uint32, bitcast=True)
    # The signs are bits of the quarter's number.
    first ^= ((quarter + 1) << 30) & 0x80000000
    second ^= (quarter << 30) & 0x80000000
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _distance(word):
    """The square root of -2 ln u for u = `uniform(word)`, to two units in the last place.

    ln u = ln(1 + f) + e ln 2 with 1 + f between the square roots of 1/2 and 2. The polynomial is a least-squares fit of
    (ln(1 + f) - f + f^2 / 2) / f^3 with relative error 4e-8. u is never 0, 1 or subnormal, so these need no checks.
    """
    bits = uniform(word).to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1
    z = f * f
    tail = 0.14950979 + f * (-0.14197472 + f * 0.085069537)
    tail = 0.33333972 + f * (-0.25000969 + f * (0.19960597 + f * (-0.16587949 + f * tail)))
    log = f + z * (-0.5 + f * tail)
    return tl.sqrt(tl.maximum(-2 * (log + exponent.to(tl.float32) * 0.69314718), 0))


@triton.jit
def normal(w0, w1, w2, w3):
    """Map four words to four standard normal numbers (Box-Muller)."""
    cosine, sine = _turned(w1)
    near, far = _distance(w0), _distance(w2)
    other_cosine, other_sine = _turned(w3)
    return near * cosine, near * sine, far * other_cosine, far * other_sine
