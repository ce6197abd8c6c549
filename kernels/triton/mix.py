"""Step four: the synthetic negatives.

A program takes some of a row's slots, a block at a time. It draws, picks the keys n_i and n_j of Q^N, forms

    x = a q + b n_i + c n_j + sigma e + eta sign(q),    s = x / |x|

in registers, where the sums behind |x| and q.s cost nothing beside the loads and lose no digits when x is near 0, and
adds exp((q.s - m) / T) and exp((q.s - m) / T) s to its sums. No synthetic vector is written anywhere. The description
of the negatives is compiled in: a new family of this form is a new row of the table that the launcher passes.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.philox import normal, philox, uniform

__all__ = ["mix"]


@triton.jit
def _family(
    p_queue,
    p_hard_index,
    q,
    sign,
    positive,
    shift,
    scale,
    size,
    c0,
    k0,
    k1,
    part,
    TABLE: tl.constexpr,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One family's slots of this part: sum, rank, total, sum of the similarities and how many these are."""
    NUMBER: tl.constexpr = TABLE[FAMILY][0]
    COUNT: tl.constexpr = TABLE[FAMILY][1]
    LOW: tl.constexpr = TABLE[FAMILY][2]
    HIGH: tl.constexpr = TABLE[FAMILY][3]
    A: tl.constexpr = TABLE[FAMILY][4]
    A_SLOPE: tl.constexpr = TABLE[FAMILY][5]
    FIRST: tl.constexpr = TABLE[FAMILY][6]
    FIRST_SLOPE: tl.constexpr = TABLE[FAMILY][7]
    SECOND: tl.constexpr = TABLE[FAMILY][8]
    SECOND_SLOPE: tl.constexpr = TABLE[FAMILY][9]
    SIGMA: tl.constexpr = TABLE[FAMILY][10]
    ETA: tl.constexpr = TABLE[FAMILY][11]
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    sum_p = tl.full([], 0, tl.float32)
    rank = tl.full([], 0, tl.int32)
    b_total = tl.zeros([DIM], tl.float32)
    mean = tl.full([], 0, tl.float32)
    count = tl.full([], 0, tl.float32)
    for block in range(part, (COUNT + SLOTS - 1) // SLOTS, PARTS):
        o_slot = block * SLOTS + tl.arange(0, SLOTS)
        m_slot = o_slot < COUNT
        c1 = o_slot.to(tl.uint32)
        zero = c1 * 0
        w0, w1, w2, _ = philox(c0 + zero, c1, zero + NUMBER, zero, k0, k1)
        t = LOW + (HIGH - LOW) * uniform(w0)
        pick = tl.umulhi(w1, size + zero).to(tl.int32)
        key = tl.load(p_hard_index + pick, m_slot, 0).to(tl.int64)
        m_n = m_slot[:, None] & m_dim[None, :]
        n = tl.load(p_queue + key[:, None] * D + o_dim[None, :], m_n, 0).to(tl.float32)
        x = (A + A_SLOPE * t)[:, None] * q[None, :] + (FIRST + FIRST_SLOPE * t)[:, None] * n
        if SECOND != 0 or SECOND_SLOPE != 0:
            pick = tl.umulhi(w2, size + zero).to(tl.int32)
            key = tl.load(p_hard_index + pick, m_slot, 0).to(tl.int64)
            n = tl.load(p_queue + key[:, None] * D + o_dim[None, :], m_n, 0).to(tl.float32)
            x += (SECOND + SECOND_SLOPE * t)[:, None] * n
        if ETA != 0:
            x += ETA * sign[None, :]
        if SIGMA != 0:
            lane = (1 + tl.arange(0, DIM // 4)).to(tl.uint32)
            many = zero[:, None] + lane[None, :] * 0
            w0, w1, w2, w3 = philox(many + c0, many + c1[:, None], many + NUMBER, many + lane[None, :], k0, k1)
            e0, e1, e2, e3 = normal(w0, w1, w2, w3)
            e = tl.interleave(tl.interleave(e0, e2), tl.interleave(e1, e3))
            x += tl.where(m_dim[None, :], SIGMA * e, 0)
        length = tl.maximum(tl.sqrt(tl.sum(x * x, axis=1)), 1e-12)
        s = x / length[:, None]
        similarity = tl.sum(s * q[None, :], axis=1)
        rank += tl.sum((m_slot & (similarity > positive)).to(tl.int32))
        p = tl.where(m_slot, tl.exp2(similarity * scale - shift), 0)
        sum_p += tl.sum(p)
        b_total += tl.sum(p[:, None] * s, axis=0)
        # NaN and -inf stay out of the mean, as in `mean_of_finite`.
        counted = m_slot & (similarity > float("-inf"))
        mean += tl.sum(tl.where(counted, similarity, 0))
        count += tl.sum(counted.to(tl.float32))
    return sum_p, rank, b_total, mean, count


# A seed or step of 1, or one divisible by 16, is no reason to compile again.
@triton.jit(do_not_specialize=["K", "N", "seed", "step", "first_row"])
def mix(
    p_q,
    p_queue,
    p_hard_index,
    p_positive,
    p_shift,
    p_available,
    p_step,
    p_sum,
    p_total,
    p_rank,
    p_mean,
    K,
    N,
    scale,
    seed,
    step,
    first_row,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    MASKED: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    FAMILIES: tl.constexpr,
):
    """Grid (B, PARTS).

    Writes, for its part of the row's slots: sum and rank (B, PARTS), total (B, PARTS, D), and for each family the sum
    of its similarities and how many these are, (B, PARTS, 2, FAMILIES); FAMILIES is a power of two. TABLE has a tuple
    for each family: its number, its count, the range of t, constant and slope of a, b and c, sigma, eta, its column.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    row64 = row.to(tl.int64)
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    q = tl.load(p_q + row64 * D + o_dim, m_dim, 0).to(tl.float32)
    sign = tl.where(q > 0, 1.0, tl.where(q < 0, -1.0, 0.0))
    positive = tl.load(p_positive + row)
    shift = tl.load(p_shift + row) * scale
    available = K
    if MASKED:
        available = tl.load(p_available + row)
    size = tl.minimum(available, N).to(tl.uint32)
    if STEP_ON_DEVICE:
        step = tl.load(p_step)
    k0, k1 = seed.to(tl.uint32), step.to(tl.uint32)
    c0 = (first_row + row).to(tl.uint32)

    sum_p = tl.full([], 0, tl.float32)
    rank = tl.full([], 0, tl.int32)
    b_total = tl.zeros([DIM], tl.float32)
    o_family = tl.arange(0, FAMILIES)
    b_mean = tl.zeros([FAMILIES], tl.float32)
    b_count = tl.zeros([FAMILIES], tl.float32)
    if available > 0:
        for family in tl.static_range(0, len(TABLE)):
            found = _family(
                p_queue,
                p_hard_index + row64 * N,
                q,
                sign,
                positive,
                shift,
                scale,
                size,
                c0,
                k0,
                k1,
                part,
                TABLE,
                family,
                D,
                DIM,
                SLOTS,
                PARTS,
            )
            sum_p += found[0]
            rank += found[1]
            b_total += found[2]
            here = o_family == TABLE[family][12]
            b_mean += tl.where(here, found[3], 0)
            b_count += tl.where(here, found[4], 0)
    o_part = row64 * PARTS + part
    tl.store(p_sum + o_part, sum_p)
    tl.store(p_rank + o_part, rank)
    tl.store(p_total + o_part * D + o_dim, b_total, m_dim)
    tl.store(p_mean + o_part * 2 * FAMILIES + o_family, b_mean)
    tl.store(p_mean + (o_part * 2 + 1) * FAMILIES + o_family, b_count)
