"""The instructions that compute in registers alone, as functions of NumPy arrays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tests.support.ptx_machine import integers
from tests.support.ptx_machine.operands import DTYPES, as_bfloat16, bits_of, from_bfloat16, reader, writer
from tests.support.ptx_machine.parse import Instruction, Operand, Register

__all__ = ["COSINE_ERROR", "LOG2_ERROR", "approximate", "canonical", "decode", "exact_fma", "flushed"]

Array = NDArray[Any]
Run = Callable[[Any, Any], None]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
    "ne": lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b)) if a.dtype.kind == "f" else a != b,
    # True where either is NaN.
    "equ": lambda a, b: (a == b) | np.isnan(a) | np.isnan(b),
    "neu": np.not_equal,
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
_JOIN = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
_KINDS = {*DTYPES, "bf16"}
_NAN = np.uint32(0x7FFFFFFF).view(np.float32)
_LOGIC = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}
#: Roundings to whole numbers.
_STEPS: dict[str, Any] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
_PLAIN = {"add": np.add, "sub": np.subtract}


def flushed(x: Any) -> Any:
    """Subnormal numbers of float32 as zeros of their sign."""
    return np.where(np.abs(x) < 2.0**-126, np.copysign(np.float32(0), x), x)


def canonical(x: Any) -> Any:
    """Numbers with the one NaN that a device computes; NumPy keeps one of the operands' bits."""
    none = x != x
    return np.where(none, _NAN.astype(x.dtype), x) if np.any(none) else x


