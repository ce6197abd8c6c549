"""Instructions of a whole warp: shuffles, votes, reductions, matrices in shared memory, products on tensor cores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine.arithmetic import canonical
from tests.support.ptx_machine.memory_access import address_reader
from tests.support.ptx_machine.operands import from_bfloat16, reader, writer
from tests.support.ptx_machine.parse import Immediate, Instruction, Operand

__all__ = ["decode", "needs_warp"]

Array = NDArray[Any]
Run = Callable[[Any, Any], None]

_FIRST = ("shfl", "redux", "vote", "ldmatrix", "stmatrix", "mma", "match", "elect", "wgmma")


def needs_warp(name: str) -> bool:
    """Whether all threads of a warp must be at this instruction together."""
    return name.split(".")[0] in _FIRST or name.startswith("bar.warp")


def decode(instruction: Instruction) -> Run | None:
    """The function of an instruction, or None if it is not one of these. Masks hold whole warps."""
    name = instruction.name
    match name.split(".")[0]:
        case "shfl":
            return _shuffle(instruction)
        case "redux":
            return _reduction(instruction)
        case "vote":
            return _vote(instruction)
        case "ldmatrix":
            return _load_matrix(instruction)
        case "stmatrix":
            return _store_matrix(instruction)
        case "mma":
            return _product(instruction)
        case "bar" if name == "bar.warp.sync":
            _whole(instruction.operands[0], instruction)
            return lambda s, m: s.pass_warp_barrier(m)
    return None


def _whole(operand: Operand, instruction: Instruction) -> None:
    """Only instructions of all 32 lanes are known."""
    if not isinstance(operand, Immediate) or operand.value & 0xFFFFFFFF != 0xFFFFFFFF:
        raise NotImplementedError(f"some lanes of a warp: {instruction}")


def _warps(s: Any, m: Any) -> Array:
    """The warps of a mask."""
    everyone: Array = s.everyone_by_warp
    return everyone if m is None else everyone[m.reshape(-1, 32)[:, 0]]


def _all_lanes(value: Any, s: Any) -> Array:
    """An operand as (warps, 32)."""
    return np.broadcast_to(value, s.shape).reshape(-1, 32)


def _shuffle(instruction: Instruction) -> Run:
    _, _, mode, _ = instruction.name.split(".")
    target, source, place, clamp, mask = instruction.operands
    _whole(mask, instruction)
    targets = target if isinstance(target, tuple) else (target,)
    puts = [writer(one) for one in targets]
    read, lanes, ends = reader(source, "u32"), reader(place, "u32"), reader(clamp, "u32")
    lane = np.arange(32)

    def run(s: Any, m: Any) -> None:
        values = _all_lanes(read(s), s)
        b, c = (np.broadcast_to(x, s.shape).reshape(-1, 32).astype(np.int64) for x in (lanes(s), ends(s)))
        end, segment = c & 31, c >> 8 & 31
        most = (lane & segment) | (end & ~segment)
        least = lane & segment
        match mode:
            case "up":
                other = lane - b
                inside = other >= most
            case "down":
                other = lane + b
                inside = other <= most
            case "bfly":
                other = lane ^ b
                inside = other <= most
            case _:
                other = least | (b & ~segment)
                inside = other <= most
        other = np.where(inside, other, lane)
        puts[0](s, np.take_along_axis(values, other, 1).reshape(-1), m)
        if len(puts) > 1:
            puts[1](s, inside.reshape(-1), m)

    return run


def _reduction(instruction: Instruction) -> Run | None:
    _, _, operation, kind = instruction.name.split(".")
    target, source, mask = instruction.operands
    functions: dict[str, Any] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }
    if operation not in functions or kind not in ("s32", "u32", "b32"):
        return None
    read, put, function = reader(source, kind), writer(target), functions[operation]
    members = reader(mask, "u32")

    def run(s: Any, m: Any) -> None:
        chosen = np.broadcast_to(members(s), s.shape) if m is None else np.broadcast_to(members(s), s.shape)[m]
        if (chosen != 0xFFFFFFFF).any():
            raise NotImplementedError(f"some lanes of a warp: {instruction}")
        values = _all_lanes(read(s), s)
        put(s, np.repeat(function.reduce(values, axis=1, dtype=values.dtype), 32), m)

    return run


def _vote(instruction: Instruction) -> Run | None:
    _, _, mode, _ = instruction.name.split(".")
    target, source, mask = instruction.operands
    _whole(mask, instruction)
    put, read = writer(target), reader(source, "pred")
    bits = np.uint32(1) << np.arange(32, dtype=np.uint32)

    def run(s: Any, m: Any) -> None:
        values = _all_lanes(read(s), s)
        match mode:
            case "ballot":
                found = (values * bits).sum(axis=1, dtype=np.uint32)
            case "any":
                found = values.any(axis=1)
            case "all":
                found = values.all(axis=1)
            case _:
                found = values.all(axis=1) | ~values.any(axis=1)
        put(s, np.repeat(found, 32), m)

    return run


def _matrices(name: str) -> tuple[int, bool] | None:
    words = name.split(".")
    if "m8n8" not in words or words[-1] != "b16":
        return None
    return int(next(word for word in words if word in ("x1", "x2", "x4"))[1:]), "trans" in words


def _load_matrix(instruction: Instruction) -> Run | None:
    shape = _matrices(instruction.name)
    if shape is None:
        return None
    count, transposed = shape
    target, source = instruction.operands
    puts = [writer(part) for part in (target if isinstance(target, tuple) else (target,))]
    address = address_reader(source)
    assert len(puts) == count, instruction

    def run(s: Any, m: Any) -> None:
        warps = _warps(s, m)
        if not len(warps):
            return
        threads = warps[:, : 8 * count].reshape(-1)
        rows = s.shared.load(threads, address(s, threads), 8, 2)
        halves = rows.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            halves = halves.transpose(0, 1, 3, 2)
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(len(warps), count, 32)
        for number, put in enumerate(puts):
            value = np.zeros(s.shape, np.uint32)
            value[warps.reshape(-1)] = words[:, number].reshape(-1)
            put(s, value, m)

    return run


def _store_matrix(instruction: Instruction) -> Run | None:
    shape = _matrices(instruction.name)
    if shape is None:
        return None
    count, transposed = shape
    target, source = instruction.operands
    reads = [reader(part, "u32") for part in (source if isinstance(source, tuple) else (source,))]
    address = address_reader(target)
    assert len(reads) == count, instruction

    def run(s: Any, m: Any) -> None:
        warps = _warps(s, m)
        if not len(warps):
            return
        words = np.stack([np.broadcast_to(read(s), s.shape)[warps] for read in reads], axis=1)
        halves = words.reshape(len(warps), count, 8, 4).view(np.uint16)
        if transposed:
            halves = halves.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(halves).reshape(-1, 8).view(np.uint64)
        threads = warps[:, : 8 * count].reshape(-1)
        s.shared.store(threads, address(s, threads), rows)

    return run


def as_tf32(bits: Array) -> Array:
    """The numbers that a tensor core sees of 32 bits: the last 13 are ignored."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


