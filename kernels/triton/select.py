"""Step three: from the marks of a row to its N hardest keys, in order.

`collect` turns the marked bits into queue indices, `score` computes their similarities in float32 and `order` sorts
them by (similarity descending, index ascending). A row is flagged for the slow path (`full_sort.py`) instead where too
few or too many keys were marked, or where the N-th is so close to the threshold that the rounding of the scan's
similarity, which made the mark, could matter.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["collect", "order", "score", "sortable"]


@triton.jit
def ordered(similarity):
    """Float32 numbers as int32 in the numbers' order: NaN is the largest, -0 equals 0, none is -2^31."""
    bits = (similarity + 0.0).to(tl.int32, bitcast=True)
    return tl.where(similarity == similarity, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def sortable(similarity, index):
    """One int64 that sorts descending by similarity, then ascending by index; NaN comes first, -0 equals 0."""
    return (ordered(similarity).to(tl.int64) << 32) | (0xFFFFFFFF - index.to(tl.int64))


@triton.jit
def unsorted(key):
    """The similarity and the index that `sortable` packed."""
    ordered = (key >> 32).to(tl.int32)
    similarity = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return similarity, (0xFFFFFFFF - (key & 0xFFFFFFFF)).to(tl.int32)


@triton.jit
def collect(p_marks, p_index, p_count, words, CAPACITY: tl.constexpr, BITS: tl.constexpr):
    """Grid (B,). Writes the marked queue indices in ascending order, (B, CAPACITY), and how many are marked, (B,).

    The count goes on past the capacity: a row with more is known, not cut short.
    """
    row = tl.program_id(0).to(tl.int64)
    count = tl.full([], 0, tl.int32)
    for start in range(0, words * 32, BITS):
        o_bit = start + tl.arange(0, BITS)
        b_word = tl.load(p_marks + row * words + o_bit // 32, o_bit < words * 32, 0)
        marked = (b_word >> (o_bit % 32)) & 1
        place = count + tl.cumsum(marked, 0) - 1
        tl.store(p_index + row * CAPACITY + place, o_bit, (marked == 1) & (place < CAPACITY))
        count += tl.sum(marked)
    tl.store(p_count + row, count)


@triton.jit
def score(
    p_q,
    p_queue,
    p_index,
    p_count,
    p_similarity,
    D: tl.constexpr,
    DIM: tl.constexpr,
    CAPACITY: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (B, key blocks). Writes the similarity of each collected key, (B, CAPACITY)."""
    row = tl.program_id(0).to(tl.int64)
    count = tl.minimum(tl.load(p_count + row), CAPACITY)
    start = tl.program_id(1) * KEYS
    if start < count:
        o_place = start + tl.arange(0, KEYS)
        m_place = o_place < count
        o_dim = tl.arange(0, DIM)
        m_dim = o_dim < D
        q = tl.load(p_q + row * D + o_dim, m_dim, 0).to(tl.float32)
        index = tl.load(p_index + row * CAPACITY + o_place, m_place, 0).to(tl.int64)
        n = tl.load(p_queue + index[:, None] * D + o_dim[None, :], m_place[:, None] & m_dim[None, :], 0)
        similarity = tl.sum(n.to(tl.float32) * q[None, :], axis=1)
        tl.store(p_similarity + row * CAPACITY + o_place, similarity, m_place)


@triton.jit(do_not_specialize=["K", "N"])
def order(
    p_index,
    p_count,
    p_similarity,
    p_threshold,
    p_shift,
    p_available,
    p_hard_index,
    p_hard,
    p_flag,
    K,
    N,
    CAPACITY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Grid (B,). Writes Q^N as indices and similarities, (B, N) each, and a flag where it does not count."""
    row = tl.program_id(0).to(tl.int64)
    available = K
    if MASKED:
        available = tl.load(p_available + row)
    count = tl.load(p_count + row)
    threshold = tl.load(p_threshold + row)
    needed = tl.minimum(available, N)
    flag = (count < needed) | (count > CAPACITY)
    if flag == 0:
        o_place = tl.arange(0, CAPACITY)
        m_place = o_place < count
        similarity = tl.load(p_similarity + row * CAPACITY + o_place, m_place, float("-inf"))
        index = tl.load(p_index + row * CAPACITY + o_place, m_place, 0)
        key = tl.where(m_place, sortable(similarity, index), -0x8000000000000000)
        key = tl.sort(key, descending=True)
        similarity, index = unsorted(key)
        similarity = tl.where(m_place, similarity, float("-inf"))
        index = tl.where(m_place, index, 0)
        tl.store(p_hard + row * N + o_place, similarity, o_place < N)
        tl.store(p_hard_index + row * N + o_place, index, o_place < N)
        last = tl.sum(tl.where(o_place == needed - 1, similarity, 0))
        margin = 6.103515625e-05 * tl.maximum(1, tl.load(p_shift + row))
        flag = (count < available) & (last <= threshold + margin)
    tl.store(p_flag + row, flag.to(tl.int32))
