"""Asynchronous products of four warps (wgmma): operands in shared memory, swizzled, and results that come at a wait."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine.arithmetic import canonical
from tests.support.ptx_machine.faults import Fault
from tests.support.ptx_machine.memory_access import chosen
from tests.support.ptx_machine.operands import reader
from tests.support.ptx_machine.parse import Address, Immediate, Instruction, Operand, Register
from tests.support.ptx_machine.shared import ORIGIN
from tests.support.ptx_machine.warp import as_halves, as_tf32

__all__ = ["Products", "check_fences", "decode", "is_product", "registers_of"]

Array = NDArray[Any]
Run = Callable[[Any, Any], None]

_NAME = re.compile(r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(\w+)\.(\w+)")
#: Address bits that a swizzle mode changes, by the mode of a descriptor: 128, 64 and 32 bytes.
_SWIZZLES = {0: 0, 1: 7, 2: 3, 3: 1}


def is_product(name: str) -> bool:
    """Whether an instruction needs all four warps of a group."""
    return name.startswith("wgmma.mma_async")


def decode(instruction: Instruction) -> Run | None:
    """The function of an instruction, or None if it is not one of these."""
    name = instruction.name
    if name == "wgmma.fence.sync.aligned":
        # `check_fences` has looked at what stands around it.
        return lambda s, m: None
    if name == "wgmma.commit_group.sync.aligned":
        return lambda s, m: s.products.commit(chosen(s, m))
    if name == "wgmma.wait_group.sync.aligned":
        (left,) = instruction.operands
        assert isinstance(left, Immediate), instruction
        pending = left.value
        return lambda s, m: s.products.wait(chosen(s, m), pending)
    if name.startswith("fence.proxy.async"):
        return lambda s, m: s.shared.fence(chosen(s, m))
    if is_product(name):
        return _product(instruction)
    return None


def check_fences(instructions: list[Instruction], labels: set[int]) -> None:
    """Every product has a wgmma.fence before it, behind whatever changes its registers.

    Raises:
        Fault: One has not.
    """
    for place, instruction in enumerate(instructions):
        if not is_product(instruction.name):
            continue
        # Accumulators, and a factor in registers; descriptors need no fence.
        own = _registers(tuple(operand for operand in instruction.operands[:2] if isinstance(operand, tuple)))
        for earlier in range(place - 1, -1, -1):
            other = instructions[earlier]
            if other.name.startswith("wgmma.fence"):
                break
            written = () if is_product(other.name) or other.name.startswith("wgmma") else other.operands[:1]
            if earlier + 1 in labels or _registers(written) & own:
                raise Fault(f"no wgmma.fence between a product and what changes its registers\n    {instruction}")
        else:
            raise Fault(f"a product without a wgmma.fence before it\n    {instruction}")


def registers_of(instruction: Instruction) -> frozenset[int]:
    """Registers that an instruction reads or writes."""
    found = _registers(instruction.operands)
    for operand in instruction.operands:
        if isinstance(operand, Address) and isinstance(operand.base, Register):
            found.add(operand.base.number)
    if instruction.guard:
        found.add(instruction.guard.number)
    return frozenset(found)


def _registers(operands: tuple[Operand, ...]) -> set[int]:
    found = set()
    for operand in operands:
        for one in operand if isinstance(operand, tuple) else (operand,):
            if isinstance(one, Register):
                found.add(one.number)
    return found


@dataclass
class _Flying:
    """Products of some threads that have not been waited for."""

    threads: Array
    group: Array
    registers: frozenset[int]
    granules: Array
    readers: Array


class Products:
    """Products under way: nobody may touch their registers, or write the shared memory that they read."""

    def __init__(self, s: Any) -> None:
        self.s = s
        self.under_way: list[_Flying] = []
        self.committed = np.zeros(s.shape, np.int64)

    def launch(self, threads: Array, registers: frozenset[int], readers: Array, granules: Array) -> None:
        """Products have started. ``granules``, (readers, any), are what each of some threads reads."""
        shared = self.s.shared
        if shared.held is None:
            shared.held = np.zeros(len(shared.stamps), np.int32)
        self._hold(readers, granules, 1)
        self.under_way.append(_Flying(threads, np.full(len(threads), -1), registers, granules, readers))

    def commit(self, threads: Array) -> None:
        """The products that these threads have started since are one group."""
        mine = self._mask(threads)
        for one in self.under_way:
            some = mine[one.threads] & (one.group < 0)
            one.group[some] = self.committed[one.threads[some]]
        self.committed[threads] += 1

    def wait(self, threads: Array, pending: int) -> None:
        """All groups but the last ``pending`` of these threads are done."""
        mine = self._mask(threads)
        left = []
        for one in self.under_way:
            done = mine[one.threads] & (one.group >= 0) & (one.group < self.committed[one.threads] - pending)
            readers = self._mask(one.threads[done])[one.readers]
            if readers.any():
                # The products may have read until now.
                self._hold(one.readers[readers], one.granules[readers], -1)
                self.s.shared.note_read(one.readers[readers], one.granules[readers], whole=True)
            if not done.all():
                stay = ~done
                left.append(
                    _Flying(
                        one.threads[stay], one.group[stay], one.registers, one.granules[~readers], one.readers[~readers]
                    )
                )
        self.under_way = left

    def _hold(self, readers: Array, granules: Array, by: int) -> None:
        """Count the readers of granules, of which no warp has one twice."""
        warps = self.s.warp[readers]
        for warp in np.unique(warps):
            self.s.shared.held[granules[warps == warp]] += by

    def check(self, m: Any, registers: frozenset[int]) -> None:
        """Threads are about to use these registers."""
        for one in self.under_way:
            if registers & one.registers:
                inside = one.threads if m is None else one.threads[m[one.threads]]
                if len(inside):
                    raise Fault("a register of a product that has not been waited for", int(inside[0]))

    def _mask(self, threads: Array) -> Array:
        found = np.zeros(self.s.shape, bool)
        found[threads] = True
        return found


def _product(instruction: Instruction) -> Run | None:
    parts = _NAME.fullmatch(instruction.name)
    if not parts or parts[3] != parts[4]:
        return None
    columns, depth, kind = int(parts[1]), int(parts[2]), parts[3]
    if (kind, depth) not in (("bf16", 16), ("f16", 16), ("tf32", 8)):
        return None
    target, left, right, scale, *options = instruction.operands
    flags = [getattr(option, "value", None) for option in options]
    # Signs of both factors, then whether they are transposed; those in registers and those of 32 bits cannot be.
    assert flags[:2] == [1, 1], instruction
    in_registers = isinstance(left, tuple)
    turned = [0, *flags[2:]] if in_registers else flags[2:]
    turned = [*turned, 0, 0][:2]
    assert set(turned) <= {0, 1}, instruction
    assert isinstance(target, tuple), instruction
    numbers = [part.number for part in target if isinstance(part, Register)]
    assert len(numbers) == columns // 2, instruction
    lefts = [reader(part, "u32") for part in left] if isinstance(left, tuple) else [reader(left, "u64")]
    right_of = reader(right, "u64")
    kept = reader(scale, "pred")
    registers = frozenset(_registers(tuple(one for one in (target, left) if isinstance(one, tuple))))
    words = depth if kind == "tf32" else depth // 2

    def run(s: Any, m: Any) -> None:
        threads = chosen(s, m)
        if not len(threads):
            return
        groups = threads.reshape(-1, 128)
        pair = _pair(right_of, s, groups)
        read = [_Matrix(s, groups, pair, columns, turned[1], every=True)]
        if in_registers:
            # (groups, 4 warps, 8 rows, 4 lanes of a row, halves of the columns, halves of the rows)
            a = np.stack([np.broadcast_to(one(s), s.shape)[groups] for one in lefts], axis=-1)
            a = a.reshape(-1, 4, 8, 4, 2, 2).transpose(0, 1, 5, 2, 4, 3).reshape(len(groups), 64, words)
        else:
            read.append(_Matrix(s, groups, _pair(lefts[0], s, groups), 64, turned[0], every=False))
            a = read[1].words()
        x = as_tf32(a) if kind == "tf32" else as_halves(a, kind).reshape(len(groups), 64, depth)
        b = read[0].words()
        y = as_tf32(b) if kind == "tf32" else as_halves(b, kind).reshape(len(groups), columns, depth)
        total = x @ y.transpose(0, 2, 1)
        # Accumulators: (groups, 4 warps, 8 rows, 4 lanes of a row, columns / 8, halves of the rows, pairs of columns)
        before = np.stack([s.r[number][groups] for number in numbers], axis=-1).view(np.float32)
        before = before.reshape(-1, 4, 8, 4, columns // 8, 2, 2).transpose(0, 1, 5, 2, 4, 3, 6)
        before = before.reshape(len(groups), 64, columns).astype(np.float64)
        add = np.broadcast_to(kept(s), s.shape)[groups][:, :1, None]
        found = canonical((total + np.where(add, before, 0)).astype(np.float32))
        found = found.reshape(-1, 4, 2, 8, columns // 8, 4, 2).transpose(0, 1, 3, 5, 4, 2, 6).reshape(-1, columns // 2)
        bits = np.ascontiguousarray(found).view(np.uint32)
        for place, number in enumerate(numbers):
            if m is None:
                s.r[number] = np.ascontiguousarray(bits[:, place])
            else:
                value = s.r[number].copy()
                value[threads] = bits[:, place]
                s.r[number] = value
        for one in read:
            s.products.launch(one.readers, registers, one.readers, one.granules)
        s.products.launch(threads, registers, threads[:0], np.zeros((0, 1), np.int64))

    return run


def _pair(read: Any, s: Any, groups: Array) -> Array:
    """The descriptor of each group of warps."""
    found = np.broadcast_to(read(s), s.shape)[groups]
    if (found != found[:, :1]).any():
        raise Fault("threads of a product have several descriptors", int(groups[0, 0]))
    return found[:, 0]


class _Matrix:
    """An operand in shared memory: ``rows`` of 32 bytes each, of which every warp reads all, or its own quarter."""

    def __init__(self, s: Any, groups: Array, descriptor: Array, rows: int, turned: int, *, every: bool) -> None:
        self.s, self.turned, self.rows = s, turned, rows
        start, leading, stride = (
            (descriptor >> np.uint64(shift) & np.uint64(0x3FFF)).astype(np.int64) * 16 for shift in (0, 16, 32)
        )
        mode = (descriptor >> np.uint64(62)).astype(np.int64)
        first = int(groups[0, 0])
        if (descriptor >> np.uint64(49) & np.uint64(7)).any() or (mode != mode[0]).any():
            raise NotImplementedError("a base offset in a descriptor, or several swizzles at once")
        bits = _SWIZZLES[int(mode[0])]
        # Chunks of 16 bytes. Rows of an operand that is not turned have two; a turned one has chunks of eight rows.
        width = bits + 1
        leading, stride = leading[:, None, None], stride[:, None, None]
        if turned:
            outer, inner = np.arange(rows // 8)[:, None], np.arange(16)
            if bits:
                offset = outer % width * 16 + inner % 8 * 16 * width + outer // width * leading + inner // 8 * stride
            else:
                offset = inner % 8 * 16 + outer * stride + inner // 8 * leading
        else:
            outer, inner = np.arange(rows)[:, None], np.arange(2)
            if bits:
                offset = outer % 8 * 16 * width + inner * 16 + outer // 8 * stride
            else:
                offset = outer % 8 * 16 + outer // 8 * stride + inner * leading
        address = start[:, None, None] + offset
        address ^= (address >> 7 & bits) << 4
        place = address - ORIGIN
        if ((place < 0) | (place + 16 > s.shared.limit)).any():
            raise Fault(f"a product reads out of the {s.shared.limit} bytes of shared memory", first)
        #: (groups, outer, inner)
        self.place = s.cta[groups[:, 0]][:, None, None] * s.shared.size + place
        granule = s.shared.granule
        granules = (self.place[..., None] // granule + np.arange(16 // granule)).reshape(len(groups), -1)
        self.readers = groups[:, ::32].reshape(-1)
        # What is turned is not divided among the warps here.
        whole = every or turned
        self.granules = np.repeat(granules, 4, axis=0) if whole else granules.reshape(len(groups) * 4, -1)
        s.shared.check_proxy(self.readers, self.granules)
        s.shared.note_read(self.readers, self.granules, whole=True)

    def words(self) -> Array:
        """(groups, rows, words) of 32 bits, with the depth in the last dimension."""
        chunks = self.s.shared.data.reshape(-1, 16)[self.place // 16]
        if not self.turned:
            return np.ascontiguousarray(chunks).view(np.uint32).reshape(len(chunks), self.rows, -1)
        # (groups, chunks of rows, depth, 8 rows)
        halves = np.ascontiguousarray(chunks).view(np.uint16).reshape(len(chunks), self.rows // 8, 16, 8)
        halves = halves.transpose(0, 1, 3, 2).reshape(len(chunks), self.rows, 16)
        return np.ascontiguousarray(halves).view(np.uint32)
