"""Instruction counts of a launch by kind: machine code times trip counts."""

from __future__ import annotations

import ast
import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from synco_fast.bench.cost.sass import Instruction, Span, read, spans
from synco_fast.bench.cost.trips import Construct, Unknown, constructs_of, copied, mean_trips
from synco_fast.bench.cost.waits import waits

__all__ = ["Counts", "LoopCount", "count"]

_MATRIX = re.compile(r"^(?:HGMMA|QGMMA|IGMMA)\.(?P<m>\d+)x(?P<n>\d+)x(?P<k>\d+)")
_SMALL_MATRIX = re.compile(r"^[HIQ]MMA\.(?P<m>16)(?P<n>8)(?P<k>\d+)")
_WIDTHS = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
_LOADS = ("LDG", "LDGSTS")
_STORES = ("STG", "RED", "ATOMG", "ATOM")


@dataclass(frozen=True)
class LoopCount:
    """A loop of the machine code.

    Attributes:
        source: Source line of the loop.
        instructions: Instructions of one iteration, without inner loops.
        trips: Average iterations in a program, each time that the loop is entered.
        how: ``counted`` from source and launch, ``stated``, or ``assumed`` to iterate once.
    """

    source: str
    instructions: int
    trips: float
    how: str


@dataclass
class Counts:
    """Counts of one program, on average over the grid. Instruction counts are per warp.

    Attributes:
        instructions, shuffles, special, barriers: All; SHFL and REDUX; MUFU; BAR.
        loaded, stored: Bytes that all warps of a program load from and store to the L2 cache.
        waits: Waits for loads, one after another, in latencies of a load.
        flops: Tensor-core operations of the whole program.
        loops: The loops, in the order of the machine code.
        assumed: Source lines of branches with unknown conditions, which count as taken.
    """

    instructions: float = 0
    shuffles: float = 0
    special: float = 0
    barriers: float = 0
    loaded: float = 0
    stored: float = 0
    waits: float = 0
    flops: float = 0
    loops: list[LoopCount] = field(default_factory=list)
    assumed: list[str] = field(default_factory=list)


def count(
    sass: str,
    values: Mapping[str, Any],
    grid: tuple[int, ...],
    warps: int,
    kernel: str,
    stated: Callable[[str], float | None] = lambda line: None,
    module: Mapping[str, Any] | None = None,
) -> Counts:
    """Count the instructions of a program.

    Args:
        sass: Output of `nvdisasm -gi -c -hex`.
        values: The kernel's arguments by name.
        grid: Programs along each axis.
        warps: Warps of a program.
        kernel: Name of the kernel's function.
        stated: Function from the first source line of a loop or branch to its stated trip count, or None.
        module: The global names of the kernel's module.
    """
    instructions, labels = read(sass)
    counter = _Counter(instructions, values, grid, warps, kernel, stated, module or {})
    counter.add(spans(instructions, labels), 1.0, [])
    return counter.counts


