"""PTX text as a list of instructions with operands, labels and the lines of the source that they come from."""

from __future__ import annotations

import re
import struct
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["Address", "Immediate", "Instruction", "Kernel", "Operand", "Register", "Symbol", "parse"]

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\((.*?)\)", re.DOTALL)
_PARAM = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s[^,]*?([\w$]+)\s*$")
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)")
_FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.MULTILINE)
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
_WIDTHS = {"pred": 1, "8": 8, "16": 16, "32": 32, "64": 64}


@dataclass(frozen=True)
class Register:
    """A register: its number in the kernel, its bits (1 for a predicate), and its name."""

    number: int
    bits: int
    name: str


@dataclass(frozen=True)
class Immediate:
    """A number: its bits as they stand, and the float64 that it denotes where it is written as a float."""

    value: int
    number: float | None = None


@dataclass(frozen=True)
class Symbol:
    """A special register, a variable, a parameter or a label, with a number of bytes behind it."""

    name: str
    offset: int = 0


@dataclass(frozen=True)
class Address:
    """An address in brackets: a register, symbol or number, and bytes behind it."""

    base: Register | Symbol | Immediate
    offset: int


Operand = Register | Immediate | Symbol | Address | tuple["Operand", ...]


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
        name: Opcode with its modifiers.
        operands: In the order of the text; a vector is a tuple.
        guard: Register of the predicate, or None.
        negated: Whether the predicate is negated.
        line: Line in the PTX text.
        text: The text.
        source: File and line that it was compiled from.
    """

    name: str
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    line: int
    text: str
    source: str

    def __str__(self) -> str:
        return f"line {self.line}{f' ({self.source})' if self.source else ''}: {self.text}"


@dataclass
class Kernel:
    """A parsed entry.

    Attributes:
        name: Name of the entry.
        parameters: Names and types of the parameters.
        threads: Threads of a CTA, from `.reqntid` or `.maxntid`; 0 where the text does not say.
        registers: Bits of each register.
        instructions, labels: The code; a label is the number of an instruction.
        shared: Offset and bytes of variables in shared memory; the one of unknown size comes last with 0 bytes.
    """

    name: str
    parameters: dict[str, str]
    threads: int
    registers: list[int] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)


def parse(text: str) -> Kernel:
    """The one entry of a PTX text."""
    files = {number: Path(name).name for number, name in _FILE.findall(text)}
    text = _COMMENT.sub(lambda found: "\n" * found[0].count("\n"), text)
    entry = _ENTRY.search(text)
    assert entry, "found no entry"
    parameters = {}
    for part in filter(None, map(str.strip, entry[2].split(","))):
        found = _PARAM.search(part)
        assert found, part
        parameters[found[2]] = found[1]
    start = text.index("{", entry.end())
    size = re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", text[entry.end() : start])
    kernel = Kernel(entry[1], parameters, int(size[1]) if size else 0)
    for name in re.findall(r"\.shared\s[^;]*?([\w$]+)\s*\[\s*\]\s*;", text):
        kernel.shared[name] = 0
    _Body(text, start + 1, files, kernel).read()
    return kernel


class _Body:
    def __init__(self, text: str, position: int, files: dict[str, str], kernel: Kernel) -> None:
        self.text, self.position, self.files, self.kernel = text, position, files, kernel
        self.scopes: list[dict[str, Register]] = [{}]
        self.ends = [found.start() for found in re.finditer("\n", text)]
        self.source = ""

    def read(self) -> None:
        text = self.text
        while True:
            while text[self.position].isspace() or text[self.position] == ";":
                self.position += 1
            if text[self.position] == "{":
                self.scopes.append({})
                self.position += 1
            elif text[self.position] == "}":
                self.scopes.pop()
                self.position += 1
                if not self.scopes:
                    return
            elif text.startswith(".loc", self.position):
                words = self._until("\n").split()
                self.source = f"{self.files.get(words[1], '?')}:{words[2]}"
            elif label := _LABEL.match(text, self.position):
                self.kernel.labels[label[1]] = len(self.kernel.instructions)
                self.position = label.end()
            else:
                line = bisect_right(self.ends, self.position) + 1
                self._statement(" ".join(self._until(";").split()), line)

    def _until(self, end: str) -> str:
        stop = self.text.index(end, self.position)
        part = self.text[self.position : stop]
        self.position = stop + 1
        return part

    def _statement(self, text: str, line: int) -> None:
        if found := _REGISTERS.fullmatch(text):
            bits = _WIDTHS[found[1].lstrip("busf")] if found[1] != "pred" else 1
            for name in map(str.strip, found[2].split(",")):
                if many := re.fullmatch(r"(.*)<(\d+)>", name):
                    for number in range(int(many[2])):
                        self._register(f"{many[1]}{number}", bits)
                else:
                    self._register(name, bits)
            return
        if text.startswith((".pragma", ".branchtargets", ".callprototype")):
            return
        if text.startswith("."):
            raise NotImplementedError(f"line {line}: {text}")
        words = re.fullmatch(r"(?:@(!?)\s*(\S+)\s+)?([\w.:]+)\s*(.*)", text)
        assert words, text
        guard = self._named(words[2]) if words[2] else None
        operands = tuple(map(self._operand, _split(words[4])))
        self.kernel.instructions.append(
            Instruction(words[3], operands, guard, words[1] == "!", line, text, self.source)
        )

    def _register(self, name: str, bits: int) -> None:
        self.scopes[-1][name] = Register(len(self.kernel.registers), bits, name)
        self.kernel.registers.append(bits)

    def _named(self, name: str) -> Register:
        found = self._lookup(name)
        assert found, f"no register {name}"
        return found

    def _lookup(self, name: str) -> Register | None:
        return next((scope[name] for scope in reversed(self.scopes) if name in scope), None)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return tuple(map(self._operand, _split(text.strip("{} "))))
        if text.startswith("["):
            parts = re.fullmatch(r"\[\s*([^\s+]+)\s*(?:\+\s*(-?\w+))?\s*\]", text)
            assert parts, text
            base = self._operand(parts[1])
            assert isinstance(base, Register | Symbol | Immediate), text
            return Address(base, int(parts[2] or "0", 0))
        if "|" in text:
            return tuple(map(self._operand, map(str.strip, text.split("|"))))
        if register := self._lookup(text):
            return register
        if found := re.fullmatch(r"(0[fFdD])([0-9a-fA-F]+)", text):
            value = int(found[2], 16)
            number = struct.unpack(">f" if found[1] in ("0f", "0F") else ">d", bytes.fromhex(found[2]))[0]
            return Immediate(value, number)
        if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
            return Immediate(int(text.rstrip("U"), 0))
        if re.fullmatch(r"-?\d*\.\d*(e-?\d+)?", text):
            return Immediate(0, float(text))
        name, _, offset = text.partition("+")
        return Symbol(name.strip(), int(offset or "0", 0))


def _split(text: str) -> list[str]:
    """Operands between commas outside of braces and brackets."""
    parts, depth, begin = [], 0, 0
    for place, letter in enumerate(text):
        if letter in "{[(":
            depth += 1
        elif letter in "}])":
            depth -= 1
        elif letter == "," and depth == 0:
            parts.append(text[begin:place].strip())
            begin = place + 1
    rest = text[begin:].strip()
    return [*parts, rest] if rest else parts
