"""Synthetic negatives without noise and sign, by tensor cores.

For x = a q + b n_i + c n_j the selection has q.n_i and q.n_j, so

    |x|^2 = a^2 |q|^2 + b^2 |n_i|^2 + c^2 |n_j|^2 + 2 (a b q.n_i + a c q.n_j + b c n_i.n_j)

lacks only products of keys. With the keys of a block of slots as the rows of matrices, these are the diagonals of
products of matrices. Tensor cores take fewer instructions for all of such a product than other units take for its
diagonal. The sum of the weighted keys is a product of matrices too. A weight is the sum of two bfloat16 numbers to one
part in 2^17, in two of the 16 rows that a matrix has; the other rows are 0.

Slots whose terms of |x|^2 cancel add nothing and are marked: their similarity is written as inf. `mix` forms their x.
"""

# mypy: disable-error-code="assignment, misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.draws import first_of, read_all, share, slots_of

__all__ = ["MARK", "sum_by_products", "weigh"]

#: |x|^2 counts as cancelled below this fraction of the sum of its squared terms, as in `mixing.py`.
_CANCELLED = tl.constexpr(0.1)
#: What is written as the similarity of a slot whose terms cancel.
MARK = tl.constexpr(float("inf"))
#: Slots of a block, as many as a matrix of a tensor core has rows.
_BLOCK = tl.constexpr(16)


@triton.jit
def weigh(own, double, inner, m_slot, shift, scale):
    """Similarities and weights of slots without their x.

    Args:
        own: The squared terms of |x|^2.
        double: Half of its other terms.
        inner: q.x.

    Returns:
        q.s, or MARK where the terms cancel; exp((q.s - m) / T) / |x|, or 0 where they cancel or there is no slot; and
        where they cancel.
    """
    length = own + 2 * double
    cancelled = m_slot & (length < own * _CANCELLED)
    inverse = tl.rsqrt(tl.maximum(length, 1e-24))
    similarity = inner * inverse
    weight = tl.where(m_slot & (cancelled == 0), tl.exp2(similarity * scale - shift) * inverse, 0)
    return tl.where(cancelled, MARK, similarity), weight, cancelled


@triton.constexpr_function
def _has_query(TABLE, FIRST, LAST):
    """Whether q is a term of one of the families FIRST to LAST - 1."""
    return any(row[4] or row[5] for row in TABLE[FIRST:LAST])


@triton.jit
def _keys(p_queue, key, D: tl.constexpr, DIM: tl.constexpr, DEVICE: tl.constexpr):
    """The keys of a block, (_BLOCK, DIM)."""
    o_dim = tl.arange(0, DIM)
    n = tl.load(p_queue + key.to(tl.int64)[:, None] * D + o_dim[None, :], (o_dim < D)[None, :], 0)
    # The interpreter cannot multiply bfloat16.
    return n if DEVICE else n.to(tl.float32)


@triton.jit
def _diagonal(n, other):
    """Inner products of the rows of two matrices, (_BLOCK,)."""
    o_slot = tl.arange(0, _BLOCK)
    return tl.sum(
        tl.where(o_slot[:, None] == o_slot[None, :], tl.dot(n, tl.trans(other), input_precision="ieee"), 0), axis=1
    )


@triton.jit
def _add(total, weight, n):
    """``total`` plus the weighted keys, in its rows 0 and 8."""
    high = weight.to(n.dtype)
    low = (weight - high.to(tl.float32)).to(n.dtype)
    o_row = tl.arange(0, _BLOCK)[:, None]
    both = tl.where(o_row == 0, high[None, :], tl.where(o_row == 8, low[None, :], 0.0).to(n.dtype))
    return tl.dot(both, n, total, input_precision="ieee")


@triton.jit
def _families(
    p_queue,
    p_drawn,
    p_similarity,
    squared,
    shift,
    scale,
    part,
    total,
    b_along,
    b_marked,
    TABLE: tl.constexpr,
    FIRST: tl.constexpr,
    LAST: tl.constexpr,
    PAIRED: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Add the slots of the families FIRST to LAST - 1, all paired or none, to the sums of `sum_by_products`."""
    p_drawn += 4 * share(TABLE, PARTS, FIRST)
    for start in tl.range(0, share(TABLE, PARTS, LAST) - share(TABLE, PARTS, FIRST), _BLOCK, num_stages=STAGES):
        o_own = start + tl.arange(0, _BLOCK)
        o_slot, m_slot = slots_of(o_own, part, TABLE, PARTS, FIRST, LAST)
        key, b, a, known = read_all(p_drawn, o_own, m_slot)
        n = _keys(p_queue, key, D, DIM, DEVICE)
        own = b * b * _diagonal(n, n)
        double = tl.zeros_like(own)
        inner = b * known
        if PAIRED:
            other_key, c, _, other_known = read_all(p_drawn + 4 * WIDTH, o_own, m_slot)
            other = _keys(p_queue, other_key, D, DIM, DEVICE)
            own += c * c * _diagonal(other, other)
            double += b * c * _diagonal(n, other)
            inner += c * other_known
        if _has_query(TABLE, FIRST, LAST):
            own += a * a * squared
            double += a * inner
            inner += a * squared
        similarity, weight, cancelled = weigh(own, double, inner, m_slot, shift, scale)
        b_marked += cancelled.to(tl.int32)
        if _has_query(TABLE, FIRST, LAST):
            b_along += weight * a
        total = _add(total, weight * b, n)
        if PAIRED:
            total = _add(total, weight * c, other)
        tl.store(p_similarity + o_slot, similarity, m_slot)
    return total, b_along, b_marked


@triton.jit
def sum_by_products(
    p_queue,
    p_drawn,
    p_total,
    p_similarity,
    squared,
    shift,
    scale,
    part,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Sum a part's families without noise and sign, but for marked slots.

    Writes the sum of the weighted keys, (D,) float32, and the similarities.

    Args:
        squared: |q|^2.

    Returns:
        The weight of q, and the number of marked slots.
    """
    total = tl.zeros([_BLOCK, DIM], tl.float32)
    b_along = tl.zeros([_BLOCK], tl.float32)
    b_marked = tl.zeros([_BLOCK], tl.int32)
    for kind in tl.static_range(0, 2):
        if first_of(TABLE, kind) < first_of(TABLE, kind + 1):
            total, b_along, b_marked = _families(
                p_queue,
                p_drawn,
                p_similarity,
                squared,
                shift,
                scale,
                part,
                total,
                b_along,
                b_marked,
                TABLE,
                first_of(TABLE, kind),
                first_of(TABLE, kind + 1),
                kind,
                D,
                DIM,
                PARTS,
                WIDTH,
                STAGES,
                DEVICE,
            )
    # Rows 0 and 8 are in the same threads, and the other rows are 0.
    both = tl.sum(tl.reshape(total, [2, _BLOCK // 2, DIM]), axis=0)
    o_row, o_dim = tl.arange(0, _BLOCK // 2)[:, None], tl.arange(0, DIM)[None, :]
    tl.store(p_total + o_row * 0 + o_dim, both, (o_row == 0) & (o_dim < D))
    return tl.sum(b_along), tl.sum(b_marked)
