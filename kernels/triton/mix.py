"""Step 4, mix: the synthetic negatives.

A slot is one synthetic negative. A program takes consecutive slots of each family of a row. First it draws the random
numbers of all its slots, one slot per thread, and writes them to scratch memory. The threads that share a slot read
them there; otherwise each of these threads would have to draw them again. Then the program forms

    x = a q + b n_i + c n_j + sigma e + eta sign(q),    s = x / |x|

for a block of slots at a time, and adds exp((q.s - m) / T) s to its sum. No synthetic vector is written to memory.

Families with only a and b need no x: the selection has q.n_i already, and only |n_i|^2 is summed. If the terms of |x|^2
cancel, this loses digits. Such slots form x in registers, as the other families do.

The kernel writes the similarities q.s, and `reduce` computes the loss and the statistics from them. The description of
the negatives is a compile-time constant: a new family of this form is a new row of the launcher's table.
"""

# mypy: disable-error-code="assignment, misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.overlap import begin
from synco_fast.kernels.triton.philox import normal, philox, pick, uniform

__all__ = ["mix"]

#: |x|^2 counts as cancelled below this fraction of the sum of its squared terms, as in `mixing.py`.
_CANCELLED = tl.constexpr(0.1)


@triton.constexpr_function
def run_of(TABLE, PARTS, SLOTS, family):
    """Slots of a part that a family takes, rounded up to whole blocks."""
    return -(-TABLE[family][1] // (PARTS * SLOTS)) * SLOTS


@triton.constexpr_function
def share(TABLE, PARTS, SLOTS, family):
    """Slots of a part that the families before this one take."""
    return sum(-(-row[1] // (PARTS * SLOTS)) * SLOTS for row in TABLE[:family])


@triton.constexpr_function
def before(TABLE, family):
    """Slots of all parts taken by the families before this one."""
    return sum(row[1] for row in TABLE[:family])


@triton.jit
def _draw(
    p_hard_index,
    p_hard,
    p_drawn,
    size,
    c0,
    k0,
    k1,
    part,
    TABLE: tl.constexpr,
    SLOTS: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Write the part's random draws, (4, WIDTH) float32: t, the two keys as bits, and q.n_i.

    Each is written only for the families that need it.
    """
    o_mine = tl.arange(0, WIDTH)
    number = o_mine * 0
    slot = o_mine * 0
    count = o_mine * 0
    pairs = o_mine * 0
    ranged = o_mine * 0
    scalar = o_mine * 0
    low = tl.zeros([WIDTH], tl.float32)
    span = tl.zeros([WIDTH], tl.float32)
    most = tl.zeros([WIDTH], tl.float32)
    for family in tl.static_range(0, len(TABLE)):
        o_own = o_mine - share(TABLE, PARTS, SLOTS, family)
        here = o_own >= 0
        number = tl.where(here, TABLE[family][0], number)
        slot = tl.where(here, part * run_of(TABLE, PARTS, SLOTS, family) + o_own, slot)
        count = tl.where(here, TABLE[family][1], count)
        paired = TABLE[family][8] != 0 or TABLE[family][9] != 0
        affine = not paired and TABLE[family][10] == 0 and TABLE[family][11] == 0
        sloped = TABLE[family][5] != 0 or TABLE[family][7] != 0 or TABLE[family][9] != 0
        pairs = tl.where(here, TABLE[family][1] if paired else 0, pairs)
        ranged = tl.where(here, TABLE[family][1] if sloped else 0, ranged)
        scalar = tl.where(here, TABLE[family][1] if affine else 0, scalar)
        low = tl.where(here, TABLE[family][2], low)
        span = tl.where(here, TABLE[family][3] - TABLE[family][2], span)
        most = tl.where(here, TABLE[family][12], most)
    m_slot = slot < count
    c1 = slot.to(tl.uint32)
    zero = c1 * 0
    w0, w1, w2, w3 = philox(c0 + zero, c1, number.to(tl.uint32), zero, k0, k1)
    first = pick(w1, w3 >> 16, size + zero)
    second = pick(w2, w3 & 0xFFFF, size + zero)
    # Reads before writes: the compiler cannot know that they do not overlap, and would wait for each.
    first_key = tl.load(p_hard_index + first, m_slot, 0)
    second_key = tl.load(p_hard_index + second, slot < pairs, 0)
    m_known = slot < scalar
    known = tl.load(p_hard + first, m_known, 0)
    tl.store(p_drawn + o_mine, tl.minimum(low + span * uniform(w0), most), slot < ranged)
    tl.store(p_drawn + WIDTH + o_mine, first_key.to(tl.float32, bitcast=True))
    # Also for unused slots: whole blocks are read, so every key must be a valid queue index.
    m_block = pairs > 0
    tl.store(p_drawn + 2 * WIDTH + o_mine, second_key.to(tl.float32, bitcast=True), m_block)
    tl.store(p_drawn + 3 * WIDTH + o_mine, known, m_known)


@triton.jit
def _keys(p_queue, p_key, o_slot, D: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """The vectors of a block of drawn keys, as PIECES tensors (SLOTS, PIECE) float32."""
    key = tl.load(p_key + o_slot).to(tl.int32, bitcast=True).to(tl.int64)
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
def _family(
    p_queue,
    p_drawn,
    p_similarity,
    q,
    squared,
    shift,
    scale,
    c0,
    k0,
    k1,
    part,
    b_total,
    b_along,
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
    """Add one family's slots of this part to the sum of vectors, (SLOTS, D) in pieces, and to the weight of q."""
    NUMBER: tl.constexpr = TABLE[FAMILY][0]
    COUNT: tl.constexpr = TABLE[FAMILY][1]
    A: tl.constexpr = TABLE[FAMILY][4]
    A_SLOPE: tl.constexpr = TABLE[FAMILY][5]
    FIRST: tl.constexpr = TABLE[FAMILY][6]
    FIRST_SLOPE: tl.constexpr = TABLE[FAMILY][7]
    SECOND: tl.constexpr = TABLE[FAMILY][8]
    SECOND_SLOPE: tl.constexpr = TABLE[FAMILY][9]
    SIGMA: tl.constexpr = TABLE[FAMILY][10]
    ETA: tl.constexpr = TABLE[FAMILY][11]
    PAIRED: tl.constexpr = SECOND != 0 or SECOND_SLOPE != 0
    SLOPED: tl.constexpr = A_SLOPE != 0 or FIRST_SLOPE != 0 or SECOND_SLOPE != 0
    RUN: tl.constexpr = 128 // p_queue.dtype.element_ty.primitive_bitwidth
    p_drawn += share(TABLE, PARTS, SLOTS, FAMILY)
    OWN: tl.constexpr = run_of(TABLE, PARTS, SLOTS, FAMILY)
    for start in tl.range(0, OWN, SLOTS, num_stages=STAGES):
        o_mine = start + tl.arange(0, SLOTS)
        o_slot = part * OWN + o_mine
        m_slot = o_slot < COUNT
        t = tl.load(p_drawn + o_mine, m_slot, 0) if SLOPED else tl.zeros([SLOTS], tl.float32)
        a = A + A_SLOPE * t
        b = FIRST + FIRST_SLOPE * t
        n = _keys(p_queue, p_drawn + WIDTH, o_mine, D, PIECE, PIECES)
        if PAIRED or SIGMA != 0 or ETA != 0:
            x = ()
            if PAIRED:
                c = SECOND + SECOND_SLOPE * t
                other = _keys(p_queue, p_drawn + 2 * WIDTH, o_mine, D, PIECE, PIECES)
            for piece in tl.static_range(0, PIECES):
                x_piece = b[:, None] * n[piece]
                if A != 0 or A_SLOPE != 0:
                    x_piece += a[:, None] * q[piece]
                if PAIRED:
                    x_piece += c[:, None] * other[piece]
                if ETA != 0:
                    sign = q[piece].to(tl.int32, bitcast=True) & -0x80000000
                    strength = (sign ^ (q[piece] * 0 + ETA).to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
                    x_piece += tl.where(q[piece] == 0, 0.0, strength)
                if SIGMA != 0:
                    e = _noise(c0, o_slot.to(tl.uint32), k0, k1, NUMBER, SIGMA, piece * PIECE, PIECE, RUN, DEVICE)
                    x_piece += tl.where((piece * PIECE + tl.arange(0, PIECE) < D)[None, :], e, 0)
                x += (x_piece,)
            inverse = tl.rsqrt(tl.maximum(_inner(x, x, PIECES), 1e-24))
            similarity = _inner(x, q, PIECES) * inverse
            weight = tl.where(m_slot, tl.exp2(similarity * scale - shift) * inverse, 0)
        else:
            known = tl.load(p_drawn + 3 * WIDTH + o_mine, m_slot, 0)
            own = a * a * squared + b * b * _inner(n, n, PIECES)
            length = own + 2 * a * b * known
            cancelled = m_slot & (length < own * _CANCELLED)
            inverse = tl.rsqrt(tl.maximum(length, 1e-24))
            similarity = (a * squared + b * known) * inverse
            p = tl.exp2(similarity * scale - shift)
            x = n
            if tl.max(cancelled.to(tl.int32), axis=0) > 0:
                sums = ()
                for piece in tl.static_range(0, PIECES):
                    sums += (a[:, None] * q[piece] + b[:, None] * n[piece],)
                other_inverse = tl.rsqrt(tl.maximum(_inner(sums, sums, PIECES), 1e-24))
                other_similarity = _inner(sums, q, PIECES) * other_inverse
                similarity = tl.where(cancelled, other_similarity, similarity)
                weight = tl.where(cancelled, tl.exp2(other_similarity * scale - shift) * other_inverse, 0)
                b_total = _add(b_total, weight, sums, PIECES)
            weight = tl.where(m_slot & (cancelled == 0), p * inverse, 0)
            b_along += weight * a
            weight *= b
        b_total = _add(b_total, weight, x, PIECES)
        tl.store(p_similarity + before(TABLE, FAMILY) + o_slot, similarity, m_slot)
    return b_total, b_along


@triton.jit
def _add(b_total, weight, x, PIECES: tl.constexpr):
    """``b_total`` plus the weighted vectors, piece by piece."""
    total = ()
    for piece in tl.static_range(0, PIECES):
        total += (b_total[piece] + weight[:, None] * x[piece],)
    return total


# Without this, a seed or step of 1 or divisible by 16 would compile the kernel again.
@triton.jit(do_not_specialize=["K", "N", "seed", "step", "first_row"])
def mix(
    p_q,
    p_queue,
    p_hard_index,
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
    row without keys. drawn, (B, PARTS, 4, WIDTH) float32, is scratch space; WIDTH covers the `share` of all families.

    TABLE has a tuple for each family: number, count, range of t (two values), constant and slope of a, b and c, sigma,
    eta, largest t, and column in the statistics.
    """
    begin(OVERLAP)
    row = tl.program_id(0)
    part = tl.program_id(1)
    row64 = row.to(tl.int64)
    COUNT: tl.constexpr = before(TABLE, len(TABLE))
    available = K
    if MASKED:
        available = tl.load(p_available + row)
    p_similarity += row64 * COUNT
    # The whole row at once, for its length. The pieces are then in the cache, where they are read one after another.
    o_row = tl.arange(0, PIECE * PIECES)
    b_row = tl.load(p_q + row64 * D + o_row, o_row < D, 0).to(tl.float32)
    shift = tl.load(p_shift + row) * scale
    # Outside the branch, since Triton does not allow a name to change its type in one.
    if STEP_ON_DEVICE:
        step = tl.load(p_step)
    squared = tl.sum(b_row * b_row)
    q = ()
    b_total = ()
    for piece in tl.static_range(0, PIECES):
        o_dim = piece * PIECE + tl.arange(0, PIECE)
        q += (tl.load(p_q + row64 * D + o_dim, o_dim < D, 0).to(tl.float32)[None, :],)
        b_total += (tl.zeros([SLOTS, PIECE], tl.float32),)
    b_along = tl.zeros([SLOTS], tl.float32)
    if available > 0:
        k0, k1 = seed.to(tl.uint32), step.to(tl.uint32)
        c0 = (first_row + row).to(tl.uint32)
        size = tl.minimum(available, N).to(tl.uint32)
        p_drawn += (row64 * PARTS + part) * 4 * WIDTH
        _draw(p_hard_index + row64 * N, p_hard + row64 * N, p_drawn, size, c0, k0, k1, part, TABLE, SLOTS, PARTS, WIDTH)
        # Other threads of this program read these draws.
        tl.debug_barrier()
        for family in tl.static_range(0, len(TABLE)):
            b_total, b_along = _family(
                p_queue,
                p_drawn,
                p_similarity,
                q,
                squared,
                shift,
                scale,
                c0,
                k0,
                k1,
                part,
                b_total,
                b_along,
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
    else:
        for start in range(0, COUNT, WIDTH):
            o_slot = start + tl.arange(0, WIDTH)
            tl.store(p_similarity + o_slot, float("-inf"), o_slot < COUNT)
    along = tl.sum(b_along)
    for piece in tl.static_range(0, PIECES):
        o_dim = piece * PIECE + tl.arange(0, PIECE)
        b_out = tl.sum(b_total[piece] + q[piece] * (along / SLOTS), axis=0)
        tl.store(p_total + (row64 * PARTS + part) * D + o_dim, b_out, o_dim < D)
