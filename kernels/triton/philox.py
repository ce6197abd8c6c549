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
        # Both halves of a product in one instruction.
        p0, p1 = c0.to(tl.uint64) * 0xD2511F53, c2.to(tl.uint64) * 0xCD9E8D57
        high0, high1 = (p0 >> 32).to(tl.uint32), (p1 >> 32).to(tl.uint32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1.to(tl.uint32), high0 ^ c3 ^ k1, p0.to(tl.uint32)
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
def _turned(word):
    """Cosine and sine of 2 pi u for u = `uniform(word)`.

    Quarter turns are taken off as whole numbers, and Taylor's polynomials serve the remaining eighth of a turn to one
    unit in the last place. The library's functions would keep a table on the stack for arguments that never occur here.
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
    # The signs are a bit of the quarter's number.
    first ^= ((quarter + 1) << 30) & 0x80000000
    second ^= (quarter << 30) & 0x80000000
    return first.to(tl.float32, bitcast=True), second.to(tl.float32, bitcast=True)


@triton.jit
def _distance(word):
    """The square root of -2 ln u for u = `uniform(word)`, to two units in the last place.

    ln u = ln(1 + f) + e ln 2 with 1 + f between the roots of 1/2 and 2; the polynomial is a least-squares fit of
    (ln(1 + f) - f + f^2 / 2) / f^3, relative error 4e-8. u is never 0, 1 or denormal, which the library allows for.
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
    """Four words as four standard normal numbers, by Box and Muller."""
    cosine, sine = _turned(w1)
    near, far = _distance(w0), _distance(w2)
    other_cosine, other_sine = _turned(w3)
    return near * cosine, near * sine, far * other_cosine, far * other_sine
