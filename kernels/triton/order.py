"""Candidates as int64, and integers in the order of float32 numbers, on which thresholds are searched."""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["NOTHING", "count_from", "ordered", "similarity_of", "unordered"]

#: A candidate that is none: a similarity of minus infinity, and index 0.
NOTHING = tl.constexpr(-(0x00800000 << 32))

#: How many of four numbers are at or above a bound. Written with comparisons and sums, ptxas takes three instructions a
#: number where these take two and a quarter.
_COUNT = tl.constexpr(
    "{ .reg .pred one, two, three, four; setp.ge.s32 one, $1, $5; setp.ge.s32 two, $2, $5; setp.ge.s32 three, $3, $5;"
    " setp.ge.s32 four, $4, $5; selp.b32 $0, 1, 0, one; @two add.u32 $0, $0, 1; @three add.u32 $0, $0, 1;"
    " @four add.u32 $0, $0, 1; }"
)


@triton.jit
def similarity_of(found):
    """The similarity of candidates, int64: it is in the high word, and the queue index in the low word."""
    return (found >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def ordered(similarity):
    """Order-preserving int32 of float32 numbers: NaN is the largest, -0 equals 0, and -2^31 never occurs."""
    bits = (similarity + 0.0).to(tl.int32, bitcast=True)
    return tl.where(similarity == similarity, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def unordered(order):
    """The float32 numbers of `ordered`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def count_from(b_order, low, DEVICE: tl.constexpr):
    """How many numbers of a tensor, of a multiple of four, are at or above ``low``."""
    if DEVICE:
        # Numbers whose places differ in the last bit or the first are in one thread, so that nothing is moved.
        QUARTER: tl.constexpr = b_order.numel // 4
        b_even, b_odd = tl.split(tl.reshape(b_order, [2 * QUARTER, 2]))
        b_one, b_two = tl.split(tl.trans(tl.reshape(b_even, [2, QUARTER])))
        b_three, b_four = tl.split(tl.trans(tl.reshape(b_odd, [2, QUARTER])))
        given = [b_one, b_two, b_three, b_four, low]
        b_count = tl.inline_asm_elementwise(_COUNT, "=r,r,r,r,r,r", given, dtype=tl.int32, is_pure=True, pack=1)
    else:
        b_count = (b_order >= low).to(tl.int32)
    return tl.sum(b_count)
