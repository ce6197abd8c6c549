"""Parser for machine code (SASS): instructions with source lines, loops, and spans that branches skip."""

from __future__ import annotations

import bisect
import re
from dataclasses import dataclass, field, replace
from typing import NamedTuple

__all__ = ["Control", "Frame", "Instruction", "Span", "read", "spans"]

#: A file and a line number.
Frame = tuple[str, int]

_LINE = re.compile(r'//## File "(?P<file>[^"]+)", line (?P<line>\d+)(?P<inlined> inlined at)?')
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:(?P<predicate>@!?U?P\w+)\s+)?(?P<opcode>[A-Z][\w.]*)(?P<rest>.*)")
#: The second half of an instruction's code, on a line of its own.
_CODE = re.compile(r"^\s*/\* 0x(?P<code>[0-9a-f]{16}) \*/\s*$")
_LABEL = re.compile(r"^(?P<label>\.L_\w+):")
_TARGET = re.compile(r"\((?P<label>\.L_\w+)\)")
#: A forward branch over fewer instructions than this is ignored.
_SHORT = 24


class Control(NamedTuple):
    """What the hardware is told about an instruction. A warp has six scoreboards, numbered from 0.

    Attributes:
        clocks: Clocks until the next instruction.
        sets: The scoreboard that is busy until the result is there, or None.
        waits: The scoreboards that must be free before the instruction is issued.
    """

    clocks: int
    sets: int | None
    waits: tuple[int, ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        opcode: Opcode with suffixes.
        predicated: Whether it has a predicate.
        frames: Source locations, innermost first; an inlined call adds the line of its caller.
        target: Target label of a branch.
        control: Waits and scoreboards; None if the disassembly has no codes.
    """

    opcode: str
    predicated: bool
    frames: tuple[Frame, ...]
    target: str | None = None
    control: Control | None = None

    @property
    def base(self) -> str:
        """The opcode without suffixes."""
        return self.opcode.partition(".")[0]


@dataclass
class Span:
    """A range of instructions that may run a different number of times than the code around it.

    Attributes:
        begin, end: Half-open range of instruction numbers. The branch that skips a span is just before it.
        loop: Whether its last instruction branches back to its first. Otherwise a branch before it can skip it.
        inner: Nested spans.
    """

    begin: int
    end: int
    loop: bool
    inner: list[Span] = field(default_factory=list)

    def own(self, *, loops_only: bool = False) -> list[int]:
        """Numbers of the instructions outside of nested spans, or outside of nested loops."""
        inside: set[int] = set()
        for span in self.inner:
            if span.loop or not loops_only:
                inside.update(range(span.begin, span.end))
            else:
                inside.update(set(range(span.begin, span.end)) - set(span.own(loops_only=True)))
        return [number for number in range(self.begin, self.end) if number not in inside]


def read(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """The instructions in the output of ``nvdisasm -gi -c -hex``, and the instruction number of each label.

    BRA.DIV branches to code for diverged warps. The warps of these kernels do not diverge, so this branch is never
    taken, and the code that only it reaches is omitted.
    """
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    frames: list[Frame] = []
    after_instruction = True
    for line in text.splitlines():
        if found := _LINE.search(line):
            if after_instruction:
                frames = []
            frames.append((found["file"], int(found["line"])))
            after_instruction = False
        elif found := _LABEL.match(line):
            labels[found["label"]] = len(instructions)
        elif found := _INSTRUCTION.search(line):
            target = _TARGET.search(found["rest"]) if found["opcode"].startswith("BRA") else None
            # A uniform branch has its predicate after the opcode.
            predicated = bool(found["predicate"]) or bool(target and "UP" in found["rest"])
            label = target["label"] if target else None
            instructions.append(Instruction(found["opcode"], predicated, tuple(frames), label))
            after_instruction = True
        elif (found := _CODE.match(line)) and instructions and instructions[-1].control is None:
            instructions[-1] = replace(instructions[-1], control=_control(int(found["code"], 16)))
    # After the code follow a branch to itself and padding.
    for number, one in enumerate(instructions):
        if one.target is not None and labels.get(one.target) == number:
            return _together(instructions[:number], labels)
    return _together(instructions, labels)


def _control(code: int) -> Control:
    """The control part of an instruction's upper 64 bits (capability 7.0 and later), from bit 41 on.

    Four bits of clocks, one to yield, three each for the scoreboards of result and operands, six of scoreboards to wait
    for. 7 is no scoreboard (Jia et al., arXiv 1804.06826, section 2.1).
    """
    sets = code >> 46 & 7
    waits = tuple(board for board in range(6) if code >> 52 + board & 1)
    return Control(code >> 41 & 15, None if sets == 7 else sets, waits)


def _together(instructions: list[Instruction], labels: dict[str, int]) -> tuple[list[Instruction], dict[str, int]]:
    """Code and labels without the code that only diverged warps reach."""
    parted = _reached(instructions, labels, parted=True) - _reached(instructions, labels, parted=False)
    kept = [number for number in range(len(instructions)) if number not in parted]
    moved = {label: bisect.bisect_left(kept, number) for label, number in labels.items() if number not in parted}
    straight = (instructions[number] for number in kept)
    return [replace(one, target=None) if one.opcode == "BRA.DIV" else one for one in straight], moved


def _reached(instructions: list[Instruction], labels: dict[str, int], *, parted: bool) -> set[int]:
    """Numbers of the instructions reachable from the entry, with or without the branches of diverged warps."""
    reached: set[int] = set()
    ahead = [0]
    while ahead:
        number = ahead.pop()
        while number < len(instructions) and number not in reached:
            reached.add(number)
            one = instructions[number]
            divergent = one.opcode == "BRA.DIV"
            if one.target in labels and (parted or not divergent):
                ahead.append(labels[one.target])
            leaves = one.target in labels or one.base in ("EXIT", "RET")
            if leaves and not one.predicated and not divergent:
                break
            number += 1
    return reached


def spans(instructions: list[Instruction], labels: dict[str, int]) -> Span:
    """The whole function as a span, with its loops and skipped spans nested inside."""
    found: dict[tuple[int, int], Span] = {}
    backward: dict[int, int] = {}
    chosen: set[int] = set()
    dominated = _Dominators(instructions, labels)
    for number, one in enumerate(instructions):
        if one.base == "EXIT" and one.predicated:
            place = len(instructions)
        elif one.target in labels:
            place = labels[one.target]
        else:
            continue
        if place <= number:
            # Out-of-line code branches back without being a loop.
            if dominated(number, by=place):
                backward[place] = max(backward.get(place, 0), number + 1)
        elif place - number - 1 >= _SHORT and place <= len(instructions) and (one.predicated or number + 1 in chosen):
            found.setdefault((number + 1, place), Span(number + 1, place, loop=False))
        # The other side of a branch, if this side ends with a branch over it.
        if one.predicated and place > number:
            chosen.add(place)
    for begin, end in backward.items():
        found[begin, end] = Span(begin, end, loop=True)
    whole = Span(0, len(instructions), loop=False)
    open_spans = [whole]
    for span in sorted(found.values(), key=lambda span: (span.begin, -span.end)):
        while open_spans[-1].end <= span.begin:
            open_spans.pop()
        if span.end > open_spans[-1].end:
            # Two spans overlap without nesting. A branch out of a loop skips nothing in it; else cut the later span.
            if open_spans[-1].loop or span.loop:
                continue
            span.end = open_spans[-1].end
        open_spans[-1].inner.append(span)
        open_spans.append(span)
    return whole


class _Dominators:
    """Dominators: the blocks that every path from the entry to an instruction passes."""

    def __init__(self, instructions: list[Instruction], labels: dict[str, int]) -> None:
        ends = {0, len(instructions)}
        for number, one in enumerate(instructions):
            if one.target in labels or one.base in ("EXIT", "RET"):
                ends.add(number + 1)
            if one.target in labels:
                ends.add(labels[one.target])
        self._starts = sorted(end for end in ends if end <= len(instructions))
        blocks = len(self._starts) - 1
        before: list[set[int]] = [set() for _ in range(blocks)]
        for block in range(blocks):
            last = instructions[self._starts[block + 1] - 1]
            if last.target in labels and labels[last.target] < len(instructions):
                before[self.block_of(labels[last.target])].add(block)
            leaves = (last.target in labels or last.base in ("EXIT", "RET")) and not last.predicated
            if not leaves and block + 1 < blocks:
                before[block + 1].add(block)
        everything = set(range(blocks))
        self._over = [{0}] + [everything] * (blocks - 1)
        changed = True
        while changed:
            changed = False
            for block in range(1, blocks):
                over = set.intersection(*(self._over[one] for one in before[block])) if before[block] else set()
                over = over | {block}
                if over != self._over[block]:
                    self._over[block], changed = over, True

    def block_of(self, number: int) -> int:
        """The basic block of an instruction."""
        return bisect.bisect_right(self._starts, number) - 1

    def __call__(self, number: int, *, by: int) -> bool:
        """Whether every path to instruction ``number`` passes ``by``, the first instruction of a block."""
        return self.block_of(by) in self._over[self.block_of(number)]
