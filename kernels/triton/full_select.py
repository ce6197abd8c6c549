"""Slow path of the selection: Q^N from all similarities of a row. Ordinary features never need it.

Rows are flagged on the device, so the launches are always the same and cost next to nothing if no row is flagged. The
buffer holds the similarities of a fixed number of rows. `fill` writes those of the first flagged rows to all K keys, as
order-preserving integers, tile by tile as in the scan. Then `choose`, one program for each row of the buffer, finds the
N-th largest by radix selection (four histograms of eight bits). It stores the keys above it and as many ties as are
missing, in queue order. If more rows are flagged than the buffer holds, each program of `choose` goes on with another
row and computes its similarities alone.

Counts are integers, so nothing depends on scheduling. The result is exact for every input and every N up to K,
as exact as float32 sums: `fill` and `choose` add up in different orders, so that keys closer than rounding may differ.
The buffer has a fixed size, and the host never waits.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from synco_fast.kernels.sizes import cdiv, next_power_of_2
from synco_fast.kernels.triton.config import TILE, TILES, Form
from synco_fast.kernels.triton.order import NOTHING, ordered, unordered
from synco_fast.kernels.triton.overlap import begin
from synco_fast.kernels.triton.sample import product

__all__ = ["choose", "fill", "full_select", "rows_at_once"]

#: Bytes of similarities held at a time, unless a single row needs more.
_ROOM = 32 << 20
#: Programs that split the keys for one block of rows.
_SPLITS = 64


def rows_at_once(rows: int, length: int) -> int:
    """Number of rows, of B, whose similarities to K keys (four bytes each) are held at a time."""
    return min(rows, max(1, _ROOM // (4 * length)))


def full_select(
    q: Tensor,
    queue: Tensor,
    images: Tensor | None,
    queue_images: Tensor | None,
    available: Tensor | None,
    flag: Tensor,
    room: Tensor,
    chosen: Tensor,
    form: Form,
    overlap: dict[str, Any],
    every: bool = False,
) -> None:
    """Write Q^N of the flagged rows, in queue order.

    If a row may use fewer than N keys, the rest of its Q^N is -inf with index 0.

    Args:
        q, queue: (B, D) and (K, D).
        images, queue_images, available: From `compact_ids`; None without a mask.
        flag: (B,) int32, nonzero for the rows to select.
        room: Scratch space, (`rows_at_once`, K) int32.
        chosen: Output, (B, N) int64, as `select` writes it. Rows that are not flagged stay unchanged.
        form: Number formats and tile sizes of the products.
        overlap: Launch options of `overlap_of`.
        every: Whether all rows are flagged by their shape alone. Then `fill` and `choose` are launched for as many rows
            at a time as the buffer holds.
    """
    (rows, dim), length, hard = q.shape, len(queue), chosen.shape[1]
    # Where the scan uses lower precision than float32, the slow path uses float32, and the tile for it.
    exact = bool(form.margin)
    tile = TILES["ieee", True] if exact else form
    keys = min(tile.keys, TILE)
    tiles = cdiv(cdiv(length, keys), _SPLITS)
    splits = cdiv(cdiv(length, keys), tiles)
    masked = images is not None
    step = len(room) if every else rows
    for first in range(0, rows, step):
        some = slice(first, first + step)
        count = len(flag[some])
        many = next_power_of_2(count)
        own = images[some] if images is not None else None
        fill[(cdiv(count, TILE), splits)](
            q[some],
            queue,
            own,
            queue_images,
            flag[some],
            room,
            count,
            length,
            tiles,
            len(room),
            D=dim,
            PIECE=min(form.piece, tile.piece),
            DOT=tl.float32 if exact else form.dot,
            PRECISION="ieee" if exact else form.precision,
            MASKED=masked,
            ROWS=TILE,
            KEYS=keys,
            MANY=many,
            **overlap,
            num_warps=8,
            num_stages=2,
        )
        wide = next_power_of_2(dim)
        choose[(min(count, len(room)),)](
            q[some],
            queue,
            own,
            queue_images,
            flag[some],
            available[some] if available is not None else None,
            room,
            chosen[some],
            count,
            length,
            hard,
            D=dim,
            DIM=wide,
            MASKED=masked,
            KEYS=max(1, 8192 // wide),
            MANY=many,
            BLOCK=4096,
            **overlap,
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
    places,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    MANY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (row blocks, splits). Writes the similarities of the first flagged rows, `ordered`, (places, K).

    Masked keys get -inf. MANY is a power of two that covers B.
    """
    begin(OVERLAP)
    first = tl.program_id(0) * ROWS
    o_row = first + tl.arange(0, ROWS)
    b_flag = (tl.load(p_flag + o_row, o_row < B, 0) != 0).to(tl.int32)
    if tl.max(b_flag) > 0:
        o_before = tl.arange(0, MANY)
        before = tl.sum((tl.load(p_flag + o_before, o_before < tl.minimum(first, B), 0) != 0).to(tl.int32))
        b_place = before + tl.cumsum(b_flag, 0) - 1
        m_row = (b_flag != 0) & (b_place < places)
        # Row blocks beyond the buffer have nothing to do.
        turns = tl.where(before < places, tiles, 0)
        if MASKED:
            image = tl.load(p_image + o_row, m_row, 0)
        for tile in range(turns):
            o_key = (tl.program_id(1) * tiles + tile) * KEYS + tl.arange(0, KEYS)
            m_key = o_key < K
            b_similarity = product(p_q, p_queue, o_row, o_key, m_row, m_key, D, PIECE, DOT, PRECISION, None)
            if MASKED:
                queue_image = tl.load(p_queue_image + o_key, m_key, -1)
                b_similarity = tl.where(image[:, None] == queue_image[None, :], float("-inf"), b_similarity)
            o_room = b_place[:, None].to(tl.int64) * K + o_key[None, :]
            tl.store(p_room + o_room, ordered(b_similarity), m_row[:, None] & m_key[None, :])