class _Counter:
    def __init__(
        self,
        instructions: list[Instruction],
        values: Mapping[str, Any],
        grid: tuple[int, ...],
        warps: int,
        kernel: str,
        stated: Callable[[str], float | None],
        module: Mapping[str, Any],
    ) -> None:
        self.instructions, self.values, self.grid, self.warps, self.stated = instructions, values, grid, warps, stated
        self.module = module
        self.counts = Counts()
        self.met: dict[int, int] = defaultdict(int)
        around = {frames: constructs_of(frames, kernel) for frames in {one.frames for one in instructions}}
        self.waited = waits(instructions)
        self.paths = [around[one.frames] for one in instructions]

    def add(self, span: Span, times: float, above: list[tuple[Construct, bool]]) -> None:
        """Add a span that runs ``times``. ``above`` has the constructs of enclosing spans, and whether they loop."""
        for number in span.own():
            self._add(self.instructions[number], times)
            self.counts.waits += self.waited[number] * times
        siblings = [(inner, self._construct(inner, above)) for inner in span.inner]
        for inner, chosen in siblings:
            share, how = self._trips(inner, chosen, above, siblings)
            if not share:
                continue
            line = "" if chosen is None else _first_line(chosen[0])
            if inner.loop:
                own = len(inner.own(loops_only=True))
                self.counts.loops.append(LoopCount(line or "(no source)", own, share, how))
            elif how == "assumed" and line:
                self.counts.assumed.append(line)
            self.add(inner, times * share, [*above, *([(chosen[0], inner.loop)] if chosen else [])])

    def _construct(self, span: Span, above: list[tuple[Construct, bool]]) -> tuple[Construct, Any] | None:
        """The source loop or branch of a span, from the source lines of its instructions."""
        votes: dict[int, int] = defaultdict(int)
        known: dict[int, tuple[Construct, Any]] = {}
        if span.loop:
            # The innermost loop around its own instructions. A guard before it may belong to the same loop.
            taken = {id(node) for node, loop in above if loop}
            for number in span.own(loops_only=True) or range(span.begin, span.end):
                inside = itertools.takewhile(lambda found: id(found[0]) not in taken, reversed(self.paths[number]))
                for node, scope in inside:
                    if not isinstance(node, ast.If):
                        votes[id(node)] += 1
                        known[id(node)] = (node, scope)
                        break
        else:
            # The outermost construct that contains the span but not its branch.
            taken = {id(node) for node, _ in above} | {id(node) for node, _ in self.paths[span.begin - 1]}
            for number in range(span.begin, span.end):
                for node, scope in self.paths[number]:
                    if id(node) not in taken:
                        votes[id(node)] += 1
                        known[id(node)] = (node, scope)
                        break
        return known[max(votes, key=lambda key: votes[key])] if votes else None

    def _trips(
        self,
        span: Span,
        chosen: tuple[Construct, Any] | None,
        above: list[tuple[Construct, bool]],
        siblings: list[tuple[Span, tuple[Construct, Any] | None]],
    ) -> tuple[float, str]:
        if chosen is None:
            return 1.0, "assumed"
        node, scope = chosen
        guarded = any(node is other and not loop for other, loop in above)
        if (said := self.stated(_first_line(node))) is not None:
            return (said if span.loop or isinstance(node, ast.If) else min(1.0, said)), "stated"
        turn = self.met[id(node)]
        if not guarded:
            self.met[id(node)] += 1
        elif turn:
            turn -= 1
        try:
            found = mean_trips(node, scope, self.values, self.grid, turn, self.module)
        except Unknown:
            return 1.0, "assumed"
        mean = sum(found) / len(found)
        entered = sum(trips > 0 for trips in found) / len(found)
        if isinstance(node, ast.If):
            return mean, "counted"
        if not span.loop:
            # The guard in front of a loop, or a loop of at most one iteration.
            return entered, "counted"
        trips = mean / entered if guarded and entered else mean
        return self._unrolled(span, chosen, trips, siblings), "counted"

    def _unrolled(
        self,
        span: Span,
        chosen: tuple[Construct, Any],
        trips: float,
        siblings: list[tuple[Span, tuple[Construct, Any] | None]],
    ) -> float:
        """Iterations of the machine code's loop: fewer than in the source if a second loop takes the remainder."""
        # Calls of one function have loops of their own, and so do the copies of a `static_range`.
        same = [other for other, of in siblings if other.loop and of == chosen]
        if len(same) != 2 or copied(chosen[1]):
            return trips
        sizes = sorted(other.end - other.begin for other in same)
        factor = max(1, round(sizes[1] / max(1, sizes[0])))
        return trips // factor if span.end - span.begin == sizes[1] else trips % factor

    def _add(self, one: Instruction, times: float) -> None:
        counts, base = self.counts, one.base
        if base == "NOP":
            return
        counts.instructions += times
        if base in ("SHFL", "REDUX"):
            counts.shuffles += times
        elif base == "MUFU":
            counts.special += times
        elif base == "BAR":
            counts.barriers += times
        elif base in (*_LOADS, *_STORES):
            width = next((_WIDTHS[part] for part in one.opcode.split(".") if part in _WIDTHS), 4)
            moved = 32 * width * self.warps * times
            if base in _LOADS:
                counts.loaded += moved
            else:
                counts.stored += moved
        elif found := _MATRIX.match(one.opcode):
            # Four warps execute one of these together.
            counts.flops += 2 * int(found["m"]) * int(found["n"]) * int(found["k"]) * self.warps / 4 * times
        elif found := _SMALL_MATRIX.match(one.opcode):
            counts.flops += 2 * int(found["m"]) * int(found["n"]) * int(found["k"]) * self.warps * times


def _first_line(node: Construct) -> str:
    """The ``for ... in ...``, ``while ...`` or ``if ...`` of a construct."""
    if isinstance(node, ast.For):
        return f"for {ast.unparse(node.target)} in {ast.unparse(node.iter)}"
    return f"{'while' if isinstance(node, ast.While) else 'if'} {ast.unparse(node.test)}"
