"""Integers in the order of float32 numbers, on which thresholds are searched."""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ordered", "unordered"]


@triton.jit
def ordered(similarity):
    """Order-preserving int32 of float32 numbers: NaN is the largest, -0 equals 0, and -2^31 never occurs."""
    bits = (similarity + 0.0).to(tl.int32, bitcast=True)
    return tl.where(similarity == similarity, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def unordered(order):
    """The float32 numbers of `ordered`."""
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
