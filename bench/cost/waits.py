"""How often a warp waits for loads, one after another, by the scoreboards in the machine code.

Loads that are issued together arrive together. A load whose result is used before the next one is issued costs a
whole latency. No count of instructions or bytes shows it, and with few warps on a multiprocessor nothing hides it.
"""

from __future__ import annotations

from collections.abc import Sequence

from synco_fast.bench.cost.sass import Instruction

__all__ = ["waits"]

#: Clocks of a load from L2 and of other results, such as shared memory.
_LOAD, _OTHER = 600, 30


def waits(instructions: Sequence[Instruction]) -> list[float]:
    """Waits for loads before each instruction, in latencies of a load.

    A single warp runs straight through the code: each body of a loop once, and all branches. Copies to shared memory
    (LDGSTS) are not waited for here, since loops wait for those of an earlier iteration.
    """
    clock, found = 0, []
    # When the results on each scoreboard arrive, and whether a load is the last.
    busy: dict[int, tuple[int, bool]] = {}
    for one in instructions:
        waited = 0.0
        if one.control is None:
            found.append(waited)
            continue
        ends = [busy.pop(board) for board in one.control.waits if board in busy]
        until, load = max(ends, default=(clock, False))
        if until > clock:
            waited = (until - clock) / _LOAD if load else 0.0
            clock = until
        found.append(waited)
        clock += max(1, one.control.clocks)
        if one.control.sets is not None:
            load = one.base == "LDG"
            end = (clock + (_LOAD if load else _OTHER), load)
            busy[one.control.sets] = max(end, busy.get(one.control.sets, end))
    return found
