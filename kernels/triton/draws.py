"""The slots of a program of `mix`, and their random draws.

A slot is one synthetic negative. A program takes a run of consecutive slots of each family of a row. It draws for all
of them, one slot per thread, and writes what it drew to scratch memory, where the families follow one another in the
order of TABLE. Threads that share a slot read it there; otherwise each would have to draw it again.

The scratch memory has four numbers of n_i for each of WIDTH slots, (WIDTH, 4) float32: its queue index as bits, b, a
and q.n_i. After these come as many of n_j: its queue index, c, 0 and 0.

TABLE has a tuple for each family: number, count, range of t (two values), constant and slope of a, b and c, sigma, eta,
largest t, and column in the statistics.
"""

# mypy: disable-error-code="assignment, misc, import-untyped, untyped-decorator, no-untyped-def, no-untyped-call"

from __future__ import annotations

import triton
import triton.language as tl

from synco_fast.kernels.triton.order import similarity_of
from synco_fast.kernels.triton.philox import philox, pick, uniform

__all__ = ["DRAWN", "before", "draw", "paired", "read", "run_of", "share", "slots_of", "summed"]

#: Numbers of a slot in the scratch memory.
DRAWN = 8


@triton.constexpr_function
def run_of(TABLE, PARTS, family):
    """Slots of a family that each of PARTS programs takes."""
    return -(-TABLE[family][1] // PARTS)


@triton.constexpr_function
def share(TABLE, PARTS, family):
    """Slots of a program that the families before this one take."""
    return sum(-(-row[1] // PARTS) for row in TABLE[:family])


@triton.constexpr_function
def before(TABLE, family):
    """Slots of all programs taken by the families before this one."""
    return sum(row[1] for row in TABLE[:family])


@triton.constexpr_function
def summed(TABLE):
    """How many families have only a and b. They are the first of the table (`config.table`)."""
    return sum(not any(row[8:12]) for row in TABLE)


@triton.constexpr_function
def paired(TABLE, family):
    """Whether a family has a second hard negative."""
    return bool(TABLE[family][8] or TABLE[family][9])


@triton.constexpr_function
def _threads(size):
    return 1 << (size - 1).bit_length()


@triton.constexpr_function
def _whole(TABLE, PARTS, family, block):
    """Whether the slots of a family fill whole blocks of all programs."""
    return TABLE[family][1] % (PARTS * block) == 0


@triton.jit
def slots_of(o_own, part, TABLE: tl.constexpr, PARTS: tl.constexpr, FAMILY: tl.constexpr):
    """Where a program's slots of a family are in the row, and whether they are slots.

    ``o_own`` is a block of slots, counted from the program's first of the family.
    """
    o_slot = before(TABLE, FAMILY) + part * run_of(TABLE, PARTS, FAMILY) + o_own
    if _whole(TABLE, PARTS, FAMILY, o_own.shape[0]):
        m_slot = tl.full(o_own.shape, True, tl.int1)
    else:
        # The last program may have fewer than the others.
        m_slot = (o_own < run_of(TABLE, PARTS, FAMILY)) & (o_slot < before(TABLE, FAMILY + 1))
    return o_slot, m_slot


@triton.jit
def read(p_drawn, o_own, m_slot, NUMBER: tl.constexpr):
    """A number of n_i of some slots, 0 where there is no slot. Those of n_j are 4 * WIDTH further."""
    return tl.load(p_drawn + 4 * o_own + NUMBER, m_slot, 0)


@triton.jit
def _write(p_drawn, o_own, m_slot, hard, b, a, KNOWN: tl.constexpr):
    """Write all four numbers of keys of Q^N; 0 for a similarity that nobody reads."""
    key = hard.to(tl.int32).to(tl.float32, bitcast=True)
    known = similarity_of(hard) if KNOWN else a * 0
    four = tl.join(tl.join(key, a), tl.join(b, known))
    four = tl.reshape(four, [o_own.shape[0], 4])
    tl.store(p_drawn + 4 * o_own[:, None] + tl.arange(0, 4)[None, :], four, m_slot[:, None])


@triton.jit
def draw(
    p_hard,
    p_drawn,
    size,
    c0,
    k0,
    k1,
    part,
    TABLE: tl.constexpr,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    KNOWN: tl.constexpr,
):
    """Write the program's random draws. Only the first KNOWN families need q.n_i."""
    first_hard, second_hard, t = (), (), ()
    # All families' reads before the first write: the compiler cannot know that they do not overlap, and would wait.
    for family in tl.static_range(0, len(TABLE)):
        o_own = tl.arange(0, _threads(run_of(TABLE, PARTS, family)))
        o_slot, m_slot = slots_of(o_own, part, TABLE, PARTS, family)
        c1 = (o_slot - before(TABLE, family)).to(tl.uint32)
        zero = c1 * 0
        w0, w1, w2, w3 = philox(c0 + zero, c1, zero + TABLE[family][0], zero, k0, k1)
        first = pick(w1, w3 >> 16, size + zero)
        second = pick(w2, w3 & 0xFFFF, size + zero)
        low, high, most = TABLE[family][2], TABLE[family][3], TABLE[family][12]
        t += (tl.minimum(low + (high - low) * uniform(w0), most),)
        first_hard += (tl.load(p_hard + first, m_slot, 0),)
        second_hard += (tl.load(p_hard + second, m_slot, 0) if paired(TABLE, family) else first,)
    for family in tl.static_range(0, len(TABLE)):
        o_own = tl.arange(0, _threads(run_of(TABLE, PARTS, family)))
        _, m_slot = slots_of(o_own, part, TABLE, PARTS, family)
        p_own = p_drawn + 4 * share(TABLE, PARTS, family)
        a = TABLE[family][4] + TABLE[family][5] * t[family]
        b = TABLE[family][6] + TABLE[family][7] * t[family]
        _write(p_own, o_own, m_slot, first_hard[family], b, a, family < KNOWN)
        if paired(TABLE, family):
            c = TABLE[family][8] + TABLE[family][9] * t[family]
            _write(p_own + 4 * WIDTH, o_own, m_slot, second_hard[family], c, a * 0, False)
