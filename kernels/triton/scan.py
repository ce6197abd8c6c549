"""Step two: one pass over the queue.

For its block of rows and its share of the queue a program sums

    P = sum_j exp((s_j - m) / T),    V = sum_j exp((s_j - m) / T) n_j,    how many s_j exceed q.k,

and marks with one bit each similarity that exceeds t (or is NaN). The shift m is fixed beforehand, so the shares of
different programs simply add; no similarity is ever written. Tiles are 64 by 64. Where D is above CHUNK the third
grid dimension spreads the columns of V, and the similarities are computed once for each.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.sample import product

__all__ = ["scan"]


@triton.jit
def scan(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_threshold,
    p_positive,
    p_shift,
    p_marks,
    p_sum,
    p_total,
    p_rank,
    B,
    K,
    words,
    tiles,
    scale,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    MARK: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (row blocks, splits, chunks of D); ``tiles`` key tiles a split; scale is log2(e) / T.

    Writes marks (B, words) int32, bit i of word w for key 32 w + i; sum and rank (splits, B); and total (splits, B, D).
    """
    split, chunk = tl.program_id(1), tl.program_id(2)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < B
    o_out = chunk * CHUNK + tl.arange(0, CHUNK)
    m_out = o_out < D
    positive = tl.load(p_positive + o_row, m_row, 0)
    threshold = tl.load(p_threshold + o_row, m_row, 0)
    shift = tl.load(p_shift + o_row, m_row, 0) * scale
    ONE: tl.constexpr = CHUNK >= D and PIECE >= D
    if ONE:
        m_q = m_row[:, None] & m_out[None, :]
        b_q = tl.load(p_q + o_row[:, None] * D + o_out[None, :], m_q, 0).to(DOT)
    if MASKED:
        image = tl.load(p_image + o_row, m_row, 0)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_total = tl.zeros([ROWS, CHUNK], tl.float32)
    b_rank = tl.zeros([ROWS], tl.int32)
    for tile in range(tiles):
        start = (split * tiles + tile) * KEYS
        o_key = start + tl.arange(0, KEYS)
        m_key = o_key < K
        m_n = m_key[:, None] & m_out[None, :]
        b_n = tl.load(p_queue + o_key[:, None].to(tl.int64) * D + o_out[None, :], m_n, 0)
        if ONE:
            b_similarity = tl.dot(b_q, tl.trans(b_n.to(DOT)), input_precision=PRECISION)
        else:
            b_similarity = product(p_q, p_queue, o_row, o_key, m_row, m_key, D, PIECE, DOT, PRECISION)
        allowed = m_row[:, None] & m_key[None, :]
        if MASKED:
            queue_image = tl.load(p_queue_image + o_key, m_key, -1)
            allowed = allowed & (image[:, None] != queue_image[None, :])
        b_similarity = tl.where(allowed, b_similarity, float("-inf"))
        if MARK:
            # Not "above": NaN must be marked too, since it comes first in Q^N.
            marked = allowed & ~(b_similarity <= threshold[:, None])
            bits = tl.where(marked, (1 << (tl.arange(0, KEYS) % 32))[None, :], 0)
            b_words = tl.sum(tl.reshape(bits, [ROWS, KEYS // 32, 32]), axis=2)
            o_word = start // 32 + tl.arange(0, KEYS // 32)
            m_word = m_row[:, None] & (o_word < words)[None, :] & (chunk == 0)
            tl.store(p_marks + o_row[:, None].to(tl.int64) * words + o_word[None, :], b_words, m_word)
        b_rank += tl.sum((b_similarity > positive[:, None]).to(tl.int32), axis=1)
        b_p = tl.exp2(b_similarity * scale - shift[:, None])
        b_sum += tl.sum(b_p, axis=1)
        b_total = tl.dot(b_p.to(WEIGHT), b_n.to(WEIGHT), b_total, input_precision=WEIGHT_PRECISION)
    o_part = split.to(tl.int64) * B + o_row
    m_first = m_row & (chunk == 0)
    tl.store(p_sum + o_part, b_sum, m_first)
    tl.store(p_rank + o_part, b_rank, m_first)
    tl.store(p_total + o_part[:, None] * D + o_out[None, :], b_total, m_row[:, None] & m_out[None, :])
