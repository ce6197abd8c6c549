"""Step 1, sample: a threshold for each query, exceeded by slightly more than N similarities of the queue.

`sample` multiplies the queries by a sample of the queue, taken at a stride, since the queue is ordered by time. `rank`
finds a threshold t that r or slightly more of the sampled similarities reach, by bisecting the order-preserving
integers of float32. It also computes two numbers for the later steps: the positive similarity q.k, and the shift

    m = max(q.k, largest of the sample)

of the exponent. All sums are of exp((s - m) / T). For unit rows and T >= 0.03 they neither overflow nor underflow, so
no later step has to rescale.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.order import count_from, unordered
from synco_fast.kernels.triton.overlap import begin, release

__all__ = ["halves", "multiply", "product", "rank", "sample", "three"]


@triton.jit
def halves(x, FORMAT: tl.constexpr):
    """A float32 block as the sum of a high and a low one in ``FORMAT``.

    With bfloat16 the sum is off by one part in 2^18. With float16 it is off by one part in 2^22, or by 2^-25 for small
    numbers, and the numbers must be below 65,520.
    """
    high = x.to(FORMAT)
    return high, (x - high.to(tl.float32)).to(FORMAT)


@triton.jit
def three(left_high, left_low, right_high, right_low, b_total):
    """``b_total`` plus the product of two blocks given as `halves`, without low times low."""
    b_total = tl.dot(left_high, right_low, b_total)
    b_total = tl.dot(left_low, right_high, b_total)
    return tl.dot(left_high, right_high, b_total)


@triton.jit
def multiply(left, right, b_total, FORMAT: tl.constexpr, PRECISION: tl.constexpr, THREE: tl.constexpr):
    """``b_total`` plus the product of two blocks; in `three` products if THREE is a format of `halves`, not None."""
    if THREE is not None:
        left_high, left_low = halves(left, THREE)
        right_high, right_low = halves(right, THREE)
        return three(left_high, left_low, right_high, right_low, b_total)
    return tl.dot(left.to(FORMAT), right.to(FORMAT), b_total, input_precision=PRECISION)


@triton.jit
def product(
    p_q,
    p_keys,
    o_row,
    o_key,
    m_row,
    m_key,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    THREE: tl.constexpr,
):
    """Similarities of a block of queries to a block of keys in float32, PIECE columns at a time."""
    b_similarity = tl.zeros([o_row.shape[0], o_key.shape[0]], tl.float32)
    # No unrolling or pipelining: wide rows would need more shared memory and registers than there are.
    for start in tl.range(0, D, PIECE, num_stages=1):
        o_dim = start + tl.arange(0, PIECE)
        m_dim = o_dim < D
        q = tl.load(p_q + o_row[:, None] * D + o_dim[None, :], m_row[:, None] & m_dim[None, :], 0)
        n = tl.load(p_keys + o_key[:, None].to(tl.int64) * D + o_dim[None, :], m_key[:, None] & m_dim[None, :], 0)
        b_similarity = multiply(q, tl.trans(n), b_similarity, DOT, PRECISION, THREE)
    return b_similarity


@triton.jit
def sample(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_sample,
    B,
    SAMPLE,
    stride,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    THREE: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (row blocks, key blocks). Writes similarities to the sampled keys, (B, SAMPLE) float32, -inf if masked."""
    begin(OVERLAP)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_sample = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    m_row, m_sample = o_row < B, o_sample < SAMPLE
    o_key = o_sample * stride
    b_similarity = product(p_q, p_queue, o_row, o_key, m_row, m_sample, D, PIECE, DOT, PRECISION, THREE)
    m_both = m_row[:, None] & m_sample[None, :]
    if MASKED:
        image = tl.load(p_image + o_row, m_row, 0)
        queue_image = tl.load(p_queue_image + o_key, m_sample, -1)
        b_similarity = tl.where(image[:, None] == queue_image[None, :], float("-inf"), b_similarity)
    release(OVERLAP)
    tl.store(p_sample + o_row[:, None].to(tl.int64) * SAMPLE + o_sample[None, :], b_similarity, m_both)


@triton.jit
def _extremes(a_low, a_high, a_largest, b_low, b_high, b_largest):
    """Combine a minimum and two maxima in one reduction, so that warps exchange data once."""
    return tl.minimum(a_low, b_low), tl.maximum(a_high, b_high), tl.maximum(a_largest, b_largest)


@triton.jit
def rank(
    p_q,
    p_k,
    p_sample,
    p_threshold,
    p_positive,
    p_shift,
    p_halves,
    SAMPLE,
    wanted,
    D: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ESTIMATE: tl.constexpr,
    DEVICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (B,). Writes t, q.k and m of each row, and q as `halves`, (2, B, D) float16, if p_halves is not None.

    Without ESTIMATE t is +inf, which no key exceeds.
    """
    row = tl.program_id(0)
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    q = tl.load(p_q + row * D + o_dim, m_dim, 0).to(tl.float32)
    k = tl.load(p_k + row * D + o_dim, m_dim, 0).to(tl.float32)
    begin(OVERLAP)
    # Read before anything is added up between threads. Behind the sum the program would wait once more.
    o_sample = tl.arange(0, WIDTH)
    b_sample = tl.load(p_sample + row.to(tl.int64) * SAMPLE + o_sample, o_sample < SAMPLE, float("-inf"))
    positive = tl.sum(q * k)
    if p_halves is not None:
        high, low = halves(q, p_halves.dtype.element_ty)
        tl.store(p_halves + row * D + o_dim, high, m_dim)
        tl.store(p_halves + (tl.num_programs(0) + row) * D + o_dim, low, m_dim)

    bits = b_sample.to(tl.int32, bitcast=True)
    b_order = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    least, most, largest_sample = tl.reduce((b_order, b_order, b_sample), 0, _extremes)
    threshold = tl.full([], float("inf"), tl.float32)
    if ESTIMATE:
        # Find an integer with at least `wanted` numbers at or above it, and few more. It need not be exact: the number
        # of keys above the threshold affects speed only. int64, so that the midpoint cannot overflow.
        low, high = least.to(tl.int64), most.to(tl.int64)
        reached = tl.full([], WIDTH, tl.int32)
        # Bisecting the integers bisects exponents. Start at an eighth of the largest, which is closer.
        largest = unordered(most)
        eighth = (largest * 0.125).to(tl.int32, bitcast=True).to(tl.int64)
        middle = tl.where(largest > 0, tl.maximum(eighth, low + 1), (low + high + 1) >> 1)
        while (low < high) & (reached > wanted + wanted // 16):
            count = count_from(b_order, middle.to(tl.int32), DEVICE)
            enough = count >= wanted
            low = tl.where(enough, middle, low)
            reached = tl.where(enough, count, reached)
            high = tl.where(enough, high, middle - 1)
            middle = (low + high + 1) >> 1
        found = low.to(tl.int32)
        threshold = unordered(found)
        # No similarity compares above NaN; every unmasked one exceeds -inf.
        threshold = tl.where(threshold == threshold, threshold, float("-inf"))
    release(OVERLAP)
    tl.store(p_threshold + row, threshold)
    tl.store(p_positive + row, positive)
    tl.store(p_shift + row, tl.maximum(positive, largest_sample))
