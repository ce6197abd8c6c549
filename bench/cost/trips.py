"""Trip counts of a kernel's loops and branches, from its source and the launch's arguments.

Loop ranges and branch conditions are evaluated for program numbers across the grid, with the constants and numbers of
the launch. Trip counts that depend on data come from `bench/cost/stated.py`, and the result marks them.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from synco_fast.bench.cost.sass import Frame

__all__ = ["Construct", "Unknown", "constructs_of", "copied", "mean_trips"]

Construct = ast.For | ast.While | ast.If
_BLOCKS = (ast.For, ast.While, ast.If)
_MOST_PROGRAMS = 16
_DEEPEST = 8


class Unknown(Exception):
    """An expression depends on data."""


@dataclass(frozen=True)
class _Scope:
    """A function of the source, called from the line of ``caller`` (None for the kernel itself)."""

    function: ast.FunctionDef
    line: int
    caller: _Scope | None


@functools.cache
def _functions(file: str) -> tuple[ast.FunctionDef, ...]:
    try:
        tree = ast.parse(Path(file).read_text(encoding="utf-8"))
    except (OSError, SyntaxError):
        return ()
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def _function_at(frame: Frame) -> ast.FunctionDef | None:
    file, line = frame
    around = [one for one in _functions(file) if one.lineno <= line <= (one.end_lineno or 0)]
    return min(around, key=lambda one: (one.end_lineno or 0) - one.lineno, default=None)


def constructs_of(frames: Sequence[Frame], kernel: str) -> list[tuple[Construct, Any]]:
    """Loops and branches around an instruction, outermost first, each with the scope of its names.

    Args:
        frames: Source locations, innermost first, as in `Instruction`.
        kernel: Name of the kernel's function.
    """
    chain = [frame for frame in reversed(frames) if not ("/triton/" in frame[0] and "/site-packages/" in frame[0])]
    # Triton 3.6 omits the call site of a function.
    while chain and (outermost := _function_at(chain[0])) is not None and outermost.name != kernel:
        call = _call_of(outermost.name, chain[0][0], kernel)
        if call is None or len(chain) > _DEEPEST:
            break
        chain.insert(0, call)
    found: list[tuple[Construct, Any]] = []
    scope: _Scope | None = None
    for frame in chain:
        function = _function_at(frame)
        if function is None:
            break
        scope = _Scope(function, frame[1], scope)
        found += [(node, scope) for node in _around(function, frame[1])]
    return found


def _call_of(name: str, file: str, kernel: str) -> Frame | None:
    """The first call of a function, in ``file`` or else in its folder; None if several functions call it.

    Where several files do, that of the kernel counts.
    """
    others = [str(other) for other in Path(file).parent.glob("*.py") if str(other) != file]
    others.sort(key=lambda path: (all(function.name != kernel for function in _functions(path)), path))
    for path in (file, *others):
        calls = {
            function.name: node.lineno
            for function in _functions(path)
            for node in reversed([*ast.walk(function)])
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == name
        }
        if calls:
            return (path, next(iter(calls.values()))) if len(calls) == 1 else None
    return None


def _around(function: ast.FunctionDef, line: int) -> Iterator[Construct]:
    for node in ast.walk(function):
        if isinstance(node, _BLOCKS) and node.lineno <= line <= (node.end_lineno or 0):
            # A condition is evaluated outside the branch that it guards.
            if not node.body[0].lineno <= line <= (node.body[-1].end_lineno or 0):
                continue
            if not _is_static(node):
                yield node


def _is_static(node: ast.AST) -> bool:
    return isinstance(node, ast.For) and "static_range" in ast.unparse(node.iter)


def copied(scope: Any) -> bool:
    """Whether a `static_range` is around the scope's line or that of a caller."""
    while scope is not None:
        for node in ast.walk(scope.function):
            if isinstance(node, ast.For) and _is_static(node) and node.lineno < scope.line <= (node.end_lineno or 0):
                return True
        scope = scope.caller
    return False