@triton.jit
def _fill_alone(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_room,
    row,
    K,
    D: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
):
    """The similarities of one row, `ordered`, (K,), by one program."""
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    q = tl.load(p_q + row * D + o_dim, m_dim, 0).to(tl.float32)
    for start in range(0, K, KEYS):
        o_key = start + tl.arange(0, KEYS)
        m_key = o_key < K
        o_n = o_key[:, None].to(tl.int64) * D + o_dim[None, :]
        n = tl.load(p_queue + o_n, m_key[:, None] & m_dim[None, :], 0).to(tl.float32)
        b_similarity = tl.sum(n * q[None, :], axis=1)
        if MASKED:
            queue_image = tl.load(p_queue_image + o_key, m_key, -1)
            b_similarity = tl.where(queue_image == tl.load(p_image + row), float("-inf"), b_similarity)
        tl.store(p_room + o_key, ordered(b_similarity), m_key)


@triton.jit
def _choose(p_room, p_hard, needed, K, N, MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Q^N of one row, (N,), from its similarities."""
    o_bin = tl.arange(0, 256)
    # The leading bits of the N-th largest, and how many keys with these leading bits are still wanted.
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
        b_high = unordered(b_order).to(tl.int32, bitcast=True).to(tl.int64) << 32
        tl.store(p_hard + place, b_high | o_key, m_chosen)
        above += tl.sum(m_above.to(tl.int32))
        ties += tl.sum(m_tie.to(tl.int32))
    if MASKED:
        for start in range(needed, N, BLOCK):
            o_place = start + tl.arange(0, BLOCK)
            tl.store(p_hard + o_place, NOTHING, o_place < N)


@triton.jit(do_not_specialize=["N"])
def choose(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_flag,
    p_available,
    p_room,
    p_hard,
    B,
    K,
    N,
    D: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    MANY: tl.constexpr,
    BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (places of the room). For flagged rows writes Q^N, (B, N) int64, as `select` does.

    MANY is a power of two that covers B.
    """
    begin(OVERLAP)
    place, places = tl.program_id(0), tl.num_programs(0)
    o_row = tl.arange(0, MANY)
    b_flag = (tl.load(p_flag + o_row, o_row < B, 0) != 0).to(tl.int32)
    flagged = tl.sum(b_flag)
    p_room += place.to(tl.int64) * K
    for number in range(place, flagged, places):
        b_number = tl.cumsum(b_flag, 0) - 1
        row = tl.sum(tl.where((b_flag != 0) & (b_number == number), o_row, 0)).to(tl.int64)
        if number >= places:
            # All threads have read the row before, and none reads the next before it is written.
            tl.debug_barrier()
            _fill_alone(p_q, p_queue, p_image, p_queue_image, p_room, row, K, D, DIM, MASKED, KEYS)
            tl.debug_barrier()
        needed = tl.minimum(K, N)
        if MASKED:
            needed = tl.minimum(tl.load(p_available + row), N)
        _choose(p_room, p_hard + row * N, needed, K, N, MASKED, BLOCK)
