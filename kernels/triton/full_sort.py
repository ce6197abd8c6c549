"""The slow path of the selection: the whole row of similarities, sorted.

A few programs, each with room for one row, take the flagged rows in turn: similarities to all K keys, packed so that
integers order them, then a bitonic sort in that room. Exact for every input and every N up to K, with no room beyond
a fixed one and no wait for the host; on ordinary features no row comes here.
"""

# mypy: disable-error-code="misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.select import sortable, unsorted

__all__ = ["full_sort"]


@triton.jit
def _sort(p_room, length, BLOCK: tl.constexpr):
    """Sort the first ``length`` numbers of the room, a power of two, descending, and wait for all threads."""
    run = 2
    while run <= length:
        distance = run // 2
        while distance > 0:
            for start in range(0, length // 2, BLOCK):
                o_pair = start + tl.arange(0, BLOCK)
                m_pair = o_pair < length // 2
                # A zero bit inserted at the place of `distance`: the pairs are disjoint and cover the room.
                o_one = ((o_pair & -distance) << 1) | (o_pair & (distance - 1))
                o_other = o_one + distance
                one = tl.load(p_room + o_one, m_pair, 0)
                other = tl.load(p_room + o_other, m_pair, 0)
                descending = (o_one & run) == 0
                swap = descending == (one < other)
                tl.store(p_room + o_one, tl.where(swap, other, one), m_pair)
                tl.store(p_room + o_other, tl.where(swap, one, other), m_pair)
            # The next distance reads what other threads of this program have written.
            tl.debug_barrier()
            distance = distance // 2
        run = run * 2


@triton.jit
def full_sort(
    p_q,
    p_queue,
    p_image,
    p_queue_image,
    p_flag,
    p_room,
    p_hard_index,
    p_hard,
    B,
    K,
    N,
    length,
    few,
    D: tl.constexpr,
    DIM: tl.constexpr,
    MASKED: tl.constexpr,
    KEYS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (rooms,). For each flagged row writes Q^N as `select` does.

    length and few are K and N rounded up to powers of two.
    """
    p_room += tl.program_id(0).to(tl.int64) * length
    o_dim = tl.arange(0, DIM)
    m_dim = o_dim < D
    # The flags of this program's rows at once: nearly always there is nothing to do.
    o_row = tl.program_id(0) + tl.num_programs(0) * tl.arange(0, BLOCK)
    last = tl.where(tl.max(tl.load(p_flag + o_row, o_row < B, 0), axis=0) != 0, B, 0)
    for row_number in range(tl.program_id(0), last, tl.num_programs(0)):
        row = tl.full([], 0, tl.int64) + row_number
        if tl.load(p_flag + row) != 0:
            q = tl.load(p_q + row * D + o_dim, m_dim, 0).to(tl.float32)
            for start in range(0, length, KEYS):
                o_key = start + tl.arange(0, KEYS)
                m_key = o_key < K
                m_n = m_key[:, None] & m_dim[None, :]
                n = tl.load(p_queue + o_key[:, None].to(tl.int64) * D + o_dim[None, :], m_n, 0)
                similarity = tl.sum(n.to(tl.float32) * q[None, :], axis=1)
                if MASKED:
                    same = tl.load(p_queue_image + o_key, m_key, 0) == tl.load(p_image + row)
                    similarity = tl.where(same, float("-inf"), similarity)
                key = tl.where(m_key, sortable(similarity, o_key), -0x8000000000000000)
                tl.store(p_room + o_key, key, o_key < length)
            tl.debug_barrier()
            _sort(p_room, length, BLOCK)
            # Again by index, with masked keys behind all others and what was not chosen at the end.
            for start in range(0, few, BLOCK):
                o_place = start + tl.arange(0, BLOCK)
                m_place = o_place < few
                key = tl.load(p_room + o_place, m_place, 0)
                similarity, index = unsorted(key)
                place = tl.where(similarity == float("-inf"), -1, 0x7FFFFFFF) - index
                key = (place.to(tl.int64) << 32) | ((key >> 32) & 0xFFFFFFFF)
                tl.store(p_room + o_place, tl.where(o_place < N, key, -0x8000000000000000), m_place)
            tl.debug_barrier()
            _sort(p_room, few, BLOCK)
            for start in range(0, N, BLOCK):
                o_place = start + tl.arange(0, BLOCK)
                m_place = o_place < N
                key = tl.load(p_room + o_place, m_place, 0)
                place = (key >> 32).to(tl.int32)
                similarity, _ = unsorted(key << 32)
                index = tl.where(place < 0, -1, 0x7FFFFFFF) - place
                tl.store(p_hard + row * N + o_place, similarity, m_place)
                tl.store(p_hard_index + row * N + o_place, index, m_place)
            # The room is filled anew only after all have read it.
            tl.debug_barrier()