def as_halves(bits: Array, kind: str) -> Array:
    """Pairs of 16-bit numbers, in a new last dimension, as float64."""
    halves = np.ascontiguousarray(bits)[..., None].view(np.uint16)
    numbers = from_bfloat16(halves) if kind == "bf16" else halves.view(np.float16)
    return numbers.astype(np.float64)


def _product(instruction: Instruction) -> Run | None:
    words = instruction.name.split(".")
    if words[1:3] != ["sync", "aligned"] or words[4:6] != ["row", "col"]:
        return None
    shape, (result, left, right, added) = words[3], words[6:10]
    halves = shape == "m16n8k16" and left == right and left in ("bf16", "f16")
    if not (result == added == "f32" and (halves or (shape == "m16n8k8" and left == right == "tf32"))):
        return None
    d, a, b, c = instruction.operands
    assert isinstance(a, tuple)
    assert isinstance(b, tuple)
    assert isinstance(c, tuple)
    assert isinstance(d, tuple)
    reads = [[reader(part, "u32") for part in operand] for operand in (a, b, c)]
    puts = [writer(part) for part in d]

    def run(s: Any, m: Any) -> None:
        warps = _warps(s, m)
        if not len(warps):
            return
        # (warps, 8 groups, 4 lanes of a group, registers)
        one, other, start = (
            np.stack([np.broadcast_to(read(s), s.shape)[warps] for read in operand], axis=-1).reshape(
                len(warps), 8, 4, len(operand)
            )
            for operand in reads
        )
        if halves:
            # Registers of A: both halves of the rows, then of the columns, in pairs.
            x = as_halves(one, left).reshape(-1, 8, 4, 2, 2, 2)
            x = x.transpose(0, 4, 1, 3, 2, 5).reshape(-1, 16, 16)
            y = as_halves(other, left).transpose(0, 3, 2, 4, 1).reshape(-1, 16, 8)
        else:
            x = as_tf32(one).reshape(-1, 8, 4, 2, 2).transpose(0, 4, 1, 3, 2).reshape(-1, 16, 8)
            y = as_tf32(other).transpose(0, 3, 2, 1).reshape(-1, 8, 8)
        z = start.view(np.float32).astype(np.float64).reshape(-1, 8, 4, 2, 2).transpose(0, 3, 1, 2, 4)
        found = canonical((x @ y + z.reshape(-1, 16, 8)).astype(np.float32))
        words_of = found.reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(len(warps), 32, 4)
        for number, put in enumerate(puts):
            value = np.zeros(s.shape, np.uint32)
            value[warps.reshape(-1)] = np.ascontiguousarray(words_of[..., number]).reshape(-1).view(np.uint32)
            put(s, value, m)

    return run
