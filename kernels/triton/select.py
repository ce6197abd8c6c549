"""Step three: from what the scan found of a row to its N hardest keys, in the order of the queue.

The scan has left a row's candidates in segments, one for each split, every segment in the order of the queue. `select`
bisects the order-preserving integers of their similarities until exactly N reach the middle, or until the N-th largest
is known and ties with it are left to settle (the smallest indices are taken), and stores the chosen ones side by side.
No sort is needed, since Q^N is ordered by queue index.

A row is flagged for the slow path (`full_select.py`) instead where too few candidates were found, more than there is
room for in registers, or more in one segment than there is room for in memory.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["ordered", "select"]


@triton.jit
def ordered(similarity):
    """Float32 numbers as int32 in the numbers' order: NaN is the largest, -0 equals 0, none is -2^31."""
    bits = (similarity + 0.0).to(tl.int32, bitcast=True)
    return tl.where(similarity == similarity, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit(do_not_specialize=["K", "N"])
def select(
    p_found,
    p_count,
    p_place,
    p_threshold,
    p_available,
    p_hard_index,
    p_hard,
    p_flag,
    K,
    N,
    splits,
    room,
    SPLITS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Grid (B,). Writes Q^N as indices and similarities, (B, N) each, and a flag where it does not count.

    found is (B, room) int64, similarity above index, SEGMENT places for each split; count is (B, splits); place,
    (B, CAPACITY) int32, is room to work in. Places of Q^N beyond the keys that a row may use get -inf and index 0.
    """
    row = tl.program_id(0).to(tl.int64)
    available = K
    if MASKED:
        available = tl.load(p_available + row)
    needed = tl.minimum(available, N)
    o_split = tl.arange(0, SPLITS)
    b_count = tl.load(p_count + row * splits + o_split, o_split < splits, 0)
    total = tl.sum(b_count)
    longest = tl.max(b_count)
    flag = (total < needed) | (total > CAPACITY) | (longest > SEGMENT)
    tl.store(p_flag + row, flag.to(tl.int32))
    if flag == 0:
        WIDE: tl.constexpr = CAPACITY // SPLITS
        o_all = tl.arange(0, CAPACITY)
        o_slot = tl.arange(0, WIDE)
        o_from = (o_all // WIDE) * SEGMENT + o_all % WIDE
        m_all = tl.reshape(o_slot[None, :] < b_count[:, None], [CAPACITY])
        if longest > WIDE:
            # Too uneven for one rectangle: the places that are taken, side by side.
            p_mine = p_place + row * CAPACITY
            b_before = tl.cumsum(b_count, 0) - b_count
            for start in range(0, longest, WIDE):
                o_here = start + o_slot
                o_to = b_before[:, None] + o_here[None, :]
                b_from = o_split[:, None] * SEGMENT + o_here[None, :]
                tl.store(p_mine + o_to, b_from, o_here[None, :] < b_count[:, None])
            tl.debug_barrier()
            m_all = o_all < total
            o_from = tl.load(p_mine + o_all, m_all, 0)
        b_found = tl.load(p_found + row * room + o_from, m_all, 0)
        b_index = (b_found & 0xFFFFFFFF).to(tl.int32)
        b_similarity = (b_found >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        b_order = tl.where(m_all, ordered(b_similarity), -(2**31))

        # At least `needed` numbers reach low, `reached` of them, and fewer reach high + 1; int64 cannot overflow.
        low, high = ordered(tl.load(p_threshold + row)).to(tl.int64), tl.max(b_order).to(tl.int64)
        reached = total
        while (low < high) & (reached != needed):
            middle = (low + high + 1) >> 1
            count = tl.sum((b_order >= middle.to(tl.int32)).to(tl.int32))
            enough = count >= needed
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, count, reached)
            high = tl.where(enough, high, middle - 1)
        last = low.to(tl.int32)
        b_chosen = (b_order >= last).to(tl.int32)
        if reached != needed:
            b_tie = (b_order == last).to(tl.int32)
            spare = reached - needed
            tied = tl.sum(b_tie)
            b_chosen = tl.where((b_tie == 1) & (tl.cumsum(b_tie, 0) > tied - spare), 0, b_chosen)
        o_to = row * N + tl.cumsum(b_chosen, 0) - 1
        tl.store(p_hard_index + o_to, b_index, b_chosen == 1)
        tl.store(p_hard + o_to, b_similarity, b_chosen == 1)
        if MASKED:
            m_beyond = (o_all >= needed) & (o_all < N)
            tl.store(p_hard_index + row * N + o_all, 0, m_beyond)
            tl.store(p_hard + row * N + o_all, float("-inf"), m_beyond)
