"""Step 5, reduce: adds the partial sums of all programs in a fixed order, and computes the loss and its gradient.

With E = exp((q.k - m) / T) and R, V the sums of exp((s - m) / T) and of exp((s - m) / T) s over all negatives s,

    loss = log(E + R) + (m - q.k) / T,    d loss / d q = (V - R k) / ((E + R) T).
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.draws import before
from synco_fast.kernels.triton.order import NOTHING, similarity_of
from synco_fast.kernels.triton.overlap import begin, release
from synco_fast.kernels.triton.scan import add_splits, two

__all__ = ["reduce"]


@triton.jit
def _four(a0, a1, a2, a3, b0, b1, b2, b3):
    """Combine four sums in one reduction, so that warps exchange data once."""
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _finite(b_similarity):
    """Similarities with 0 for non-finite ones, and 1 for each finite one, as `mean_of_finite` needs them."""
    finite = b_similarity > float("-inf")
    return tl.where(finite, b_similarity, 0), finite.to(tl.int32)


@triton.jit
def _hard(b_first, p_hard, count, BLOCK: tl.constexpr):
    """Sum of the finite similarities of Q^N, and how many there are. ``b_first`` has the first BLOCK of its keys."""
    b_sum, b_count = _finite(similarity_of(b_first))
    for start in range(BLOCK, count, BLOCK):
        o_slot = start + tl.arange(0, BLOCK)
        finite, one = _finite(similarity_of(tl.load(p_hard + o_slot, o_slot < count, NOTHING)))
        b_sum += finite
        b_count += one
    return tl.reduce((b_sum, b_count), 0, two)


@triton.constexpr_function
def largest(COUNTS):
    """The largest number of synthetic negatives in one family."""
    return max(row[1] for row in COUNTS)


@triton.jit
def _families(p_similarity, positive, shift, scale, COUNTS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Statistics of all synthetic negatives of a row, by thread, (WIDTH, BLOCK) each. Row i has those of family i.

    Returns sums of exp((s - m) / T), counts of similarities above the positive, sums of the finite similarities, and
    how many are finite.
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
    return b_sum, b_rank, b_finite, b_count


@triton.jit
def reduce(
    p_k,
    p_positive,
    p_shift,
    p_scan_sum,
    p_scan_rank,
    p_scan_total,
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

    SPLITS is 1 where `select` has added up the splits of the scan.

    COUNTS holds the column and the count of each active family, in the order of their similarities. PARTS is 0 without
    synthetic negatives. COLUMNS is the number of families, and WIDTH the power of two that covers it.
    """
    row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    if PARTS == 0:
        begin(OVERLAP)
    # First everything is read, then added up between threads. No read starts before a barrier that stands above it, so
    # in another order the program waits for memory many times.
    positive = tl.load(p_positive + row, cache_modifier=".cg")
    shift = tl.load(p_shift + row, cache_modifier=".cg")
    k = tl.load(p_k + row * D + o_dim, m_dim, 0)
    if HARD:
        p_hard += row * N
        o_slot = tl.arange(0, WIDTH * BLOCK // 2)
        b_first = tl.load(p_hard + o_slot, o_slot < N, NOTHING, cache_modifier=".cg")
    b_sum, b_rank, b_total = add_splits(p_scan_sum, p_scan_rank, p_scan_total, row, B, o_dim, D, SPLITS, STEP)
    if PARTS:
        begin(OVERLAP)
        for start in tl.static_range(0, PARTS, STEP):
            o_part = start + tl.arange(0, STEP)
            m_total = (o_part < PARTS)[:, None] & m_dim[None, :]
            b_total += tl.load(p_mix_total + (row * PARTS + o_part)[:, None] * D + o_dim[None, :], m_total, 0)
        p_similarity += row * before(COUNTS, len(COUNTS))
        own = _families(p_similarity, positive, shift, scale, COUNTS, WIDTH, BLOCK)

    total_sum, queue_rank = tl.reduce((b_sum, b_rank), 0, two)
    rank = queue_rank
    total = tl.sum(b_total, axis=0)
    o_family = tl.arange(0, WIDTH)
    b_mean = tl.full([WIDTH], float("nan"), tl.float32)
    if PARTS:
        own_sum, own_rank, finite, many = tl.reduce(own, 1, _four)
        own_sum, own_rank = tl.reduce((own_sum, own_rank), 0, two)
        total_sum += own_sum
        rank += own_rank
        b_mean = finite / many.to(tl.float32)
    tl.store(p_synthetic + row * COLUMNS + o_family, b_mean, o_family < COLUMNS)
    mean = float("nan")
    if HARD:
        finite_sum, finite_count = _hard(b_first, p_hard, N, WIDTH * BLOCK // 2)
        mean = finite_sum / finite_count.to(tl.float32)
    tl.store(p_hard_mean + row, mean)

    release(OVERLAP)
    below = (positive - shift) / temperature
    everything = tl.exp(below) + total_sum
    tl.store(p_loss + row, tl.log(everything) - below)
    gradient = (total - total_sum * k.to(tl.float32)) / (everything * temperature)
    tl.store(p_gradient + row * D + o_dim, gradient, m_dim)
    tl.store(p_rank + row, rank.to(tl.int64))
    tl.store(p_queue_rank + row, queue_rank.to(tl.int64))
