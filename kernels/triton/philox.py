"""Philox random numbers inside a Triton kernel, the same as in `synco_fast.kernels.rng`.

The words, and so all picks, match `rng.py` bit for bit. Coefficients match up to float32 rounding, normal numbers up to
the errors that the PTX ISA allows the special function unit: 2^-17, where they are 5.8 at most.
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


# The special function unit, whose accuracy the PTX ISA states. `tl.sin` and `tl.cos` would reduce arguments that never
# occur, and `tl.log2` would scale subnormal numbers.
_SINE = tl.constexpr("sin.approx.ftz.f32 $0, $1;")
_COSINE = tl.constexpr("cos.approx.ftz.f32 $0, $1;")
_LOG2 = tl.constexpr("lg2.approx.ftz.f32 $0, $1;")


@triton.jit
def _unit(word):
    """1 + n / 2^23 for the upper 23 bits n of a word, of which `uniform` makes (n + 1/2) / 2^23."""
    return ((word >> 9) + 0x3F800000).to(tl.float32, bitcast=True)


@triton.jit
def _turned(word, DEVICE: tl.constexpr):
    """Cosine and sine of 2 pi u - pi for u = `uniform(word)`, on a device to 2^-20."""
    # 2^-24 turns more, which are not representable beside 1.5.
    x = (_unit(word) - 1.5) * 6.2831855 + 3.7450703e-7
    if DEVICE:
        cosine = tl.inline_asm_elementwise(_COSINE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
        sine = tl.inline_asm_elementwise(_SINE, "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        cosine, sine = tl.cos(x), tl.sin(x)
    return cosine, sine


@triton.jit
def _distance(word, SIGMA: tl.constexpr, DEVICE: tl.constexpr):
    """|SIGMA| times the square root of -2 ln u for u = `uniform(word)`, on a device to |SIGMA| 2^-19.

    The logarithm is exact to 2^-22, which is too little for u near 1, where the root is steep. There a series serves.
    """
    u = _unit(word) - 0.99999994
    if DEVICE:
        log = tl.inline_asm_elementwise(_LOG2, "=f,f", [u], dtype=tl.float32, is_pure=True, pack=1)
    else:
        log = tl.log2(u)
    below = 1 - u
    square: tl.constexpr = SIGMA * SIGMA
    series = below * (2 * square + below * (square + below * (square * 0.6666667)))
    return tl.sqrt(tl.where(below < 0.015625, series, log * (square * -1.3862944)))


@triton.jit
def normal(w0, w1, w2, w3, SIGMA: tl.constexpr, DEVICE: tl.constexpr):
    """Map four words to four normal numbers of deviation SIGMA (Box-Muller). DEVICE: not in the interpreter."""
    cosine, sine = _turned(w1, DEVICE)
    near, far = _distance(w0, SIGMA, DEVICE), _distance(w2, SIGMA, DEVICE)
    # The angle is half a turn off.
    if SIGMA > 0:
        near, far = -near, -far
    other_cosine, other_sine = _turned(w3, DEVICE)
    return near * cosine, near * sine, far * other_cosine, far * other_sine
