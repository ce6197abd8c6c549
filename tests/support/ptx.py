"""Runs the few PTX instructions of the kernels' inline assembly on Python numbers.

Triton's interpreter cannot run assembly, so without a GPU this is its only test.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence

__all__ = ["run"]

_STATEMENT = re.compile(r"(?:@(\w+)\s+)?([\w.]+)\s+(.*)")


def run(assembly: str, constraints: str, inputs: Sequence[float]) -> tuple[list[int], dict[int, int]]:
    """Run inline assembly for one thread.

    Args:
        assembly: Its text, with $0, $1, ... for outputs and then inputs.
        constraints: Of each operand: r (32 bits), l (64 bits) and f (float32); outputs begin with "=".
        inputs: Values of the inputs.

    Returns:
        The outputs as unsigned numbers, and the stored words of 32 bits by address.

    Raises:
        NotImplementedError: For an instruction that is not known here.
    """
    kinds = constraints.split(",")
    outputs = sum(kind.startswith("=") for kind in kinds)
    registers: dict[str, int] = {}
    for number, value in enumerate(inputs, outputs):
        wide = kinds[number] == "l"
        registers[f"${number}"] = _bits(value) if kinds[number] == "f" else int(value) % (1 << (64 if wide else 32))
    memory: dict[int, int] = {}
    for statement in assembly.strip().strip("{}").split(";"):
        text = statement.strip()
        if not text or text.startswith(".reg"):
            continue
        found = _STATEMENT.fullmatch(text)
        assert found, text
        predicate, name, operands = found.groups()
        if predicate is None or registers[predicate]:
            _execute(name, operands, registers, memory)
    return [registers[f"${number}"] for number in range(outputs)], memory


def _execute(name: str, operands: str, registers: dict[str, int], memory: dict[int, int]) -> None:
    def value(operand: str) -> int:
        return int(operand) % (1 << 32) if operand.lstrip("-").isdigit() else registers[operand]

    if name in ("st.global.b32", "st.global.v2.b32"):
        address, words = re.fullmatch(r"\[(.*?)\]\s*,\s*\{?(.*?)\}?", operands).groups()
        for place, word in enumerate(words.split(",")):
            memory[value(address) + 4 * place] = value(word.strip())
        return
    target, *given = (operand.strip() for operand in operands.split(","))
    numbers = [value(operand) for operand in given]
    match name:
        case "mov.b32":
            registers[target] = numbers[0]
        case "add.u32":
            registers[target] = (numbers[0] + numbers[1]) % (1 << 32)
        case "mad.wide.u32":
            registers[target] = (numbers[0] * numbers[1] + numbers[2]) % (1 << 64)
        case "mad.wide.s32":
            registers[target] = (_signed(numbers[0]) * _signed(numbers[1]) + numbers[2]) % (1 << 64)
        case "setp.gt.f32":
            registers[target] = _float(numbers[0]) > _float(numbers[1])
        case "setp.gtu.f32":  # also true where either is NaN
            registers[target] = not _float(numbers[0]) <= _float(numbers[1])
        case "setp.ge.s32":
            registers[target] = _signed(numbers[0]) >= _signed(numbers[1])
        case _:
            raise NotImplementedError(name)


def _bits(number: float) -> int:
    return int(struct.unpack("<I", struct.pack("<f", number))[0])


def _float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _signed(bits: int) -> int:
    return bits - (1 << 32) if bits >> 31 else bits
