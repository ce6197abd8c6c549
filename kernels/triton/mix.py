"""Step 4, mix: the synthetic negatives.

A slot is one synthetic negative. A program draws the random numbers of its slots (`draws.py`) and then forms

    x = a q + b n_i + c n_j + sigma e + eta sign(q),    s = x / |x|

for a block of slots at a time, and adds exp((q.s - m) / T) s to its sum. No synthetic vector is written to memory.

Families with only a and b need no x. The selection has q.n_i, so

    |x|^2 = a^2 |q|^2 + b^2 |n_i|^2 + 2 a b q.n_i

lacks only |n_i|^2. If these terms cancel, their sum loses digits. Such slots are marked, with a similarity of inf, and
form x afterwards. On an H100, tensor cores took longer for inner products and sums of keys (bench/records/h100).

The kernel writes the similarities q.s, and `reduce` computes the loss and the statistics from them. The description of
the negatives is a compile-time constant: a new family of this form is a new row of the launcher's table.
"""

# mypy: disable-error-code="assignment, misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.draws import before, draw, paired, read, run_of, share, slots_of, summed
from synco_fast.kernels.triton.overlap import begin, release
from synco_fast.kernels.triton.philox import normal, philox

__all__ = ["mix"]

#: |x|^2 counts as cancelled below this fraction of the sum of its squared terms, as in `mixing.py`.
_CANCELLED = tl.constexpr(0.1)
#: What is written as the similarity of a slot whose terms cancel.
_MARK = tl.constexpr(float("inf"))


@triton.jit
def _weigh(own, double, inner, m_slot, shift, scale):
    """Similarities and weights of slots without their x.

    Args:
        own: The squared terms of |x|^2.
        double: Half of its other terms.
        inner: q.x.

    Returns:
        q.s, or _MARK where the terms cancel; exp((q.s - m) / T) / |x|, or 0 where they cancel or there is no slot; and
        where they cancel.
    """
    length = own + 2 * double
    cancelled = m_slot & (length < own * _CANCELLED)
    inverse = tl.rsqrt(tl.maximum(length, 1e-24))
    similarity = inner * inverse
    weight = tl.where(m_slot & (cancelled == 0), tl.exp2(similarity * scale - shift) * inverse, 0)
    return tl.where(cancelled, _MARK, similarity), weight, cancelled


