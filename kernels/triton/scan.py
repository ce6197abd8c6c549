"""Step two: one pass over the queue.

For its block of rows and its share of the queue a program sums

    P = sum_j exp((s_j - m) / T),    V = sum_j exp((s_j - m) / T) n_j,    how many s_j exceed q.k,

and stores each similarity that exceeds t (or is NaN) with its index. The shift m is fixed beforehand, so the shares of
different programs simply add. Where D is above CHUNK the third grid dimension spreads the columns of V, and the
similarities are computed once for each.

Every row has a segment of memory in every split, filled in the order of the queue: the place of a similarity is the
number of those found before, and in its tile the number of bits set below its own in words of 32 marks. Words and
counts come from sums over numbers that a thread, or four of a warp, hold; there is no atomic and no scan over the tile.
More than a segment holds are counted to one beyond it, and what they overwrite is another segment of the same row,
which is selected on the slow path in that case.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.overlap import begin
from synco_fast.kernels.triton.sample import multiply, product

__all__ = ["OVERHANG", "scan"]

#: Places behind a row's last segment that a tile may overwrite, beside its own number of keys.
OVERHANG = 16

# As an elementwise instruction the store stays in the layout of the product; tl.store would first exchange the whole
# tile between threads, with several times the instructions and more registers than there are.
_KEEP = tl.constexpr(
    "{ .reg .pred kept; .reg .b64 address; .reg .b32 place;"
    " and.b32 place, $6, $7; popc.b32 place, place; add.u32 place, place, $2; mad.wide.u32 address, place, 8, $1;"
    " setp.gtu.f32 kept, $3, $4; @kept st.global.v2.b32 [address], {$5, $3}; mov.b32 $0, 0; }"
)


@triton.jit
def popcount(word):
    """How many bits of int32 words are set; the compiler knows this form and makes one instruction of it."""
    x = word.to(tl.uint32)
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return ((x * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def keep(
    p_found, b_similarity, threshold, o_key, b_place, ROWS: tl.constexpr, KEYS: tl.constexpr, DEVICE: tl.constexpr
):
    """Store what exceeds the threshold from place (ROWS,) on, in the order of the keys; how many that are, (ROWS,)."""
    WORDS: tl.constexpr = KEYS // 32
    o_word = tl.arange(0, WORDS)
    # Not "above": NaN must be kept too, since it comes first in Q^N.
    kept = ~(b_similarity <= threshold[:, None])
    b_bits = tl.where(kept, (1 << (tl.arange(0, KEYS) % 32))[None, :], 0)
    b_word = tl.sum(tl.reshape(b_bits, [ROWS, WORDS, 32]), axis=2)
    # The counts of up to four words as bytes of one: a product adds up those before each.
    b_counts = tl.sum(popcount(b_word) << (8 * o_word)[None, :], axis=1).to(tl.uint32)
    b_before = ((b_counts * 0x01010100)[:, None] >> (8 * o_word)[None, :].to(tl.uint32)) & 0xFF
    b_begin = b_place[:, None] + b_before.to(tl.int32)
    # Broadcast in the three dimensions that the words have, so that nothing has to move between threads.
    none = tl.zeros([1, 1, 32], tl.int32)
    b_begin = tl.reshape(b_begin[:, :, None] + none, [ROWS, KEYS])
    b_word = tl.reshape(b_word[:, :, None] + none, [ROWS, KEYS])
    below = ((1 << (tl.arange(0, KEYS) % 32)) - 1)[None, :]
    if DEVICE:
        tl.inline_asm_elementwise(
            _KEEP,
            "=r,l,r,f,f,r,r,r",
            [p_found.to(tl.int64), b_begin, b_similarity, threshold[:, None], o_key[None, :], b_word, below],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
    else:
        bits = b_similarity.to(tl.int32, bitcast=True)
        value = (bits.to(tl.int64) << 32) | o_key[None, :].to(tl.int64)
        tl.store(p_found + b_begin + popcount(b_word & below), value, kept)
    return ((b_counts * 0x01010101) >> 24).to(tl.int32)


@triton.jit
def scan(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_threshold,
    p_positive,
    p_shift,
    p_found,
    p_count,
    p_sum,
    p_total,
    p_rank,
    B,
    K,
    splits,
    tiles,
    room,
    scale,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHT: tl.constexpr,
    WEIGHT_PRECISION: tl.constexpr,
    THREE: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DEVICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (row blocks, splits, chunks of D); ``tiles`` key tiles a split; scale is log2(e) / T.

    Writes found (B, room) int64, similarity above index, SEGMENT places for each split (none where SEGMENT is 0);
    count (B, splits); sum and rank (splits, B); and total (splits, B, D). EVEN promises whole tiles throughout.
    """
    begin(OVERLAP)
    split, chunk = tl.program_id(1), tl.program_id(2)
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < B
    o_out = chunk * CHUNK + tl.arange(0, CHUNK)
    m_out = o_out < D
    positive = tl.load(p_positive + o_row, m_row, 0)
    shift = tl.load(p_shift + o_row, m_row, 0) * scale
    ONE: tl.constexpr = CHUNK >= D and PIECE >= D
    if ONE:
        m_q = m_row[:, None] & m_out[None, :]
        b_q = tl.load(p_q + o_row[:, None] * D + o_out[None, :], m_q, 0)
    if MASKED:
        image = tl.load(p_image + o_row, m_row, 0)
    if SEGMENT:
        # One chunk of columns keeps for all.
        threshold = tl.load(p_threshold + o_row, m_row & (chunk == 0), float("inf"))
        b_first = o_row * room + split * SEGMENT
        b_place = b_first
    b_sum = tl.zeros([ROWS], tl.float32)
    b_total = tl.zeros([ROWS, CHUNK], tl.float32)
    b_rank = tl.zeros([ROWS], tl.int32)
    for tile in range(tiles):
        o_key = (split * tiles + tile) * KEYS + tl.arange(0, KEYS)
        m_key = o_key < K
        p_n = p_queue + o_key[:, None].to(tl.int64) * D + o_out[None, :]
        m_n = None if EVEN and D % CHUNK == 0 else m_key[:, None] & m_out[None, :]
        b_n = tl.load(p_n, m_n, None if EVEN and D % CHUNK == 0 else 0.0)
        if ONE:
            b_similarity = tl.zeros([ROWS, KEYS], tl.float32)
            b_similarity = multiply(b_q, tl.trans(b_n), b_similarity, DOT, PRECISION, THREE)
        else:
            b_similarity = product(p_q, p_queue, o_row, o_key, m_row, m_key, D, PIECE, DOT, PRECISION, THREE)
        if MASKED:
            queue_image = tl.load(p_queue_image + o_key, m_key, -1)
            b_similarity = tl.where(image[:, None] == queue_image[None, :], float("-inf"), b_similarity)
        if not EVEN:
            b_similarity = tl.where(m_row[:, None] & m_key[None, :], b_similarity, float("-inf"))
        if SEGMENT:
            b_place += keep(p_found, b_similarity, threshold, o_key, b_place, ROWS, KEYS, DEVICE)
            b_place = tl.minimum(b_place, b_first + (SEGMENT + 1))
        b_rank += tl.sum((b_similarity > positive[:, None]).to(tl.int32), axis=1)
        b_p = tl.exp2(b_similarity * scale - shift[:, None])
        b_sum += tl.sum(b_p, axis=1)
        b_total = multiply(b_p, b_n, b_total, WEIGHT, WEIGHT_PRECISION, THREE)
    o_part = split.to(tl.int64) * B + o_row
    m_first = m_row & (chunk == 0)
    tl.store(p_sum + o_part, b_sum, m_first)
    tl.store(p_rank + o_part, b_rank, m_first)
    if SEGMENT:
        tl.store(p_count + o_row * splits + split, b_place - b_first, m_first)
    tl.store(p_total + o_part[:, None] * D + o_out[None, :], b_total, m_row[:, None] & m_out[None, :])
