"""Step 5, reduce: adds the partial sums of all programs in a fixed order, and computes the loss and its gradient.

With E = exp((q.k - m) / T) and R, V the sums of exp((s - m) / T) and of exp((s - m) / T) s over all negatives s,

    loss = log(E + R) + (m - q.k) / T,    d loss / d q = (V - R k) / ((E + R) T).
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.mix import before
from synco_fast.kernels.triton.overlap import begin

__all__ = ["reduce"]


@triton.jit
def _four(a0, a1, a2, a3, b0, b1, b2, b3):
    """Combine four sums in one reduction, so that warps exchange data once."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _two(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _finite(b_similarity):
    """Similarities with 0 for non-finite ones, and 1 for each finite one, as `mean_of_finite` needs them."""
    finite = b_similarity > float("-inf")
    return tl.where(finite, b_similarity, 0), finite.to(tl.int32)


@triton.jit
def _mean(p_similarity, count, BLOCK: tl.constexpr):
    """The mean of the finite similarities; NaN (0 / 0) if there are none."""
    b_sum = tl.zeros([BLOCK], tl.float32)
    b_count = tl.zeros([BLOCK], tl.int32)
    for start in range(0, count, BLOCK):
        o_slot = start + tl.arange(0, BLOCK)
        finite, one = _finite(tl.load(p_similarity + o_slot, o_slot < count, float("-inf")))
        b_sum += finite
        b_count += one
    total, many = tl.reduce((b_sum, b_count), 0, _two)
    return total / many.to(tl.float32)


@triton.constexpr_function
def largest(COUNTS):
    """The largest number of synthetic negatives in one family."""
    return max(row[1] for row in COUNTS)


@triton.jit
def _families(p_similarity, positive, shift, scale, COUNTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics of all synthetic negatives of a row.

    Returns the sum of exp((s - m) / T), the number of similarities above the positive, and the mean of each family,
    (WIDTH,). Families are the rows of one tensor, so one reduction serves them all.
    """
    o_column = tl.arange(0, WIDTH)
    first = o_column * 0
    count = o_column * 0
    for family in tl.static_range(0, len(COUNTS)):
        here = o_column == COUNTS[family][0]
        first = tl.where(here, before(COUNTS, family), first)
        count = tl.where(here, COUNTS[family][1], count)
    b_sum = tl.zeros([WIDTH, BLOCK], tl.float32)
    b_rank = tl.zeros([WIDTH, BLOCK], tl.int32)
    b_finite = tl.zeros([WIDTH, BLOCK], tl.float32)
    b_count = tl.zeros([WIDTH, BLOCK], tl.int32)
    for start in range(0, largest(COUNTS), BLOCK):
        o_slot = start + tl.arange(0, BLOCK)[None, :]
        m_slot = o_slot < count[:, None]
        b_similarity = tl.load(p_similarity + first[:, None] + o_slot, m_slot, float("-inf"))
        finite, one = _finite(b_similarity)
        b_sum += tl.exp2((b_similarity - shift) * scale)
        b_rank += (b_similarity > positive).to(tl.int32)
        b_finite += finite
        b_count += one
    own_sum, own_rank, finite, many = tl.reduce((b_sum, b_rank, b_finite, b_count), 1, _four)
    return tl.sum(own_sum), tl.sum(own_rank), finite / many.to(tl.float32)


@triton.jit
def reduce(
    p_k,
    p_positive,
    p_shift,
    p_scan_sum,
    p_scan_total,
    p_scan_rank,
    p_mix_total,
    p_similarity,
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
    scale,
    COUNTS: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    PARTS: tl.constexpr,
    HARD: tl.constexpr,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    WIDTH: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (B,). Writes the outputs of the operator. STEP splits are read at a time; scale is log2(e) / T.

    COUNTS holds the column and the count of each active family, in the order of their similarities. PARTS is 0 without
    synthetic negatives. COLUMNS is the number of families, and WIDTH the power of two that covers it.
    """
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    b_total = tl.zeros([DIM], tl.float32)
    total_sum = tl.full([], 0, tl.float32)
    queue_rank = tl.full([], 0, tl.int32)
    for start in tl.static_range(0, SPLITS, STEP):
        o_split = (start + tl.arange(0, STEP)).to(tl.int64)
        m_split = o_split < SPLITS
        o_part = o_split * B + row
        total_sum += tl.sum(tl.load(p_scan_sum + o_part, m_split, 0))
        queue_rank += tl.sum(tl.load(p_scan_rank + o_part, m_split, 0))
        m_total = m_split[:, None] & m_dim[None, :]
        b_total += tl.sum(tl.load(p_scan_total + o_part[:, None] * D + o_dim[None, :], m_total, 0), axis=0)
    rank = queue_rank
    positive = tl.load(p_positive + row)
    shift = tl.load(p_shift + row)
    if PARTS:
        o_part = tl.arange(0, PARTS)
        o_total = (row * PARTS + o_part)[:, None] * D + o_dim[None, :]
        b_total += tl.sum(tl.load(p_mix_total + o_total, m_dim[None, :], 0), axis=0)
    o_family = tl.arange(0, WIDTH)
    b_mean = tl.full([WIDTH], float("nan"), tl.float32)
    if PARTS:
        p_similarity += row * before(COUNTS, len(COUNTS))
        own_sum, own_rank, b_mean = _families(p_similarity, positive, shift, scale, COUNTS, WIDTH, BLOCK)
        total_sum += own_sum
        rank += own_rank
    tl.store(p_synthetic + row * COLUMNS + o_family, b_mean, o_family < COLUMNS)
    if HARD:
        tl.store(p_hard_mean + row, _mean(p_hard + row * N, N, WIDTH * BLOCK // 2))
    else:
        tl.store(p_hard_mean + row, float("nan"))

    below = (positive - shift) / temperature
    everything = tl.exp(below) + total_sum
    tl.store(p_loss + row, tl.log(everything) - below)
    k = tl.load(p_k + row * D + o_dim, m_dim, 0).to(tl.float32)
    tl.store(p_gradient + row * D + o_dim, (b_total - total_sum * k) / (everything * temperature), m_dim)
    tl.store(p_rank + row, rank.to(tl.int64))
    tl.store(p_queue_rank + row, queue_rank.to(tl.int64))
