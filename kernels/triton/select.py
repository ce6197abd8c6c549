"""Step 3, select: the N hardest keys of each row from its candidates, in queue order.

The scan leaves a row's candidates in segments, one for each lane of a split, each in queue order. `select` holds them
as a tensor with a row for each segment. It searches the order-preserving integers of their similarities until exactly N
of them are at or above a number, or until the N-th largest is known. In the second case it breaks ties in favour of the
smallest indices. No sort is needed, since Q^N is ordered by queue index.

A histogram, a gather or a scan over all candidates in one dimension exchanges them through shared memory. On an H100
the three together took more than half of this launch (bench/records/h100).

If the scan multiplied in lower precision than float32, its similarities do not decide which keys near the N-th belong
to Q^N. Keys within a margin of it (twice the largest error of the scan) are recomputed in float32, and the choice is
made again. With TF32, every key down to the margin is recomputed.

A row is flagged for the slow path (`full_select.py`) if it has too few candidates, more than the registers hold, more
in one segment than the segment holds, or if the margin reaches the threshold.
"""

# mypy: disable-error-code="attr-defined, misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.order import NOTHING, count_from, ordered, similarity_of, unordered
from synco_fast.kernels.triton.overlap import begin, release
from synco_fast.kernels.triton.scan import add_splits, two

__all__ = ["select"]


@triton.jit
def _log2(x):
    """log2 of float32 numbers of 1 and more, off by 0.009 at most: the exponent, and a parabola between powers of two.

    It steers a search, so that speed matters and last digits do not. `tl.log2` takes several times the instructions.
    """
    bits = x.to(tl.int32, bitcast=True)
    fraction = (bits & 0x7FFFFF).to(tl.float32) * 2.0**-23
    return ((bits >> 23) - 127).to(tl.float32) + fraction * (1.344 - 0.344 * fraction)


@triton.jit
def _cut(b_order, needed, low, high, reached, DEVICE: tl.constexpr):
    """Search for the threshold: the largest integer with at least `needed` numbers at or above it.

    Stops early at an integer with exactly `needed`. On entry `reached` numbers are at or above low, and none is above
    high. A difference of the bounds is taken as uint32, so that it cannot overflow.

    The logarithm of the count falls about linearly near the threshold. Each step interpolates it between the bounds by
    the Illinois method (Dowell and Jarratt 1971): where a bound stays a second time, the distance of its logarithm is
    halved. The eighth step bisects, and so do the sixteenth and all later ones: two halvings of at most 2^32 integers,
    and then 31, so that no input takes more than 48 steps. Among equal numbers interpolation converges slowly.

    Returns the integer, and how many numbers are at or above it.
    """
    step = 0
    side = 0
    target = _log2(needed.to(tl.float32) + 0.5)
    above = _log2(reached.to(tl.float32) + 0.5) - target
    # 0.5 numbers above high + 1: one less than the logarithm of 1.
    below = target + 1
    while (low < high) & (reached != needed):
        span = (high - low).to(tl.uint32, bitcast=True)
        share = tl.where((step == 7) | (step > 14), 0.5, above / (above + below))
        # At most 2^31: a larger share of a whole span, rounded up, would not fit into uint32.
        ahead = tl.minimum(share * span.to(tl.float32), 2147483648.0).to(tl.uint32)
        middle = low + tl.minimum(tl.maximum(ahead, 1), span).to(tl.int32, bitcast=True)
        count = count_from(b_order, middle, DEVICE)
        distance = _log2(count.to(tl.float32) + 0.5) - target
        enough = count >= needed
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
        reached = tl.where(enough, count, reached)
        moved = tl.where(enough, 1, -1)
        kept = tl.where(moved == side, 0.5, 1.0)
        above = tl.where(enough, distance, above * kept)
        below = tl.where(enough, below * kept, -distance)
        side = moved
        step += 1
    return low, reached


@triton.jit
def _places(b_number):
    """Place of each 1 among all ones of a (LISTS, SEGMENT) tensor of zeros and ones, list by list."""
    b_own = tl.sum(b_number, axis=1)
    b_before = tl.cumsum(b_own, 0) - b_own
    return b_before[:, None] + tl.cumsum(b_number, 1) - b_number