def mean_trips(
    node: Construct,
    scope: Any,
    values: Mapping[str, Any],
    grid: Sequence[int],
    turn: int,
    module: Mapping[str, Any] | None = None,
) -> list[float]:
    """Trips of a loop, or 1 for a branch taken and 0 if not, for some programs spread over the grid.

    Args:
        node, scope: From `constructs_of`.
        values: The kernel's arguments.
        grid: Programs along each axis.
        turn: Iteration of an enclosing `static_range`, whose unrolled copies are in order.
        module: The global names of the kernel's module, with constants and functions of constants.

    Raises:
        Unknown: It depends on data.
    """
    axes = [
        sorted({round(step * (size - 1) / (_MOST_PROGRAMS - 1)) for step in range(_MOST_PROGRAMS)}) for size in grid
    ]
    found = []
    for program in itertools.product(*axes):
        evaluate = _Evaluator(program, grid, turn, module or {})
        names = evaluate.names_at(scope, values, node.lineno)
        if isinstance(node, ast.For):
            found.append(float(evaluate.count(node.iter, names)))
        else:
            found.append(float(bool(evaluate(node.test, names))))
            if isinstance(node, ast.While) and found[-1]:
                raise Unknown(ast.unparse(node.test))
    return found


class _Evaluator:
    """Evaluates the source's expressions for one program."""

    def __init__(self, program: Sequence[int], grid: Sequence[int], turn: int, module: Mapping[str, Any]) -> None:
        self.program, self.grid, self.turn, self.module = program, grid, turn, module

    def names_at(self, scope: _Scope, values: Mapping[str, Any], line: int) -> dict[str, Any]:
        """The known names when ``line`` of the scope's function is reached."""
        if scope.caller is None:
            names = dict(values)
        else:
            outer = self.names_at(scope.caller, values, scope.caller.line)
            names = self._passed(scope, outer)
        self._follow(scope.function.body, names, line)
        return names

    def _passed(self, scope: _Scope, outer: dict[str, Any]) -> dict[str, Any]:
        assert scope.caller is not None
        parameters = [argument.arg for argument in scope.function.args.args]
        for node in ast.walk(scope.caller.function):
            if not (isinstance(node, ast.Call) and node.lineno <= scope.caller.line <= (node.end_lineno or 0)):
                continue
            if isinstance(node.func, ast.Name) and node.func.id == scope.function.name:
                given = list(zip(parameters, node.args, strict=False))
                given += [(word.arg, word.value) for word in node.keywords if word.arg]
                names = {}
                for name, value in given:
                    try:
                        names[name] = self(value, outer)
                    except Unknown:
                        continue
                return names
        return {}

    def _follow(self, body: Sequence[ast.stmt], names: dict[str, Any], line: int) -> None:
        for statement in body:
            if statement.lineno >= line:
                return
            if isinstance(statement, ast.Assign | ast.AnnAssign):
                targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
                self._assign(targets[0], statement.value, names)
            elif isinstance(statement, ast.AugAssign) and isinstance(statement.target, ast.Name):
                names.pop(statement.target.id, None)
            elif isinstance(statement, ast.For | ast.While | ast.If):
                inside = line <= (statement.end_lineno or 0)
                changed = {
                    node.id
                    for node in ast.walk(statement)
                    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
                }
                if isinstance(statement, ast.If) and not inside:
                    self._branch(statement, names, changed)
                    continue
                for name in changed:
                    names.pop(name, None)
                if not inside:
                    continue
                if _is_static(statement) and isinstance(statement, ast.For) and isinstance(statement.target, ast.Name):
                    names[statement.target.id] = self._first(statement.iter, names) + self.turn
                in_body = statement.body[0].lineno <= line <= (statement.body[-1].end_lineno or 0)
                self._follow(statement.body if in_body else statement.orelse, names, line)

    def _first(self, node: ast.expr, names: dict[str, Any]) -> int:
        """The number that a range starts with."""
        arguments = node.args if isinstance(node, ast.Call) else []
        return int(self(arguments[0], names)) if len(arguments) > 1 else 0

    def _branch(self, statement: ast.If, names: dict[str, Any], changed: set[str]) -> None:
        try:
            taken = statement.body if self(statement.test, names) else statement.orelse
        except Unknown:
            for name in changed:
                names.pop(name, None)
        else:
            self._follow(taken, names, 1 << 30)

    def _assign(self, target: ast.expr, value: ast.expr | None, names: dict[str, Any]) -> None:
        pairs = [(target, value)]
        if isinstance(target, ast.Tuple):
            elements = value.elts if isinstance(value, ast.Tuple) else [None] * len(target.elts)
            pairs = list(zip(target.elts, elements, strict=False))
        for one, expression in pairs:
            if not isinstance(one, ast.Name):
                continue
            try:
                if expression is None:
                    raise Unknown
                names[one.id] = self(expression, names)
            except Unknown:
                names.pop(one.id, None)

    def count(self, node: ast.expr, names: dict[str, Any]) -> int:
        """Iterations of a ``for`` over this iterable."""
        if not (isinstance(node, ast.Call) and ast.unparse(node.func) in ("range", "tl.range")):
            raise Unknown(ast.unparse(node))
        return len(range(*(int(self(argument, names)) for argument in node.args)))

    def __call__(self, node: ast.expr, names: dict[str, Any]) -> Any:
        """The value of an expression.

        Raises:
            Unknown: It depends on data.
        """
        try:
            return self._value(node, names)
        except (ArithmeticError, IndexError, KeyError, TypeError, ValueError) as error:
            raise Unknown(ast.unparse(node)) from error

    def _value(self, node: ast.expr, names: dict[str, Any]) -> Any:
        if isinstance(node, ast.Constant):
            return node.value
        if isinstance(node, ast.Name):
            return names[node.id] if node.id in names else self._constant(node.id)
        if isinstance(node, ast.Tuple | ast.List):
            return tuple(self(one, names) for one in node.elts)
        if isinstance(node, ast.Subscript):
            return self(node.value, names)[self(node.slice, names)]
        if isinstance(node, ast.IfExp):
            return self(node.body if self(node.test, names) else node.orelse, names)
        if isinstance(node, ast.BoolOp):
            values = [self(one, names) for one in node.values]
            return all(values) if isinstance(node.op, ast.And) else any(values)
        if isinstance(node, ast.UnaryOp):
            return _UNARY[type(node.op)](self(node.operand, names))
        if isinstance(node, ast.BinOp):
            return _BINARY[type(node.op)](self(node.left, names), self(node.right, names))
        if isinstance(node, ast.Compare):
            sides = [self(one, names) for one in (node.left, *node.comparators)]
            pairs = zip(node.ops, sides, sides[1:], strict=False)
            return all(_COMPARE[type(op)](one, other) for op, one, other in pairs)
        if isinstance(node, ast.Call):
            return self._call(node, names)
        raise Unknown(ast.unparse(node))

    def _call(self, node: ast.Call, names: dict[str, Any]) -> Any:
        if isinstance(node.func, ast.Attribute) and node.func.attr == "to":
            return self(node.func.value, names)
        called = ast.unparse(node.func)
        if called == "tl.program_id":
            return self.program[int(self(node.args[0], names))]
        if called == "tl.num_programs":
            return self.grid[int(self(node.args[0], names))]
        if called in _CALLS:
            return _CALLS[called](*(self(argument, names) for argument in node.args))
        function = self.module.get(called)
        if function is not None and type(function).__name__ == "ConstexprFunction":
            return function.fn(*(self(argument, names) for argument in node.args))
        raise Unknown(called)

    def _constant(self, name: str) -> Any:
        value = self.module[name]
        value = getattr(value, "value", value)
        if not isinstance(value, int | float | str | tuple):
            raise Unknown(name)
        return value


