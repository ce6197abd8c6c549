"""Runs the few PTX instructions of the kernels' inline assembly on arrays.

Triton's interpreter has no assembly: without a GPU this is its only test. `interpreted` gives it to the interpreter.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tests.support.ptx_machine.arithmetic import approximate

__all__ = ["interpreted", "run"]

Bits = NDArray[np.uint64]
_STATEMENT = re.compile(r"(?:@(\w+)\s+)?([\w.]+)\s+(.*)")
_WORD = np.uint64(0xFFFFFFFF)


def run(
    assembly: str, constraints: str, inputs: Sequence[ArrayLike], error: float = 0
) -> tuple[list[Bits], dict[int, int]]:
    """Run inline assembly, one thread for each element.

    Args:
        assembly: Its text, with $0, $1, ... for outputs and then inputs.
        constraints: Of each operand: r (32 bits), l (64 bits) and f (float32); outputs begin with "=".
        inputs: Values of the inputs, numbers or arrays that broadcast.
        error: Error of an approximate instruction, from -1 to 1 times the largest that the PTX ISA allows.

    Returns:
        The bits of the outputs, in the common shape, and the stored words of 32 bits by address.

    Raises:
        NotImplementedError: For an instruction, or an argument of one, that is not known here.
        AssertionError: Two threads, or two instructions, store different words at one address.
    """
    kinds = constraints.split(",")
    outputs = sum(kind.startswith("=") for kind in kinds)
    assert len(kinds) == outputs + len(inputs), f"{len(inputs)} inputs for {constraints}"
    given = np.broadcast_arrays(*(_given(kind, value) for kind, value in zip(kinds[outputs:], inputs, strict=True)))
    registers: dict[str, NDArray[Any]] = {f"${number}": value for number, value in enumerate(given, outputs)}
    memory: dict[int, int] = {}
    for statement in assembly.strip().strip("{}").split(";"):
        text = statement.strip()
        if not text or text.startswith(".reg"):
            continue
        found = _STATEMENT.fullmatch(text)
        assert found, text
        predicate, name, operands = found.groups()
        chosen = np.ones(given[0].shape, bool) if predicate is None else registers[predicate]
        if name in ("st.global.b32", "st.global.v2.b32", "st.global.b64"):
            _store(operands, registers, chosen, memory, halves=name.endswith("b64"))
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        value = _execute(name, [_value(source, registers) for source in sources], error)
        registers[target] = value if predicate is None else np.where(chosen, value, registers[target])
    return [np.broadcast_to(registers[f"${number}"], given[0].shape) for number in range(outputs)], memory


@contextmanager
def interpreted(error: float = 0) -> Iterator[list[str]]:
    """Triton's interpreter with inline assembly, ``error`` as in `run`. Gives a list of the texts that it ran."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    ran: list[str] = []

    class Call:
        """What Triton asks for the outputs of a call."""

        def __init__(self, outputs: list[TensorHandle]) -> None:
            self.get_result = outputs.__getitem__

    def create(
        _: InterpreterBuilder, assembly: str, constraints: str, values: list[TensorHandle], types: list[Any], *__: Any
    ) -> Call:
        ran.append(assembly)
        outputs, memory = run(assembly, constraints, [value.data for value in values], error)
        for address, word in memory.items():
            ctypes.c_uint32.from_address(address).value = word
        elements = [getattr(one, "element_ty", one) for one in types]
        kinds = [np.float32 if element.is_floating() else np.int32 for element in elements]
        words = [output.astype(np.uint32).view(kind) for output, kind in zip(outputs, kinds, strict=True)]
        return Call([TensorHandle(word, element) for word, element in zip(words, elements, strict=True)])

    original = InterpreterBuilder.create_inline_asm
    InterpreterBuilder.create_inline_asm = create
    try:
        yield ran
    finally:
        InterpreterBuilder.create_inline_asm = original


def _given(kind: str, value: ArrayLike) -> Bits:
    """The bits of an input."""
    if kind == "f":
        return _bits(np.asarray(value, np.float64))
    return np.asarray(value).astype(np.int64).view(np.uint64) & (_WORD if kind == "r" else ~np.uint64(0))


def _value(operand: str, registers: dict[str, NDArray[Any]]) -> Bits:
    if operand.lstrip("-").isdigit():
        return np.asarray(int(operand) % (1 << 32), np.uint64)
    return registers[operand]


def _store(
    operands: str, registers: dict[str, NDArray[Any]], chosen: NDArray[Any], memory: dict[int, int], *, halves: bool
) -> None:
    """Store words of 32 bits one after another, or the two halves of one of 64."""
    found = re.fullmatch(r"\[(.*?)\]\s*,\s*\{?(.*?)\}?", operands)
    assert found, operands
    address, words = found.groups()
    values = [np.broadcast_to(_value(word.strip(), registers), chosen.shape) for word in words.split(",")]
    if halves:
        values = [values[0] & _WORD, values[0] >> np.uint64(32)]
    for place, word in enumerate(values):
        for at, value in zip(registers[address][chosen].tolist(), word[chosen].tolist(), strict=True):
            at += 4 * place
            # On a device either might come last.
            assert memory.setdefault(at, value) == value, f"two threads store at {at:#x}"


def _execute(name: str, numbers: list[Bits], error: float) -> NDArray[Any]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
        match name:
            case "mov.b32":
                return numbers[0]
            case "add.u32":
                return (numbers[0] + numbers[1]) & _WORD
            case "mad.wide.u32":
                return numbers[0] * numbers[1] + numbers[2]
            case "mad.wide.s32":
                return (_signed(numbers[0]) * _signed(numbers[1])).view(np.uint64) + numbers[2]
            case "selp.b32":
                return np.where(numbers[2], numbers[0], numbers[1])
            case "setp.gt.f32":
                return _float(numbers[0]) > _float(numbers[1])
            case "setp.gtu.f32":  # also true where either is NaN
                return ~(_float(numbers[0]) <= _float(numbers[1]))
            case "setp.ge.s32":
                return _signed(numbers[0]) >= _signed(numbers[1])
            case "sin.approx.ftz.f32" | "cos.approx.ftz.f32" | "lg2.approx.ftz.f32":
                return _approximate(name.split(".")[0], numbers[0], error)
    raise NotImplementedError(name)


def _approximate(name: str, number: Bits, error: float) -> Bits:
    x = _float(number).astype(np.float32)
    if name != "lg2" and (np.abs(x[np.isfinite(x)]) > 2 * np.pi).any():
        raise NotImplementedError("an angle beyond 2 pi")
    return _bits(approximate(name, x, error))


def _bits(number: NDArray[Any]) -> Bits:
    return np.asarray(number).astype(np.float32).view(np.uint32).astype(np.uint64)


def _float(bits: Bits) -> Any:
    return np.asarray(bits).astype(np.uint32).view(np.float32).astype(np.float64)


def _signed(bits: Bits) -> Any:
    return np.asarray(bits).astype(np.uint32).view(np.int32).astype(np.int64)