# As in the scan, inline assembly keeps the layout: `tl.store` would first move every tensor to another one.
_NOTE = tl.constexpr(
    "{ .reg .pred kept; .reg .b64 address; setp.ge.s32 kept, $2, 0; mad.wide.s32 address, $2, 4, $1;"
    " @kept st.global.b32 [address], $3; mov.b32 $0, $2; }"
)
_PUT = tl.constexpr(
    "{ .reg .pred kept; .reg .b64 address; setp.ge.s32 kept, $2, 0; mad.wide.s32 address, $2, 8, $1;"
    " @kept st.global.b64 [address], $3; mov.b32 $0, $2; }"
)

#: The place of minus infinity in the order. It exceeds no threshold.
_LAST = tl.constexpr(-0x7F800001)


@triton.jit
def _note(p_number, b_place, b_number, DEVICE: tl.constexpr):
    """Store numbers at their places, those at negative places nowhere."""
    if DEVICE:
        given = [p_number.to(tl.int64), b_place, b_number]
        tl.inline_asm_elementwise(_NOTE, "=r,l,r,r", given, dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(p_number + b_place, b_number, b_place >= 0)


@triton.jit
def _put(p_hard, b_place, b_found, DEVICE: tl.constexpr):
    """Store candidates at their places, those at negative places nowhere."""
    if DEVICE:
        given = [p_hard.to(tl.int64), b_place, b_found]
        tl.inline_asm_elementwise(_PUT, "=r,l,r,l", given, dtype=tl.int32, is_pure=False, pack=1)
    else:
        tl.store(p_hard + b_place, b_found, b_place >= 0)


@triton.jit(do_not_specialize=["K", "N"])
def select(
    p_q,
    p_queue,
    p_found,
    p_count,
    p_place,
    p_threshold,
    p_shift,
    p_available,
    p_scan_sum,
    p_scan_rank,
    p_scan_total,
    p_hard,
    p_flag,
    p_sum,
    p_rank,
    p_total,
    B,
    K,
    N,
    lists,
    room,
    LISTS: tl.constexpr,
    SEGMENT: tl.constexpr,
    CAPACITY: tl.constexpr,
    MASKED: tl.constexpr,
    D: tl.constexpr,
    DIM: tl.constexpr,
    KEYS: tl.constexpr,
    MARGIN: tl.constexpr,
    EVERY: tl.constexpr,
    SPLITS: tl.constexpr,
    STEP: tl.constexpr,
    DEVICE: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Grid (B,). Writes Q^N, (B, N) int64, and a flag for rows that need the slow path.

    found is (B, room) int64, SEGMENT places for each list. Both hold the similarity in the high word and the index in
    the low word. If a row may use fewer than N keys, the rest of its Q^N is -inf with index 0. count is (B, lists)
    int32. place, (B, CAPACITY) int32, is scratch space. MARGIN is twice the error of similarities of unit rows, 0 if
    they are exact. EVERY recomputes all keys down to the margin, KEYS at a time.

    Also adds up what the scan wrote for each split: sum, float32, and rank, int32, (B,), and total, (B, D) float32.
    """
    begin(OVERLAP)
    row = tl.program_id(0).to(tl.int64)
    o_dim = tl.arange(0, DIM)
    # Not in `reduce`: they would have left L2 by then (bench/records/h100).
    b_sum, b_rank, b_total = add_splits(p_scan_sum, p_scan_rank, p_scan_total, row, B, o_dim, D, SPLITS, STEP)
    sum_of_row, rank_of_row = tl.reduce((b_sum, b_rank), 0, two)
    tl.store(p_sum + row, sum_of_row)
    tl.store(p_rank + row, rank_of_row)
    tl.store(p_total + row * D + o_dim, tl.sum(b_total, axis=0), o_dim < D)
    available = K
    if MASKED:
        available = tl.load(p_available + row)
    needed = tl.minimum(available, N)
    o_list = tl.arange(0, LISTS)
    b_count = tl.load(p_count + row * lists + o_list, o_list < lists, 0)
    # Read before anything is added up between threads, so that the program waits once. A selection by m_all behind the
    # read would keep the predicates, of which a thread has seven, and make ptxas wait for one load after another.
    threshold = tl.load(p_threshold + row)
    o_place = tl.arange(0, SEGMENT)
    m_all = o_place[None, :] < b_count[:, None]
    p_found += row * room
    o_found = o_list[:, None] * SEGMENT + o_place[None, :]
    b_order = ordered(similarity_of(tl.load(p_found + o_found, m_all, NOTHING)))
    total = tl.sum(b_count)
    longest = tl.max(b_count)
    flag = (total < needed) | (total > CAPACITY) | (longest > SEGMENT)
    tl.store(p_flag + row, flag.to(tl.int32))
    if flag == 0:
        low, high = ordered(threshold) + 1, tl.max(b_order)
        last, reached = _cut(b_order, needed, low, high, total, DEVICE)
        if MARGIN > 0:
            border = unordered(last)
            margin = MARGIN * tl.maximum(1, tl.load(p_shift + row))
            flag = (total < available) & ~(border - margin > threshold)
            tl.store(p_flag + row, flag.to(tl.int32))
            b_similarity = unordered(b_order)
            b_near = (b_order > _LAST) & ~(b_similarity < border - margin)
            if not EVERY:
                b_near = b_near & ~(b_similarity >= border + margin)
            near = tl.sum(b_near.to(tl.int32))
            p_place += row * CAPACITY
            _note(p_place, tl.where(b_near, _places(b_near.to(tl.int32)), -1), o_found, DEVICE)
            tl.debug_barrier()
            m_dim = o_dim < D
            q = tl.load(p_q + row * D + o_dim, m_dim, 0).to(tl.float32)
            for start in range(0, near, KEYS):
                o_near = start + tl.arange(0, KEYS)
                # Beyond the last, the last again: masks would make ptxas wait for one load after another.
                p_near = p_found + tl.load(p_place + tl.minimum(o_near, near - 1))
                key = tl.load(p_near) & 0xFFFFFFFF
                n = tl.load(p_queue + key[:, None] * D + o_dim[None, :], m_dim[None, :], 0).to(tl.float32)
                exact = tl.sum(n * q[None, :], axis=1)
                exact = tl.where(exact == float("-inf"), -3.4028235e38, exact).to(tl.int32, bitcast=True)
                tl.store(p_near, (exact.to(tl.int64) << 32) | key, o_near < near)
            tl.debug_barrier()
            # Read all once more: there are no registers that could hold them meanwhile. Keys above the margin are not
            # recomputed. Nothing that belongs behind the N-th comes before them: it is below the margin's middle plus
            # the error of a similarity, and they are above that. So N of them are still above the margin's lower end,
            # where that is a number.
            b_order = ordered(similarity_of(tl.load(p_found + o_found, m_all, NOTHING)))
            low = ordered(border - margin)
            reached = tl.sum((b_order >= low).to(tl.int32))
            low = tl.where(reached < needed, _LAST + 1, low)
            reached = tl.where(reached < needed, total, reached)
            last, reached = _cut(b_order, needed, low, tl.max(b_order), reached, DEVICE)
        b_chosen = (b_order >= last).to(tl.int32)
        if reached != needed:
            b_tie = (b_order == last).to(tl.int32)
            spare = reached - needed
            tied = tl.sum(b_tie)
            b_chosen = tl.where((b_tie == 1) & (_places(b_tie) >= tied - spare), 0, b_chosen)
        release(OVERLAP)
        p_hard += row * N
        b_to = tl.where(b_chosen == 1, _places(b_chosen), -1)
        # Read what is chosen once more. The registers that would hold it during the search would halve the number of
        # programs at a time.
        b_found = tl.load(p_found + o_found, b_chosen == 1)
        _put(p_hard, b_to, b_found, DEVICE)
        if MASKED:
            o_all = tl.arange(0, CAPACITY)
            tl.store(p_hard + o_all, NOTHING, (o_all >= needed) & (o_all < N))