_CALLS: dict[str, Callable[..., Any]] = {
    "len": len,
    "min": min,
    "max": max,
    "tl.minimum": min,
    "tl.maximum": max,
    "tl.cdiv": lambda one, other: -(-one // other),
    "tl.constexpr": lambda value: value,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.USub: lambda value: -value,
    ast.Not: lambda value: not value,
    ast.Invert: lambda value: ~value,
}
_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda one, other: one + other,
    ast.Sub: lambda one, other: one - other,
    ast.Mult: lambda one, other: one * other,
    ast.Div: lambda one, other: one / other,
    ast.FloorDiv: lambda one, other: one // other,
    ast.Mod: lambda one, other: one % other,
    ast.LShift: lambda one, other: one << other,
    ast.RShift: lambda one, other: one >> other,
    ast.BitAnd: lambda one, other: one & other,
    ast.BitOr: lambda one, other: one | other,
    ast.BitXor: lambda one, other: one ^ other,
    ast.Pow: lambda one, other: one**other,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: lambda one, other: one == other,
    ast.NotEq: lambda one, other: one != other,
    ast.Lt: lambda one, other: one < other,
    ast.LtE: lambda one, other: one <= other,
    ast.Gt: lambda one, other: one > other,
    ast.GtE: lambda one, other: one >= other,
    ast.Is: lambda one, other: one is other,
    ast.IsNot: lambda one, other: one is not other,
}
