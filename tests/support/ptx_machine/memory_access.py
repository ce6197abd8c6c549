"""Loads, stores, atomic additions and asynchronous copies, as functions on the state of the machine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine.operands import DTYPES, bits_of, reader, writer
from tests.support.ptx_machine.parse import Address, Immediate, Instruction, Operand, Register, Symbol

__all__ = ["address_reader", "chosen", "decode", "spaces_of", "width_of"]

Array = NDArray[Any]
Run = Callable[[Any, Any], None]

_IGNORED = {
    "weak",
    "relaxed",
    "volatile",
    "nc",
    "ca",
    "cg",
    "cs",
    "cv",
    "lu",
    "wb",
    "wt",
    "sys",
    "gpu",
    "cta",
    "L1",
    "L2",
}


def chosen(s: Any, m: Any) -> Array:
    """The numbers of the threads of a mask."""
    return s.everyone if m is None else np.flatnonzero(m)


def address_reader(operand: Operand) -> Callable[[Any, Array], Array]:
    """A function that gives the addresses of some threads, as uint64."""
    assert isinstance(operand, Address), operand
    base, offset = operand.base, np.uint64(operand.offset & (1 << 64) - 1)
    if isinstance(base, Register):
        number = base.number
        # A 32-bit address is one of shared memory.
        return lambda s, threads: s.r[number][threads].astype(np.uint64) + offset
    if isinstance(base, Immediate):
        return lambda s, threads: np.full(len(threads), base.value + operand.offset, np.uint64)
    name = base.name
    return lambda s, threads: np.full(len(threads), s.symbol(name) + base.offset + operand.offset, np.uint64)


def spaces_of(name: str) -> str:
    """The state space of a load or store: global, shared or param."""
    words = name.replace("::", ".").split(".")
    return next((word for word in ("global", "shared", "param", "local", "const") if word in words), "generic")


def width_of(name: str) -> tuple[str, int]:
    """The type of an access and the number of its elements."""
    words = name.split(".")
    count = next((int(word[1:]) for word in words if word in ("v2", "v4", "v8")), 1)
    return words[-1], count


def decode(instruction: Instruction) -> Run | None:
    """The function of an instruction, or None if it is not one of these."""
    name = instruction.name
    first = name.split(".")[0]
    if first in ("ld", "st"):
        space = spaces_of(name)
        kind, count = width_of(name)
        known = {first, space, kind, f"v{count}"} | _IGNORED
        if any(word.split("::")[0] not in known for word in name.split(".")):
            return None
        if first == "ld" and space == "param":
            return _parameter(instruction, kind)
        if space not in ("global", "shared"):
            return None
        return (_load if first == "ld" else _store)(instruction, space, kind, count)
    if first in ("atom", "red"):
        return _atomic(instruction, name.split("."))
    if first == "cp" and name.startswith("cp.async.") and "bulk" not in name:
        return _asynchronous(instruction)
    if first in ("prefetch", "discard", "applypriority"):
        return lambda s, m: None
    return None


def _parameter(instruction: Instruction, kind: str) -> Run:
    target, source = instruction.operands
    assert isinstance(source, Address), instruction
    assert isinstance(source.base, Symbol), instruction
    name, put = source.base.name, writer(target)
    dtype = DTYPES[f"u{bits_of(kind)}"]
    return lambda s, m: put(s, np.full(s.shape, s.parameters[name], dtype), m)


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _load(instruction: Instruction, space: str, kind: str, count: int) -> Run:
    target, source = instruction.operands
    parts = _parts(target)
    assert len(parts) == count, instruction
    address, puts, width = address_reader(source), [writer(part) for part in parts], bits_of(kind) // 8
    signed = DTYPES[kind] if kind[0] == "s" else None

    def run(s: Any, m: Any) -> None:
        threads = chosen(s, m)
        if not len(threads):
            return
        places = address(s, threads)
        if space == "shared":
            found = s.shared.load(threads, places, width, count)
        else:
            found = s.memory.load(s, threads, places, width, count)
        if signed is not None:
            found = found.view(signed)
        for number, put in enumerate(puts):
            if m is None:
                put(s, np.ascontiguousarray(found[:, number]), None)
            else:
                value = np.zeros(s.shape, found.dtype)
                value[threads] = found[:, number]
                put(s, value, m)

    return run


def _store(instruction: Instruction, space: str, kind: str, count: int) -> Run:
    target, source = instruction.operands
    parts = _parts(source)
    assert len(parts) == count, instruction
    address, reads = address_reader(target), [reader(part, f"u{bits_of(kind)}") for part in parts]
    dtype = DTYPES[f"u{bits_of(kind)}"]

    def run(s: Any, m: Any) -> None:
        threads = chosen(s, m)
        if not len(threads):
            return
        values = np.empty((len(threads), count), dtype)
        for number, read in enumerate(reads):
            value = read(s)
            values[:, number] = value if value.ndim == 0 or m is None else value[threads]
        places = address(s, threads)
        if space == "shared":
            s.shared.store(threads, places, values)
        else:
            s.memory.store(s, threads, places, values)

    return run


def _atomic(instruction: Instruction, words: list[str]) -> Run | None:
    space, kind = spaces_of(instruction.name), words[-1]
    wanted = {"shared": ("u32", "s32"), "global": ("u32", "s32", "u64")}
    if words[-2] != "add" or kind not in wanted.get(space, ()):
        return None
    *target, source, added = instruction.operands
    bits = f"u{bits_of(kind)}"
    address, read = address_reader(source), reader(added, bits)
    put = writer(target[0]) if target else None

    def run(s: Any, m: Any) -> None:
        threads = chosen(s, m)
        if not len(threads):
            return
        values, places = np.broadcast_to(read(s), s.shape)[threads], address(s, threads)
        value = np.zeros(s.shape, DTYPES[bits])
        if space == "shared":
            value[threads] = s.shared.add(threads, places, values)
        else:
            value[threads] = s.memory.add(s, threads, places, values)
        if put is not None:
            put(s, value, m)

    return run


def _asynchronous(instruction: Instruction) -> Run | None:
    name = instruction.name.split(".")
    if name[2] == "commit_group":
        return lambda s, m: s.copies.commit(chosen(s, m))
    if name[2] in ("wait_group", "wait_all"):
        pending = 0
        if name[2] == "wait_group":
            (left,) = instruction.operands
            assert isinstance(left, Immediate), instruction
            pending = left.value
        everything = name[2] == "wait_all"
        return lambda s, m: s.copies.wait(chosen(s, m), pending, everything)
    if name[2] not in ("ca", "cg"):
        return None
    target, source, size, *rest = instruction.operands
    assert isinstance(size, Immediate), instruction
    assert size.value in ((4, 8, 16) if name[2] == "ca" else (16,)), instruction
    to, origin, width = address_reader(target), address_reader(source), size.value
    read = reader(rest[0], "u32") if rest else None

    def run(s: Any, m: Any) -> None:
        threads = chosen(s, m)
        if not len(threads):
            return
        many = np.full(s.shape, width) if read is None else np.broadcast_to(read(s), s.shape)
        values = np.zeros((len(threads), width), np.uint8)
        given = many[threads]
        assert np.isin(given, (0, width)).all(), f"a copy of a part of its bytes: {instruction}"
        full = given == width
        if full.any():
            found = s.memory.load(s, threads[full], origin(s, threads[full]), 4, width // 4)
            values[full] = found.view(np.uint8).reshape(-1, width)
        s.copies.launch(threads, to(s, threads), values)

    return run


class Copies:
    """Asynchronous copies that have not arrived. A group is one thread's own."""

    def __init__(self, s: Any) -> None:
        self.s = s
        #: Threads, places in shared memory, bytes, and the group of each; a group of -1 is not committed yet.
        self.under_way: list[tuple[Array, Array, Array, Array]] = []
        self.committed = np.zeros(s.shape, np.int64)

    def launch(self, threads: Array, address: Array, values: Array) -> None:
        """Copies have started."""
        places = self.s.shared.launch_copy(threads, address, values.shape[1])
        self.under_way.append((threads, places, values, np.full(len(threads), -1)))

    def commit(self, threads: Array) -> None:
        """The copies that these threads have started since are one group."""
        mine = np.zeros(self.s.shape, bool)
        mine[threads] = True
        for who, _, _, group in self.under_way:
            some = mine[who] & (group < 0)
            group[some] = self.committed[who[some]]
        self.committed[threads] += 1

    def wait(self, threads: Array, pending: int, everything: bool) -> None:
        """All groups but the last ``pending`` of these threads arrive, and with ``everything`` those in none."""
        mine = np.zeros(self.s.shape, bool)
        mine[threads] = True
        left = []
        for who, places, values, group in self.under_way:
            done = mine[who] & (group < self.committed[who] - pending) & ((group >= 0) | everything)
            if done.any():
                self.s.shared.land(who[done], places[done], values[done])
            if not done.all():
                stay = ~done
                left.append((who[stay], places[stay], values[stay], group[stay]))
        self.under_way = left