def exact_fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c in float32, rounded once.

    The product is exact in float64. Rounding the sum to float64 first matters only where it lands halfway between two
    float32 numbers; there the rest of the sum decides.
    """
    product = a.astype(np.float64) * b.astype(np.float64)
    wide = c.astype(np.float64)
    total = np.asarray(product + wide)
    bits = total.view(np.int64)
    halfway = (bits & 0x1FFFFFFF) == 0x10000000
    if halfway.any():
        part = total - product
        rest = (product - (total - part)) + (wide - part)
        toward = np.sign(rest) * np.sign(total)
        total = np.where(halfway & np.isfinite(total), (bits + toward.astype(np.int64)).view(np.float64), total)
    return total.astype(np.float32)


#: Largest errors by the PTX ISA (9.1). Of sin.approx and cos.approx between -2 pi and 2 pi, absolute.
COSINE_ERROR = 2.0**-20.5
#: Of lg2.approx: absolute between 1/2 and 2, relative elsewhere.
LOG2_ERROR = 2.0**-22
#: Functions of float64 numbers, and the largest error of the approximate instruction.
_FUNCTIONS: dict[str, tuple[Callable[[Any], Any], float]] = {
    "ex2": (np.exp2, 2.0**-22),
    "lg2": (np.log2, LOG2_ERROR),
    "sin": (np.sin, COSINE_ERROR),
    "cos": (np.cos, COSINE_ERROR),
    "tanh": (np.tanh, 2.0**-11),
    "sqrt": (np.sqrt, 2.0**-23),
    "rsqrt": (lambda x: 1 / np.sqrt(x), 2.0**-22.9),
    "rcp": (lambda x: 1 / x, 2.0**-23),
}


def _allowed(name: str, x: Any, exact: Any) -> Any:
    """What the largest error is relative to: of sine and cosine nothing, of the logarithm nothing near 1."""
    if name in ("sin", "cos"):
        return np.where(x == 0, 0, 1)
    size = np.where(np.isfinite(exact), np.abs(exact), 0)
    return np.where((x > 0.5) & (x < 2), 1, size) if name == "lg2" else size


def approximate(name: str, given: Any, error: float, *, ftz: bool = True) -> Any:
    """A function of float numbers, rounded to their type, off by ``error`` times the largest error allowed."""
    function, limit = _FUNCTIONS[name]
    x = (flushed(given) if ftz else given).astype(np.float64)
    y = np.asarray(function(x))
    if error:
        y = y + error * limit * _allowed(name, x, y)
    found = y.astype(given.dtype)
    return flushed(found) if ftz else found


def _approximation(instruction: Instruction, name: str, kind: str, ftz: bool) -> Run:
    """A function of one number, off by ``s.error`` times the largest error where the instruction is approximate."""
    put = writer(instruction.operands[0])
    read, rounded = reader(instruction.operands[1], kind), "approx" not in instruction.name

    return lambda s, m: put(s, canonical(approximate(name, read(s), 0 if rounded else s.error, ftz=ftz)), m)


def _extreme(name: str, nan: bool) -> Callable[[Any, Any], Any]:
    plain = {"min": np.minimum, "max": np.maximum} if nan else {"min": np.fmin, "max": np.fmax}

    def of(a: Any, b: Any) -> Any:
        found = plain[name](a, b)
        if a.dtype.kind != "f":
            return found
        zeros = (a == 0) & (b == 0)
        if np.any(zeros):
            lower, upper = np.copysign(0, np.minimum(np.copysign(1, a), np.copysign(1, b))), a + b
            found = np.where(zeros, (lower if name == "min" else upper).astype(a.dtype), found)
        return found

    return of


def _simple(instruction: Instruction, kinds: list[str], to: str, function: Callable[..., Any]) -> Run:
    """Read operands of some kinds, write a result."""
    put = writer(instruction.operands[0])
    reads = [reader(operand, kind) for operand, kind in zip(instruction.operands[1:], kinds, strict=True)]
    inner = function
    if to == "bf16":
        function = lambda *values: as_bfloat16(inner(*values))  # noqa: E731
    elif to == "f32" and instruction.name[:3] not in ("neg", "abs"):
        function = lambda *values: canonical(inner(*values))  # noqa: E731
    if len(reads) == 1:
        (one,) = reads
        return lambda s, m: put(s, function(one(s)), m)
    if len(reads) == 2:
        one, two = reads
        return lambda s, m: put(s, function(one(s), two(s)), m)
    return lambda s, m: put(s, function(*(read(s) for read in reads)), m)


def _packed(instruction: Instruction, kind: str, function: Callable[..., Any]) -> Run:
    """An operation on both halves of 32 bits."""
    put = writer(instruction.operands[0])
    reads = [reader(operand, "u32") for operand in instruction.operands[1:]]

    def run(s: Any, m: Any) -> None:
        values = [read(s) for read in reads]
        both: Any = np.uint32(0)
        for shift in (0, 16):
            found = function(*(_half(value, shift, kind) for value in values))
            bits = as_bfloat16(found) if kind == "bf16" else np.asarray(found, np.float16).view(np.uint16)
            both = both | bits.astype(np.uint32) << np.uint32(shift)
        put(s, both, m)

    return run


def _half(value: Any, shift: int, kind: str) -> Any:
    """One of two 16-bit floats."""
    bits = (value >> np.uint32(shift)).astype(np.uint16)
    return from_bfloat16(bits) if kind == "bf16" else bits.view(np.float16)


def _half_fma(a: Any, b: Any, c: Any) -> Any:
    """a b + c of 16-bit floats, which float64 holds exactly but for extreme exponents."""
    return (a.astype(np.float64) * b.astype(np.float64) + c.astype(np.float64)).astype(a.dtype)


def decode(instruction: Instruction) -> Run | None:
    """The function of an instruction, or None if it is not one of these."""
    name, *modifiers = instruction.name.split(".")
    kinds = [word for word in modifiers if word in _KINDS]
    kind = kinds[-1] if kinds else ""
    operands = instruction.operands
    ftz = "ftz" in modifiers
    if modifiers and modifiers[-1] in ("f16x2", "bf16x2") and name != "cvt":
        half = modifiers[-1][:-2]
        if name == "setp":
            return _setp_of_halves(instruction, modifiers, half)
        function = {**_PLAIN, "mul": np.multiply, "fma": _half_fma, "neg": np.negative, "abs": np.abs}.get(name)
        function = _extreme(name, "NaN" in modifiers) if name in ("min", "max") else function
        return _packed(instruction, half, function) if function else None

    def flush(function: Callable[..., Any]) -> Callable[..., Any]:
        if not ftz:
            return function
        return lambda *values: flushed(function(*map(flushed, values)))

    def of(count: int, function: Callable[..., Any], to: str = "") -> Run:
        return _simple(instruction, [kind] * count, to or kind, function)

    match name:
        case "mov":
            return _mov(operands, kind)
        case "add" | "sub" if "cc" not in modifiers and "sat" not in modifiers:
            return of(2, flush(_PLAIN[name]))
        case "mul":
            return _mul(instruction, modifiers, kind, flush)
        case "mad" if kind[0] != "f":
            return _mad(instruction, modifiers, kind)
        case "fma" | "mad" if not {"relu", "sat"} & set(modifiers):
            if kind == "f64":
                return of(3, lambda a, b, c: (a.astype(np.longdouble) * b + c).astype(np.float64))
            return of(3, flush(exact_fma) if kind == "f32" else _half_fma)
        case "div":
            return of(2, flush(np.divide) if kind[0] == "f" else integers.divided)
        case "rem":
            return of(2, lambda a, b: (a - integers.divided(a, b) * b).astype(a.dtype))
        case "min" | "max" if not {"abs", "xorsign"} & set(modifiers):
            return of(2, flush(_extreme(name, "NaN" in modifiers)))
        case "ex2" | "lg2" | "sin" | "cos" | "tanh" | "sqrt" | "rsqrt" | "rcp":
            return _approximation(instruction, name, kind, ftz)
        case "neg" | "abs":
            return of(1, flush(np.negative if name == "neg" else np.abs))
        case "and" | "or" | "xor":
            return of(2, _LOGIC[name])
        case "not":
            return of(1, np.logical_not if kind == "pred" else np.invert)
        case "shl" | "shr":
            return _simple(instruction, [kind, "u32"], kind, lambda a, b: integers.shifted(name, a, b))
        case "bfe":
            return _simple(instruction, [kind, "u32", "u32"], kind, integers.bfe)
        case "bfi":
            return _simple(instruction, [kind, kind, "u32", "u32"], kind, integers.bfi)
        case "prmt" if len(modifiers) == 1:
            return _simple(instruction, ["u32"] * 3, "u32", integers.prmt)
        case "lop3":
            return _simple(instruction, ["u32"] * 4, "u32", integers.lop3)
        case "shf":
            return _simple(instruction, ["u32"] * 3, "u32", integers.funnel(modifiers[0] == "l", "wrap" in modifiers))
        case "popc":
            return of(1, lambda a: np.bitwise_count(a).astype(np.uint32), "u32")
        case "clz" if kind == "b32":
            return of(1, integers.clz)
        case "brev" if kind == "b32":
            return of(1, integers.brev)
        case "copysign":
            return of(2, lambda a, b: np.copysign(b, a))
        case "selp":
            chosen = kind.replace("f", "b") if kind != "bf16" else "b16"
            return _simple(instruction, [chosen, chosen, "pred"], chosen, lambda a, b, p: np.where(p, a, b))
        case "setp":
            return _setp(instruction, modifiers, kind, ftz)
        case "cvt":
            return _cvt(instruction, modifiers)
        case "cvta":
            return of(1, lambda a: a)
    return None


def _mov(operands: tuple[Operand, ...], kind: str) -> Run:
    target, source = operands
    if isinstance(target, tuple):
        # The parts of a register.
        assert isinstance(source, Register)
        bits = source.bits // len(target)
        read = reader(source, f"u{source.bits}")
        puts = [writer(part) for part in target]

        def split(s: Any, m: Any) -> None:
            value = read(s)
            for place, put in enumerate(puts):
                put(s, (value >> value.dtype.type(bits * place)).astype(DTYPES[f"u{bits}"]), m)

        return split
    put = writer(target)
    if isinstance(source, tuple):
        whole = bits_of(kind)
        bits = whole // len(source)
        reads = [reader(part, f"u{bits}") for part in source]
        to = DTYPES[f"u{whole}"]

        def join(s: Any, m: Any) -> None:
            value = reads[0](s).astype(to)
            for place, read in enumerate(reads[1:], 1):
                value = value | read(s).astype(to) << to.type(bits * place)
            put(s, value, m)

        return join
    one = reader(source, kind)
    return lambda s, m: put(s, one(s), m)


def _mul(instruction: Instruction, modifiers: list[str], kind: str, flush: Callable[..., Any]) -> Run:
    if kind[0] == "f" or kind == "bf16":
        return _simple(instruction, [kind] * 2, kind, flush(np.multiply))
    if "wide" in modifiers:
        wide = DTYPES[f"{kind[0]}{2 * bits_of(kind)}"]
        return _simple(instruction, [kind] * 2, kind, lambda a, b: np.multiply(a, b, dtype=wide))
    if "hi" in modifiers:
        return _simple(instruction, [kind] * 2, kind, integers.high)
    assert "lo" in modifiers, instruction
    return _simple(instruction, [kind] * 2, kind, np.multiply)


def _mad(instruction: Instruction, modifiers: list[str], kind: str) -> Run:
    if "wide" in modifiers:
        name = f"{kind[0]}{2 * bits_of(kind)}"
        wide = DTYPES[name]
        return _simple(instruction, [kind, kind, name], name, lambda a, b, c: np.multiply(a, b, dtype=wide) + c)
    if "hi" in modifiers:
        return _simple(instruction, [kind] * 3, kind, lambda a, b, c: integers.high(a, b) + c)
    assert "lo" in modifiers, instruction
    return _simple(instruction, [kind] * 3, kind, lambda a, b, c: a * b + c)


def _setp(instruction: Instruction, modifiers: list[str], kind: str, ftz: bool) -> Run:
    compare = _COMPARE[modifiers[0]]
    target, *operands = instruction.operands
    puts = [writer(one) for one in (target if isinstance(target, tuple) else (target,))]
    reads = [reader(operand, kind) for operand in operands[:2]]
    other = reader(operands[2], "pred") if len(operands) > 2 else None
    join = _JOIN.get(modifiers[1]) if other else None
    assert (other is None) == (join is None), instruction

    def run(s: Any, m: Any) -> None:
        a, b = reads[0](s), reads[1](s)
        if ftz:
            a, b = flushed(a), flushed(b)
        found = compare(a, b)
        results = (found, ~found)
        for put, result in zip(puts, results, strict=False):
            put(s, result if join is None or other is None else join(result, other(s)), m)

    return run


def _setp_of_halves(instruction: Instruction, modifiers: list[str], kind: str) -> Run | None:
    """Compare both halves of 32 bits: a predicate for each, the lower one first."""
    targets, *operands = instruction.operands
    if not isinstance(targets, tuple) or len(modifiers) != 2 or len(operands) != 2:
        return None
    compare, puts = _COMPARE[modifiers[0]], [writer(one) for one in targets]
    reads = [reader(operand, "u32") for operand in operands]

    def run(s: Any, m: Any) -> None:
        a, b = (read(s) for read in reads)
        for shift, put in zip((0, 16), puts, strict=True):
            put(s, compare(_half(a, shift, kind), _half(b, shift, kind)), m)

    return run


def _cvt(instruction: Instruction, modifiers: list[str]) -> Run | None:
    put = writer(instruction.operands[0])
    to, source = modifiers[-2:]
    options = set(modifiers[:-2])
    if to in ("bf16x2", "f16x2") and source == "f32" and options == {"rn"}:
        high, low = (reader(operand, "f32") for operand in instruction.operands[1:])

        def pack(s: Any, m: Any) -> None:
            parts = []
            for read in (low, high):
                value = read(s)
                parts.append(as_bfloat16(value) if to == "bf16x2" else _as_half(value))
            put(s, parts[0].astype(np.uint32) | parts[1].astype(np.uint32) << np.uint32(16), m)

        return pack
    if to == "tf32" and source == "f32" and "rna" in options:
        read = reader(instruction.operands[1], "u32")
        # To nearest, ties away from zero.
        return lambda s, m: put(s, read(s) + np.uint32(0x1000) & np.uint32(0xFFFFE000), m)
    if to not in _KINDS or source not in _KINDS or options - {"rn", "rz", *_STEPS, "sat", "ftz"}:
        return None
    read = reader(instruction.operands[1], source)
    function = _conversion(to, source, options)
    if function is None:
        return None
    return lambda s, m: put(s, function(read(s)), m)


def _as_half(value: Any) -> Any:
    return np.asarray(value).astype(np.float16).view(np.uint16)


def _conversion(to: str, source: str, options: set[str]) -> Callable[[Any], Any] | None:
    floats = {"f16", "bf16", "f32", "f64"}
    if to not in floats and source not in floats:
        if "sat" in options:
            return None
        return lambda a: a.astype(DTYPES[to])
    rounding = next((_STEPS[name] for name in options if name in _STEPS), None)
    if to not in floats:
        assert rounding is not None, options
        limits = np.iinfo(DTYPES[to])
        if limits.bits > 32:
            return lambda a: np.nan_to_num(rounding(a.astype(np.float64))).astype(DTYPES[to])

        def whole(a: Any) -> Any:
            return np.clip(np.nan_to_num(rounding(a.astype(np.float64)), nan=0.0), limits.min, limits.max).astype(
                DTYPES[to]
            )

        return whole
    if rounding is not None:
        return rounding if to == source != "bf16" else None
    if "rz" in options:
        return None

    def number(a: Any) -> Any:
        if to == "bf16":
            return as_bfloat16(a.astype(np.float32))
        found = a.astype(DTYPES[to])
        return np.clip(found, 0, 1) if "sat" in options else found

    return number
