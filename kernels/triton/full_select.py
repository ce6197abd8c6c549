"""Slow path of the selection: Q^N from all similarities of a row. Ordinary features never need it.

Rows are flagged on the device, so the launches are always the same and cost next to nothing if no row is flagged. It
handles a fixed number of rows at a time. `fill` writes the similarities of the flagged rows to all K keys, as
order-preserving integers, tile by tile as in the scan. Then `choose`, one program for each flagged row, finds the N-th
largest by radix selection (four histograms of eight bits). It stores the keys above it and as many ties as are missing,
in queue order.

Counts are integers, so nothing depends on scheduling. The result is exact for every input and every N up to K. The
buffer has a fixed size, and the host never waits.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from synco_fast.kernels.triton.config import TILE, Form
from synco_fast.kernels.triton.sample import product
from synco_fast.kernels.triton.select import ordered

__all__ = ["choose", "fill", "full_select", "rows_at_once"]

#: Bytes of similarities held at a time, unless a single row needs more.
_ROOM = 32 << 20
#: Programs that split the keys for one block of rows.
_SPLITS = 128


def rows_at_once(rows: int, length: int) -> int:
    """Number of rows, of B, whose similarities to K keys (four bytes each) are held at a time."""
    fit = max(1, _ROOM // (4 * length))
    return min(rows, fit // TILE * TILE if fit > TILE else fit)


def full_select(
    q: Tensor,
    queue: Tensor,
    images: Tensor | None,
    queue_images: Tensor | None,
    available: Tensor | None,
    flag: Tensor,
    room: Tensor,
    hard_index: Tensor,
    hard_similarity: Tensor,
    form: Form,
) -> None:
    """Write Q^N of the flagged rows, in queue order.

    If a row may use fewer than N keys, the rest of its Q^N is -inf with index 0.

    Args:
        q, queue: (B, D) and (K, D).
        images, queue_images, available: From `compact_ids`; None without a mask.
        flag: (B,) int32, nonzero for the rows to select.
        room: Scratch space, (`rows_at_once`, K) int32.
        hard_index, hard_similarity: Outputs, (B, N) int32 and float32. Rows that are not flagged stay unchanged.
        form: Number formats and tile sizes of the products.
    """
    (rows, dim), length, hard = q.shape, len(queue), hard_index.shape[1]
    keys = min(form.keys, TILE)
    tiles = triton.cdiv(triton.cdiv(length, keys), _SPLITS)
    splits = triton.cdiv(triton.cdiv(length, keys), tiles)
    masked = images is not None
    for begin in range(0, rows, len(room)):
        some = slice(begin, begin + len(room))
        count = len(flag[some])
        fill[(triton.cdiv(count, TILE), splits)](
            q[some],
            queue,
            images[some] if images is not None else None,
            queue_images,
            flag[some],
            room,
            count,
            length,
            tiles,
            D=dim,
            PIECE=form.piece,
            # Where the scan uses lower precision than float32, the slow path uses float32.
            DOT=tl.float32 if form.margin else form.dot,
            PRECISION="ieee" if form.margin else form.precision,
            MASKED=masked,
            ROWS=TILE,
            KEYS=keys,
            num_warps=8,
            num_stages=2,
        )
        choose[(count,)](
            flag[some],
            available[some] if available is not None else None,
            room,
            hard_index[some],
            hard_similarity[some],
            length,
            hard,
            MASKED=masked,
            BLOCK=4096,
            num_warps=16,
        )


@triton.jit
def fill(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_flag,
    p_room,
    B,
    K,
    tiles,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Grid (row blocks, splits). Writes the similarities of flagged rows, `ordered`, (B, K) int32; -inf if masked."""
    o_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_row = tl.load(p_flag + o_row, o_row < B, 0) != 0
    if tl.max(m_row.to(tl.int32)) > 0:
        if MASKED:
            image = tl.load(p_image + o_row, m_row, 0)
        for tile in range(tiles):
            o_key = (tl.program_id(1) * tiles + tile) * KEYS + tl.arange(0, KEYS)
            m_key = o_key < K
            b_similarity = product(p_q, p_queue, o_row, o_key, m_row, m_key, D, PIECE, DOT, PRECISION, False)
            if MASKED:
                queue_image = tl.load(p_queue_image + o_key, m_key, -1)
                b_similarity = tl.where(image[:, None] == queue_image[None, :], float("-inf"), b_similarity)
            o_room = o_row[:, None].to(tl.int64) * K + o_key[None, :]
            tl.store(p_room + o_room, ordered(b_similarity), m_row[:, None] & m_key[None, :])


@triton.jit(do_not_specialize=["N"])
def choose(p_flag, p_available, p_room, p_hard_index, p_hard, K, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Grid (B,). For flagged rows writes Q^N as indices and similarities, (B, N) each."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(p_flag + row) != 0:
        needed = tl.minimum(K, N)
        if MASKED:
            needed = tl.minimum(tl.load(p_available + row), N)
        p_room += row * K
        o_bin = tl.arange(0, 256)
        # The leading bits of the N-th largest, and how many keys with these leading bits are still needed.
        leading = tl.full([], 0, tl.uint32)
        wanted = needed
        for digit in range(4):
            shift = 24 - 8 * digit
            b_count = tl.zeros([256], tl.int32)
            for start in range(0, K, BLOCK):
                o_key = start + tl.arange(0, BLOCK)
                b_number = tl.load(p_room + o_key, o_key < K, 0).to(tl.uint32, bitcast=True) ^ 0x80000000
                b_upper = b_number >> shift
                m_alike = (o_key < K) & ((b_upper >> 8) == leading)
                b_count += tl.histogram((b_upper & 255).to(tl.int32), 256, m_alike)
            b_reach = tl.sum(b_count) - tl.cumsum(b_count, 0) + b_count
            chosen = tl.sum((b_reach >= wanted).to(tl.int32)) - 1
            wanted -= tl.sum(tl.where(o_bin == chosen, b_reach - b_count, 0))
            leading = leading * 256 + chosen.to(tl.uint32)

        above, ties = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
        for start in range(0, K, BLOCK):
            o_key = start + tl.arange(0, BLOCK)
            b_order = tl.load(p_room + o_key, o_key < K, 0)
            b_number = b_order.to(tl.uint32, bitcast=True) ^ 0x80000000
            m_above = (o_key < K) & (b_number > leading)
            m_tie = (o_key < K) & (b_number == leading)
            # Both counts in one sum: a block has fewer than 2^15 keys.
            b_both = tl.cumsum(m_above.to(tl.int32) + (m_tie.to(tl.int32) << 16), 0)
            b_ties = ties + (b_both >> 16)
            place = above + (b_both & 0xFFFF) + tl.minimum(b_ties, wanted) - 1
            m_chosen = m_above | (m_tie & (b_ties <= wanted))
            b_similarity = (b_order ^ ((b_order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
            tl.store(p_hard_index + row * N + place, o_key, m_chosen)
            tl.store(p_hard + row * N + place, b_similarity, m_chosen)
            above += tl.sum(m_above.to(tl.int32))
            ties += tl.sum(m_tie.to(tl.int32))
        if MASKED:
            for start in range(needed, N, BLOCK):
                o_place = start + tl.arange(0, BLOCK)
                tl.store(p_hard_index + row * N + o_place, 0, o_place < N)
                tl.store(p_hard + row * N + o_place, float("-inf"), o_place < N)