@triton.jit
def _keys(p_queue, p_drawn, o_own, m_slot, D: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """The vectors of a block of drawn keys, as PIECES tensors (SLOTS, PIECE) float32."""
    key = read(p_drawn, o_own, m_slot, 0).to(tl.int32, bitcast=True).to(tl.int64)
    n = ()
    for piece in tl.static_range(0, PIECES):
        o_dim = piece * PIECE + tl.arange(0, PIECE)
        n += (tl.load(p_queue + key[:, None] * D + o_dim[None, :], (o_dim < D)[None, :], 0).to(tl.float32),)
    return n


@triton.jit
def _four_normal(c0, c1, k0, k1, lane, NUMBER: tl.constexpr, SIGMA: tl.constexpr, DEVICE: tl.constexpr):
    """Four normal numbers of deviation SIGMA for each slot and lane of the counter, (SLOTS, lanes, 4)."""
    many = (c1 * 0)[:, None] + lane[None, :] * 0
    w0, w1, w2, w3 = philox(many + c0, many + c1[:, None], many + NUMBER, many + lane[None, :], k0, k1)
    e0, e1, e2, e3 = normal(w0, w1, w2, w3, SIGMA, DEVICE)
    four = tl.join(tl.join(e0, e2), tl.join(e1, e3))
    return tl.reshape(four, [c1.shape[0], lane.shape[0], 4])


@triton.jit
def _noise(
    c0,
    c1,
    k0,
    k1,
    NUMBER: tl.constexpr,
    SIGMA: tl.constexpr,
    FIRST: tl.constexpr,
    PIECE: tl.constexpr,
    RUN: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Normal numbers of deviation SIGMA of a block of slots for PIECE dimensions from FIRST on, (SLOTS, PIECE).

    A thread holds RUN (4 or 8) consecutive numbers of a vector. It draws exactly these, so none moves between threads.
    """
    SLOTS: tl.constexpr = c1.shape[0]
    lane = 1 + FIRST // 4 + tl.arange(0, PIECE // RUN).to(tl.uint32) * (RUN // 4)
    e = _four_normal(c0, c1, k0, k1, lane, NUMBER, SIGMA, DEVICE)
    if RUN == 8:
        e = tl.permute(tl.join(e, _four_normal(c0, c1, k0, k1, lane + 1, NUMBER, SIGMA, DEVICE)), (0, 1, 3, 2))
    return tl.reshape(e, [SLOTS, PIECE])


@triton.jit
def _inner(x, y, PIECES: tl.constexpr):
    """Row-wise inner products, (SLOTS,)."""
    b_sum = x[0] * y[0]
    for piece in tl.static_range(1, PIECES):
        b_sum += x[piece] * y[piece]
    return tl.sum(b_sum, axis=1)


@triton.jit
def _add(b_total, weight, x, PIECES: tl.constexpr):
    """``b_total`` plus the weighted vectors, piece by piece."""
    total = ()
    for piece in tl.static_range(0, PIECES):
        total += (b_total[piece] + weight[:, None] * x[piece],)
    return total


@triton.jit
def _lengths(
    p_queue,
    p_drawn,
    p_similarity,
    squared,
    shift,
    scale,
    part,
    b_total,
    b_along,
    b_marked,
    TABLE: tl.constexpr,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add a family with only a and b: to the sum of vectors, the weights of q and the number of marked slots."""
    p_drawn += 4 * share(TABLE, PARTS, FAMILY)
    for start in tl.range(0, run_of(TABLE, PARTS, FAMILY), SLOTS, num_stages=STAGES):
        o_own = start + tl.arange(0, SLOTS)
        o_slot, m_slot = slots_of(o_own, part, TABLE, PARTS, FAMILY)
        a, b = read(p_drawn, o_own, m_slot, 2), read(p_drawn, o_own, m_slot, 1)
        n = _keys(p_queue, p_drawn, o_own, m_slot, D, PIECE, PIECES)
        known = read(p_drawn, o_own, m_slot, 3)
        own = a * a * squared + b * b * _inner(n, n, PIECES)
        inner = a * squared + b * known
        similarity, weight, cancelled = _weigh(own, a * b * known, inner, m_slot, shift, scale)
        b_marked += cancelled.to(tl.int32)
        b_along += weight * a
        b_total = _add(b_total, weight * b, n, PIECES)
        tl.store(p_similarity + o_slot, similarity, m_slot)
    return b_total, b_along, b_marked


@triton.jit
def _finish(p_similarity, o_slot, m_slot, x, q, shift, scale, b_total, PIECES: tl.constexpr):
    """Add the slots of some vectors x to the sum of vectors, and write their similarities."""
    inverse = tl.rsqrt(tl.maximum(_inner(x, x, PIECES), 1e-24))
    similarity = _inner(x, q, PIECES) * inverse
    weight = tl.where(m_slot, tl.exp2(similarity * scale - shift) * inverse, 0)
    tl.store(p_similarity + o_slot, similarity, m_slot)
    return _add(b_total, weight, x, PIECES)


@triton.jit
def _cancelled(
    p_queue,
    p_drawn,
    p_similarity,
    q,
    shift,
    scale,
    part,
    b_total,
    TABLE: tl.constexpr,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Add the marked slots of a family to the sum of vectors.

    Apart from `_vectors`, so that each line is of one branch of `mix`: `bench loss --model` counts this one as never
    taken, and machine code of Triton 3.6 names no caller.
    """
    p_drawn += 4 * share(TABLE, PARTS, FAMILY)
    for start in range(0, run_of(TABLE, PARTS, FAMILY), SLOTS):
        o_own = start + tl.arange(0, SLOTS)
        o_slot, m_slot = slots_of(o_own, part, TABLE, PARTS, FAMILY)
        m_slot &= tl.load(p_similarity + o_slot, m_slot, 0) == _MARK
        # Several threads read a mark, and one of them overwrites it.
        tl.debug_barrier()
        a, b = read(p_drawn, o_own, m_slot, 2), read(p_drawn, o_own, m_slot, 1)
        n = _keys(p_queue, p_drawn, o_own, m_slot, D, PIECE, PIECES)
        x = ()
        for piece in tl.static_range(0, PIECES):
            x += (a[:, None] * q[piece] + b[:, None] * n[piece],)
        b_total = _finish(p_similarity, o_slot, m_slot, x, q, shift, scale, b_total, PIECES)
    return b_total


@triton.jit
def _vectors(
    p_queue,
    p_drawn,
    p_similarity,
    q,
    shift,
    scale,
    c0,
    k0,
    k1,
    part,
    b_total,
    TABLE: tl.constexpr,
    FAMILY: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    DEVICE: tl.constexpr,
):
    """Add a family to the sum of vectors, (SLOTS, D) in pieces."""
    SIGMA: tl.constexpr = TABLE[FAMILY][10]
    ETA: tl.constexpr = TABLE[FAMILY][11]
    RUN: tl.constexpr = 128 // p_queue.dtype.element_ty.primitive_bitwidth
    p_drawn += 4 * share(TABLE, PARTS, FAMILY)
    for start in tl.range(0, run_of(TABLE, PARTS, FAMILY), SLOTS, num_stages=STAGES):
        o_own = start + tl.arange(0, SLOTS)
        o_slot, m_slot = slots_of(o_own, part, TABLE, PARTS, FAMILY)
        a, b = read(p_drawn, o_own, m_slot, 2), read(p_drawn, o_own, m_slot, 1)
        n = _keys(p_queue, p_drawn, o_own, m_slot, D, PIECE, PIECES)
        if paired(TABLE, FAMILY):
            c = read(p_drawn + 4 * WIDTH, o_own, m_slot, 1)
            other = _keys(p_queue, p_drawn + 4 * WIDTH, o_own, m_slot, D, PIECE, PIECES)
        x = ()
        for piece in tl.static_range(0, PIECES):
            x_piece = b[:, None] * n[piece]
            if TABLE[FAMILY][4] != 0 or TABLE[FAMILY][5] != 0:
                x_piece += a[:, None] * q[piece]
            if paired(TABLE, FAMILY):
                x_piece += c[:, None] * other[piece]
            if ETA != 0:
                sign = q[piece].to(tl.int32, bitcast=True) & -0x80000000
                strength = (sign ^ (q[piece] * 0 + ETA).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
                x_piece += tl.where(q[piece] == 0, 0.0, strength)
            if SIGMA != 0:
                c1 = (o_slot - before(TABLE, FAMILY)).to(tl.uint32)
                e = _noise(c0, c1, k0, k1, TABLE[FAMILY][0], SIGMA, piece * PIECE, PIECE, RUN, DEVICE)
                x_piece += tl.where((piece * PIECE + tl.arange(0, PIECE) < D)[None, :], e, 0)
            x += (x_piece,)
        b_total = _finish(p_similarity, o_slot, m_slot, x, q, shift, scale, b_total, PIECES)
    return b_total


# Without this, a seed or step of 1 or divisible by 16 would compile the kernel again.
@triton.jit(do_not_specialize=["K", "N", "seed", "step", "first_row"])
def mix(
    p_q,
    p_queue,
    p_hard,
    p_shift,
    p_available,
    p_step,
    p_drawn,
    p_total,
    p_similarity,
    K,
    N,
    scale,
    seed,
    step,
    first_row,
    TABLE: tl.constexpr,
    D: tl.constexpr,
    PIECE: tl.constexpr,
    PIECES: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED: tl.constexpr,
    STEP_ON_DEVICE: tl.constexpr,
    DEVICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (B, PARTS).

    Writes the part's sum of exp((q.s - m) / T) s, (B, PARTS, D), and all q.s, (B, M), both float32. q.s is -inf for a
    row without keys. drawn, (B, PARTS, 8, WIDTH) float32, is scratch space. `draws.py` describes it and TABLE.
    """
    row = tl.program_id(0)
    part = tl.program_id(1)
    row64 = row.to(tl.int64)
    COUNT: tl.constexpr = before(TABLE, len(TABLE))
    # Families that form x only if it cancels.
    SUMMED: tl.constexpr = summed(TABLE)
    # Whether the row has keys; without a mask it does.
    available = K
    some = True
    if MASKED:
        available = tl.load(p_available + row)
        some = available > 0
    p_similarity += row64 * COUNT
    p_total += (row64 * PARTS + part) * D
    # The whole row at once, for its length. The pieces are then in the cache, where they are read one after another.
    o_row = tl.arange(0, PIECE * PIECES)
    b_row = tl.load(p_q + row64 * D + o_row, o_row < D, 0).to(tl.float32)
    shift = tl.load(p_shift + row, cache_modifier=".cg") * scale
    # Outside the branch, since Triton does not allow a name to change its type in one.
    if STEP_ON_DEVICE:
        step = tl.load(p_step)
    squared = tl.sum(b_row * b_row)
    k0, k1 = seed.to(tl.uint32), step.to(tl.uint32)
    c0 = (first_row + row).to(tl.uint32)
    along = 0.0
    marked = 0
    p_drawn += (row64 * PARTS + part) * 8 * WIDTH
    begin(OVERLAP)
    if some:
        size = tl.minimum(available, N).to(tl.uint32)
        draw(p_hard + row64 * N, p_drawn, size, c0, k0, k1, part, TABLE, PARTS, WIDTH, SUMMED)
        # Other threads of this program read these draws.
        tl.debug_barrier()
    else:
        for start in range(0, COUNT, 256):
            o_slot = start + tl.arange(0, 256)
            tl.store(p_similarity + o_slot, float("-inf"), o_slot < COUNT)
    q = ()
    b_total = ()
    for piece in tl.static_range(0, PIECES):
        o_dim = piece * PIECE + tl.arange(0, PIECE)
        q += (tl.load(p_q + row64 * D + o_dim, o_dim < D, 0).to(tl.float32)[None, :],)
        b_total += (tl.zeros([SLOTS, PIECE], tl.float32),)
    # Triton decides the first when it compiles, and not "and" of the two.
    if SUMMED > 0:  # noqa: SIM102
        if some:
            b_along = tl.zeros([SLOTS], tl.float32)
            b_marked = tl.zeros([SLOTS], tl.int32)
            for family in tl.static_range(0, SUMMED):
                b_total, b_along, b_marked = _lengths(
                    p_queue,
                    p_drawn,
                    p_similarity,
                    squared,
                    shift,
                    scale,
                    part,
                    b_total,
                    b_along,
                    b_marked,
                    TABLE,
                    family,
                    D,
                    PIECE,
                    PIECES,
                    SLOTS,
                    PARTS,
                    WIDTH,
                    STAGES,
                )
            along = tl.sum(b_along)
            marked = tl.sum(b_marked)
    if marked > 0:
        # Other threads of this program marked the slots.
        tl.debug_barrier()
        for family in tl.static_range(0, SUMMED):
            b_total = _cancelled(
                p_queue,
                p_drawn,
                p_similarity,
                q,
                shift,
                scale,
                part,
                b_total,
                TABLE,
                family,
                D,
                PIECE,
                PIECES,
                SLOTS,
                PARTS,
                WIDTH,
            )
    if some:
        for family in tl.static_range(SUMMED, len(TABLE)):
            b_total = _vectors(
                p_queue,
                p_drawn,
                p_similarity,
                q,
                shift,
                scale,
                c0,
                k0,
                k1,
                part,
                b_total,
                TABLE,
                family,
                D,
                PIECE,
                PIECES,
                SLOTS,
                PARTS,
                WIDTH,
                STAGES,
                DEVICE,
            )
    release(OVERLAP)
    for piece in tl.static_range(0, PIECES):
        o_dim = piece * PIECE + tl.arange(0, PIECE)
        # q is added once, in equal shares of the slots, of which there is a power of two.
        b_out = tl.sum(b_total[piece] + q[piece] * (along / SLOTS), axis=0)
        tl.store(p_total + o_dim, b_out, o_dim < D)
