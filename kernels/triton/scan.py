"""Step 2, scan: one pass over the queue.

For its block of rows and its split of the queue a program sums

    P = sum_j exp((s_j - m) / T),    V = sum_j exp((s_j - m) / T) n_j,    the number of s_j above q.k,

and stores every similarity above the threshold t (or NaN) with its index. The shift m is fixed beforehand, so the sums
of different programs simply add. If D is larger than CHUNK, the third grid dimension splits the columns of V, and each
of these programs computes the similarities again.

In the layout of a product, four lanes of a warp share a row, and each lane holds every fourth pair of columns. Keys are
assigned to columns so that each lane gets a run of consecutive keys. A row has one memory segment for each lane of each
split. Every segment is filled in queue order, and so are all segments one after another. Each lane counts its own
candidates: this needs no atomics, no prefix sum over a tile and no exchange between threads.

If a segment overflows, the count stops one above its size. The overflow overwrites another segment of the same row,
which is harmless: such a row is selected on the slow path.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.overlap import begin, release
from synco_fast.kernels.triton.sample import halves, multiply, product, three

__all__ = ["LANES", "OVERHANG", "add_splits", "scan", "two"]

#: Places after a row's last segment that a tile may overwrite, in addition to one for each of its keys.
OVERHANG = 16

#: Candidate lists of a row in a split: the lanes of a warp that share a row of a product.
LANES = 4


@triton.jit
def _columns(x, ROWS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Split the last dimension into WIDTH tensors (ROWS, LANES), without moving data between threads."""
    if WIDTH == 1:
        return (tl.reshape(x, [ROWS, LANES]),)
    else:
        first, second = tl.split(tl.permute(tl.reshape(x, [ROWS, LANES, 2, WIDTH // 2]), (0, 1, 3, 2)))
        return _columns(first, ROWS, LANES, WIDTH // 2) + _columns(second, ROWS, LANES, WIDTH // 2)


# Inline assembly keeps the layout of the product. `tl.store` would first exchange the whole tile between threads, with
# several times the instructions and more registers than there are.
_KEEP = tl.constexpr(
    "{ .reg .pred kept; .reg .pred above; .reg .b64 address; mov.b32 $0, $3; mov.b32 $1, $4;"
    " mad.wide.u32 address, $3, 8, $2; setp.gtu.f32 kept, $5, $6; @kept st.global.v2.b32 [address], {$8, $5};"
    " @kept add.u32 $0, $0, 1; setp.gt.f32 above, $5, $7; @above add.u32 $1, $1, 1; }"
)


@triton.jit
def keep(
    p_found,
    b_similarity,
    threshold,
    positive,
    key,
    b_place,
    b_rank,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    LANES: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Store the similarities above the threshold, starting at ``place``, (ROWS, LANES).

    The tile's columns come in pairs of neighbours, one pair for each lane in turn. ``key``, (LANES,), is the key of
    each lane's first column, and a lane's columns are in the order of its keys.

    Returns the next free places, and the ranks plus the number of similarities above q.k.
    """
    GROUPS: tl.constexpr = KEYS // (2 * LANES)
    b_columns = tl.permute(tl.reshape(b_similarity, [ROWS, GROUPS, LANES, 2]), (0, 2, 1, 3))
    columns = _columns(tl.reshape(b_columns, [ROWS, LANES, KEYS // LANES]), ROWS, LANES, KEYS // LANES)
    for column in tl.static_range(0, KEYS // LANES):
        b_own = columns[column]
        o_key = (key + column)[None, :]
        if DEVICE:
            b_place, b_rank = tl.inline_asm_elementwise(
                _KEEP,
                "=r,=r,l,r,r,f,f,f,r",
                [p_found.to(tl.int64), b_place, b_rank, b_own, threshold[:, None], positive[:, None], o_key],
                dtype=(tl.int32, tl.int32),
                is_pure=False,
                pack=1,
            )
        else:
            # Not `>`: NaN must be kept too, since it comes first in Q^N.
            kept = ~(b_own <= threshold[:, None])
            value = (b_own.to(tl.int32, bitcast=True).to(tl.int64) << 32) | o_key.to(tl.int64)
            tl.store(p_found + b_place, value, kept)
            b_place += kept.to(tl.int32)
            b_rank += (b_own > positive[:, None]).to(tl.int32)
    return b_place, b_rank


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
    p_rank,
    p_total,
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
    WEIGHT_THREE: tl.constexpr,
    MASKED: tl.constexpr,
    EVEN: tl.constexpr,
    SHORT: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SEGMENT: tl.constexpr,
    DEVICE: tl.constexpr,
    LANES: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (row blocks, splits, chunks of D). A split has up to ``tiles`` key tiles; scale is log2(e) / T.

    Writes

    - found, (B, room) int64: the similarity in the high word and the index in the low word, SEGMENT places for each
      lane of each split; nothing if SEGMENT is 0,
    - count, (B, splits, LANES) int32,
    - sum, float32, and rank, int32, (splits, B),
    - total, (splits, B, D) float32.

    EVEN states that all tiles are whole, SHORT that they are and that the last split has fewer of them.
    """
    # As in the layout of a product, a lane holds pairs of neighbouring columns: its keys are then consecutive.
    SHARE: tl.constexpr = KEYS // LANES
    o_column = tl.arange(0, KEYS)
    o_lane = tl.arange(0, LANES)
    split, chunk = tl.program_id(1), tl.program_id(2)
    turns = tiles
    if SHORT:
        turns = tl.minimum(tiles, K // KEYS - split * tiles)
    o_first = (o_column // 2 % LANES) * (turns * SHARE) + o_column // (2 * LANES) * 2 + o_column % 2
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = o_row < B
    o_out = chunk * CHUNK + tl.arange(0, CHUNK)
    m_out = o_out < D
    ONE: tl.constexpr = CHUNK >= D and PIECE >= D
    if ONE and THREE is None:
        b_q = tl.load(p_q + o_row[:, None] * D + o_out[None, :], m_row[:, None] & m_out[None, :], 0)
    begin(OVERLAP)
    positive = tl.load(p_positive + o_row, m_row, 0)
    shift = tl.load(p_shift + o_row, m_row, 0) * scale
    if ONE and THREE is not None:
        m_q = m_row[:, None] & m_out[None, :]
        p_own = p_q + o_row[:, None] * D + o_out[None, :]
        b_q = tl.load(p_own, m_q, 0)
        # `rank` has split q. What is loaded as it is multiplied stays in shared memory and takes no registers.
        b_low = tl.load(p_own + B * D, m_q, 0)
    if MASKED:
        image = tl.load(p_image + o_row, m_row, 0)
    if SEGMENT:
        # Only the programs of the first chunk store candidates.
        threshold = tl.load(p_threshold + o_row, m_row & (chunk == 0), float("inf"))
        p_row = (p_found + o_row.to(tl.int64) * room)[:, None]
        b_first = (o_row * 0)[:, None] + (split * LANES + o_lane)[None, :] * SEGMENT
        b_place = b_first
        b_ranks = tl.zeros([ROWS, LANES], tl.int32)
    b_sum = tl.zeros([ROWS], tl.float32)
    b_total = tl.zeros([ROWS, CHUNK], tl.float32)
    b_rank = tl.zeros([ROWS], tl.int32)
    for tile in range(turns):
        o_key = split * tiles * KEYS + tile * SHARE + o_first
        m_key = o_key < K
        p_n = p_queue + o_key[:, None].to(tl.int64) * D + o_out[None, :]
        m_n = None if EVEN and D % CHUNK == 0 else m_key[:, None] & m_out[None, :]
        b_n = tl.load(p_n, m_n, None if EVEN and D % CHUNK == 0 else 0.0)
        if ONE:
            b_similarity = tl.zeros([ROWS, KEYS], tl.float32)
            if THREE is None:
                b_similarity = multiply(b_q, tl.trans(b_n), b_similarity, DOT, PRECISION, None)
            else:
                n_high, n_low = halves(b_n, THREE)
                b_similarity = three(b_q, b_low, tl.trans(n_high), tl.trans(n_low), b_similarity)
        else:
            b_similarity = product(p_q, p_queue, o_row, o_key, m_row, m_key, D, PIECE, DOT, PRECISION, THREE)
        if MASKED:
            queue_image = tl.load(p_queue_image + o_key, m_key, -1)
            b_similarity = tl.where(image[:, None] == queue_image[None, :], float("-inf"), b_similarity)
        if not EVEN:
            b_similarity = tl.where(m_row[:, None] & m_key[None, :], b_similarity, float("-inf"))
        if SEGMENT:
            if SHORT:
                key = split * tiles * KEYS + o_lane * (turns * SHARE) + tile * SHARE
            else:
                key = (split * LANES + o_lane) * (tiles * SHARE) + tile * SHARE
            b_own = b_similarity
            if D > CHUNK:
                # The other programs' threshold is infinite, which NaN exceeds.
                b_own = tl.where(chunk == 0, b_similarity, 0.0)
            b_place, b_ranks = keep(p_row, b_own, threshold, positive, key, b_place, b_ranks, ROWS, KEYS, LANES, DEVICE)
            b_place = tl.minimum(b_place, b_first + (SEGMENT + 1))
        else:
            b_rank += tl.sum((b_similarity > positive[:, None]).to(tl.int32), axis=1)
        b_p = tl.exp2(b_similarity * scale - shift[:, None])
        b_sum += tl.sum(b_p, axis=1)
        b_total = multiply(b_p, b_n, b_total, WEIGHT, WEIGHT_PRECISION, WEIGHT_THREE)
    release(OVERLAP)
    if SEGMENT:
        b_rank = tl.sum(b_ranks, axis=1)
    o_part = split.to(tl.int64) * B + o_row
    m_first = m_row & (chunk == 0)
    tl.store(p_sum + o_part, b_sum, m_first)
    tl.store(p_rank + o_part, b_rank, m_first)
    if SEGMENT:
        o_count = (o_row * (splits * LANES) + split * LANES)[:, None] + o_lane[None, :]
        tl.store(p_count + o_count, b_place - b_first, m_first[:, None])
    tl.store(p_total + o_part[:, None] * D + o_out[None, :], b_total, m_row[:, None] & m_out[None, :])


@triton.jit
def two(a0, a1, b0, b1):
    """Combine two sums in one reduction, so that warps exchange data once."""
    return a0 + b0, a1 + b1


@triton.jit
def add_splits(p_sum, p_rank, p_total, row, B, o_dim, D: tl.constexpr, SPLITS: tl.constexpr, STEP: tl.constexpr):
    """Add up what `scan` wrote for a row, STEP splits at a time: sums and ranks, (STEP,), and totals, (STEP, D).

    Reads through L2, so that a kernel may do so before it waits.
    """
    b_sum = tl.zeros([STEP], tl.float32)
    b_rank = tl.zeros([STEP], tl.int32)
    b_total = tl.zeros([STEP, o_dim.shape[0]], tl.float32)
    for start in tl.static_range(0, SPLITS, STEP):
        o_split = (start + tl.arange(0, STEP)).to(tl.int64)
        m_split = o_split < SPLITS
        o_part = o_split * B + row
        b_sum += tl.load(p_sum + o_part, m_split, 0, cache_modifier=".cg")
        b_rank += tl.load(p_rank + o_part, m_split, 0, cache_modifier=".cg")
        p_own = p_total + o_part[:, None] * D + o_dim[None, :]
        b_total += tl.load(p_own, m_split[:, None] & (o_dim < D)[None, :], 0, cache_modifier=".cg")
    return b_sum, b_rank, b_total
