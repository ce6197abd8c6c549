"""Integer arithmetic and operations on bits, as PTX defines them, on NumPy arrays or numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

__all__ = ["bfe", "bfi", "brev", "clz", "divided", "funnel", "high", "lop3", "prmt", "shifted"]


def high(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    if a.dtype.itemsize == 4:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(32)).astype(a.dtype)
    exact = np.asarray(a).astype(object) * np.asarray(b).astype(object)
    return np.asarray(exact >> 64 & (1 << 64) - 1).astype(np.uint64).view(a.dtype)


def divided(a: Any, b: Any) -> Any:
    """Quotient of integers, toward zero."""
    zero = b == 0
    safe = np.where(zero, b.dtype.type(1), b)
    found = a // safe
    if a.dtype.kind == "i":
        found = found + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(zero, np.asarray(-1).astype(a.dtype), found).astype(a.dtype)


def shifted(name: str, a: Any, b: Any) -> Any:
    bits = a.dtype.itemsize * 8
    if isinstance(b, np.generic) and b < bits:
        shift = a.dtype.type(b)
        return a << shift if name == "shl" else a >> shift
    most = np.minimum(b, np.uint32(bits - 1)).astype(a.dtype)
    if name == "shl":
        return np.where(b >= bits, a.dtype.type(0), a << most)
    return a >> most if a.dtype.kind == "i" else np.where(b >= bits, a.dtype.type(0), a >> most)


def _extracted(a: Any, begin: Any, count: Any) -> Any:
    bits = a.dtype.itemsize * 8
    begin, count = np.broadcast_arrays(begin & np.uint32(255), count & np.uint32(255), a)[:2]
    begin, count = begin.astype(np.int64), count.astype(np.int64)
    wide = a.astype(np.int64) if bits == 32 else a
    unsigned = (a.view(np.uint32).astype(np.uint64) if bits == 32 else a.view(np.uint64)).astype(object)
    found = np.array(
        [
            _field(int(one), bits, int(low), int(many), a.dtype.kind == "i")
            for one, low, many in zip(np.broadcast_to(unsigned, wide.shape), begin, count, strict=True)
        ],
        np.uint64,
    )
    return found.astype(np.uint32).view(a.dtype) if bits == 32 else found.view(a.dtype)


def _field(value: int, bits: int, low: int, many: int, signed: bool) -> int:
    found = value >> low & (1 << many) - 1
    if signed and many:
        top = value >> min(low + many - 1, bits - 1) & 1
        if top:
            found |= (1 << bits) - 1 & ~((1 << max(0, min(many, bits - low))) - 1)
    return found


def bfe(a: Any, begin: Any, count: Any) -> Any:
    bits = a.dtype.itemsize * 8
    if isinstance(begin, np.generic) and isinstance(count, np.generic) and count > 0 and begin + count <= bits:
        left, right = a.dtype.type(bits - int(begin) - int(count)), a.dtype.type(bits - int(count))
        return a << left >> right
    return _extracted(a, begin, count)


def bfi(a: Any, b: Any, begin: Any, count: Any) -> Any:
    kind = a.dtype.type if isinstance(a, np.generic) else b.dtype.type
    bits = np.dtype(kind).itemsize * 8
    low, many = (np.minimum(x & np.uint32(255), np.uint32(bits)).astype(np.uint64) for x in (begin, count))
    mask = np.where(many >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(many, np.uint64(63))) - np.uint64(1))
    low = np.minimum(low, np.uint64(63))
    mask = (mask << low).astype(kind)
    return (b & ~mask) | ((a.astype(np.uint64) << low).astype(kind) & mask)


def prmt(a: Any, b: Any, selector: Any) -> Any:
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    found: Any = np.uint32(0)
    for place in range(4):
        pick = selector >> np.uint32(4 * place) & np.uint32(15)
        byte = both >> (pick & np.uint32(7)).astype(np.uint64) * np.uint64(8) & np.uint64(255)
        byte = np.where(pick & np.uint32(8), (byte >> np.uint64(7)) * np.uint64(255), byte)
        found = found | byte.astype(np.uint32) << np.uint32(8 * place)
    return found


def lop3(a: Any, b: Any, c: Any, table: Any) -> Any:
    found: Any = np.uint32(0)
    for row in range(8):
        if int(table) >> row & 1:
            parts = (x if row & bit else ~x for x, bit in ((a, 4), (b, 2), (c, 1)))
            term: Any = np.uint32(0xFFFFFFFF)
            for part in parts:
                term = term & part
            found = found | term
    return found


def funnel(left: bool, wrap: bool) -> Callable[[Any, Any, Any], Any]:
    def of(a: Any, b: Any, c: Any) -> Any:
        shift = (c & np.uint32(31) if wrap else np.minimum(c, np.uint32(32))).astype(np.uint64)
        both = b.astype(np.uint64) << np.uint64(32) | a.astype(np.uint64)
        found = both << shift >> np.uint64(32) if left else both >> shift
        return found.astype(np.uint32)

    return of


def clz(a: Any) -> Any:
    return (np.uint32(32) - np.ceil(np.log2(a.astype(np.float64) + 1)).astype(np.uint32)).astype(np.uint32)


def brev(a: Any) -> Any:
    found: Any = np.uint32(0)
    for bit in range(32):
        found = found | (a >> np.uint32(bit) & np.uint32(1)) << np.uint32(31 - bit)
    return found
