"""Step five: the shares of all programs added up, in a fixed order, to the loss and its gradient.

With E = exp((q.k - m) / T) and R, V the sums of exp((s - m) / T) and of exp((s - m) / T) s over all negatives s,

    loss = log(E + R) + (m - q.k) / T,    d loss / d q = (V - R k) / ((E + R) T).
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["reduce"]


@triton.jit
def reduce(
    p_k,
    p_positive,
    p_shift,
    p_scan_sum,
    p_scan_total,
    p_scan_rank,
    p_mix_sum,
    p_mix_total,
    p_mix_rank,
    p_mix_mean,
    p_hard,
    p_loss,
    p_gradient,
    p_hard_mean,
    p_synthetic,
    p_rank,
    p_queue_rank,
    B,
    N,
    temperature,
    D: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    FAMILIES: tl.constexpr,
):
    """Grid (B,). Writes what the operator returns; PARTS is 0 where there are no synthetic negatives.

    COLUMNS is how many families there are, FAMILIES the same rounded up to a power of two.
    """
    row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    STEP: tl.constexpr = 8 if DIM < 128 else 512 // DIM
    b_total = tl.zeros([DIM], tl.float32)
    total_sum = tl.full([], 0, tl.float32)
    queue_rank = tl.full([], 0, tl.int32)
    for start in range(0, SPLITS, STEP):
        o_split = (start + tl.arange(0, STEP)).to(tl.int64)
        m_split = o_split < SPLITS
        o_part = o_split * B + row
        total_sum += tl.sum(tl.load(p_scan_sum + o_part, m_split, 0))
        queue_rank += tl.sum(tl.load(p_scan_rank + o_part, m_split, 0))
        m_total = m_split[:, None] & m_dim[None, :]
        b_total += tl.sum(tl.load(p_scan_total + o_part[:, None] * D + o_dim[None, :], m_total, 0), axis=0)
    rank = queue_rank
    o_family = tl.arange(0, FAMILIES)
    b_mean = tl.zeros([FAMILIES], tl.float32)
    b_count = tl.zeros([FAMILIES], tl.float32)
    for start in range(0, PARTS, STEP):
        o_mine = start + tl.arange(0, STEP)
        m_part = o_mine < PARTS
        o_part = row * PARTS + o_mine
        total_sum += tl.sum(tl.load(p_mix_sum + o_part, m_part, 0))
        rank += tl.sum(tl.load(p_mix_rank + o_part, m_part, 0))
        m_total = m_part[:, None] & m_dim[None, :]
        b_total += tl.sum(tl.load(p_mix_total + o_part[:, None] * D + o_dim[None, :], m_total, 0), axis=0)
        o_mean = o_part[:, None] * 2 * FAMILIES + o_family[None, :]
        m_mean = m_part[:, None] & (o_family < FAMILIES)[None, :]
        b_mean += tl.sum(tl.load(p_mix_mean + o_mean, m_mean, 0), axis=0)
        b_count += tl.sum(tl.load(p_mix_mean + o_mean + FAMILIES, m_mean, 0), axis=0)
    # 0 / 0 is the NaN of a family without negatives.
    tl.store(p_synthetic + row * COLUMNS + o_family, b_mean / b_count, o_family < COLUMNS)

    hard_sum = tl.full([], 0, tl.float32)
    hard_count = tl.full([], 0, tl.float32)
    if HARD:
        for start in range(0, N, BLOCK):
            o_place = start + tl.arange(0, BLOCK)
            hard = tl.load(p_hard + row * N + o_place, o_place < N, float("-inf"))
            counted = hard > float("-inf")
            hard_sum += tl.sum(tl.where(counted, hard, 0))
            hard_count += tl.sum(counted.to(tl.float32))
    tl.store(p_hard_mean + row, hard_sum / hard_count)

    positive = tl.load(p_positive + row)
    below = (positive - tl.load(p_shift + row)) / temperature
    everything = tl.exp(below) + total_sum
    tl.store(p_loss + row, tl.log(everything) - below)
    k = tl.load(p_k + row * D + o_dim, m_dim, 0).to(tl.float32)
    tl.store(p_gradient + row * D + o_dim, (b_total - total_sum * k) / (everything * temperature), m_dim)
    tl.store(p_rank + row, rank.to(tl.int64))
    tl.store(p_queue_rank + row, queue_rank.to(tl.int64))
