"""Reading and writing of registers as NumPy arrays of a PTX type, one element for each thread.

Registers hold unsigned integers (predicates booleans). Arrays are never changed in place, so that they may be shared.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine.parse import Immediate, Operand, Register, Symbol

__all__ = ["DTYPES", "UNSIGNED", "as_bfloat16", "bits_of", "from_bfloat16", "reader", "writer"]

Array = NDArray[Any]
Read = Callable[[Any], Any]
Write = Callable[[Any, Any, Any], None]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
#: NumPy's types. A bfloat16 is read as float32.
DTYPES: dict[str, Any] = {
    **{
        f"{kind}{bits}": np.dtype(f"{'i' if kind == 's' else 'u'}{bits // 8}")
        for kind in "usb"
        for bits in (8, 16, 32, 64)
    },
    "f16": np.dtype("f2"),
    "f32": np.dtype("f4"),
    "f64": np.dtype("f8"),
    "pred": np.dtype(bool),
}


def bits_of(kind: str) -> int:
    """The bits of a type's name; 1 for a predicate."""
    return 1 if kind == "pred" else int(kind.lstrip("usbft"))


def from_bfloat16(bits: Array) -> Array:
    """The float32 numbers of 16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def as_bfloat16(number: Array) -> Array:
    """Float32 numbers rounded to nearest even, as 16 bits; every NaN is 0x7FFF."""
    bits = np.asarray(number, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where((bits & np.uint32(0x7FFFFFFF)) > 0x7F800000, 0x7FFF, rounded).astype(np.uint16)


def constant(operand: Immediate, kind: str) -> Any:
    """A number of a type."""
    bits = bits_of(kind)
    if kind == "pred":
        return np.bool_(operand.value)
    if kind[0] == "f" or kind == "bf16":
        number = operand.number
        if number is None:
            plain = operand.value & (1 << bits) - 1
            if kind == "bf16":
                return from_bfloat16(np.uint16(plain))
            return UNSIGNED[bits](plain).view(DTYPES[kind])
        return np.float32(number) if kind == "bf16" else DTYPES[kind].type(number)
    value = operand.value
    if operand.number is not None:
        value = int.from_bytes(struct.pack("<f" if bits == 32 else "<d", operand.number), "little")
    return UNSIGNED[bits](value & (1 << bits) - 1).view(DTYPES[kind])


def reader(operand: Operand, kind: str) -> Read:
    """A function that gives an operand as an array, or a number where it is a constant."""
    if isinstance(operand, Immediate):
        value = constant(operand, kind)
        return lambda s: value
    if isinstance(operand, Symbol):
        name, offset = operand.name, operand.offset
        dtype = DTYPES[kind]
        if name.startswith("%"):
            return lambda s: s.special(name).astype(dtype)
        return lambda s: dtype.type(s.symbol(name) + offset)
    assert isinstance(operand, Register), operand
    number, bits = operand.number, bits_of(kind)
    if kind == "bf16":
        return lambda s: from_bfloat16(s.r[number].astype(np.uint16))
    dtype, unsigned = DTYPES[kind], UNSIGNED[bits]
    if operand.bits == bits:
        if dtype == unsigned:
            return lambda s: s.r[number]
        return lambda s: s.r[number].view(dtype)
    # The lower bits of a wider register.
    assert operand.bits > bits, f"{operand.name} as {kind}"
    return lambda s: s.r[number].astype(unsigned).view(dtype)


def writer(operand: Operand) -> Write:
    """A function that puts an array into a register, for the threads of a mask or all (None)."""
    if isinstance(operand, Symbol) and operand.name == "_":
        return lambda s, value, m: None
    assert isinstance(operand, Register), operand
    number, dtype = operand.number, np.dtype(UNSIGNED[operand.bits])

    def put(s: Any, value: Any, m: Any) -> None:
        if value.dtype != dtype:
            same = value.dtype.itemsize == dtype.itemsize and dtype.kind != "b"
            value = value.view(dtype) if same else value.astype(dtype)
        if m is not None:
            value = np.where(m, value, s.r[number])
        elif value.shape != s.shape:
            value = np.full(s.shape, value)
        s.r[number] = value

    return put
