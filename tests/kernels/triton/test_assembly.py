"""The inline assembly of the kernels against what the interpreter runs in its place."""

from __future__ import annotations

import ast
import inspect
import itertools
import math
import struct
import textwrap

import pytest

from tests.support.ptx import run

pytest.importorskip("triton")

from synco_fast.kernels.triton import order, scan, select

NUMBERS = (math.nan, math.inf, -math.inf, 0.0, -0.0, 0.25, 0.5, -0.5)


def word(number: float) -> int:
    return struct.unpack("<I", struct.pack("<f", number))[0]


def call_of(kernel):
    """The constraints and the operands, as source, of the one call of inline assembly in a kernel."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    (call,) = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and "inline_asm" in ast.unparse(node.func))
    given = call.args[2]
    if isinstance(given, ast.Name):
        (given,) = (
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == given.id
        )
    return call.args[1].value, [ast.unparse(operand) for operand in given.elts]


def test_the_scan_keeps_what_is_not_at_most_the_threshold():
    constraints, operands = call_of(scan.keep)
    base, place, rank, key = 1 << 40, 30_000, 7, 123_456
    for similarity, threshold, positive in itertools.product(NUMBERS, repeat=3):
        values = {
            "p_found.to(tl.int64)": base,
            "b_place": place,
            "b_rank": rank,
            "b_own": similarity,
            "threshold[:, None]": threshold,
            "positive[:, None]": positive,
            "o_key": key,
        }
        outputs, memory = run(scan._KEEP.value, constraints, [values[operand] for operand in operands])
        kept = not similarity <= threshold
        assert [int(output) for output in outputs] == [place + kept, rank + (similarity > positive)]
        address = base + 8 * place
        assert memory == ({address: key, address + 4: word(similarity)} if kept else {})


def test_numbers_at_or_above_a_bound_are_counted():
    constraints, operands = call_of(order.count_from)
    assert operands == ["b_one", "b_two", "b_three", "b_four", "low"]
    numbers = (-(2**31), -5, -4, 0, 2**31 - 1)
    for *four, low in itertools.product(numbers, repeat=5):
        (found,), _ = run(order._COUNT.value, constraints, [*four, low])
        assert int(found) == sum(number >= low for number in four)


@pytest.mark.parametrize("place", [-5, -1, 0, 1, 1023])
def test_the_selection_stores_at_places_that_are_not_negative(place):
    constraints, operands = call_of(select._put)
    base, index, similarity = 1 << 40, 65_535, word(-0.125)
    values = {"p_hard.to(tl.int64)": base, "b_place": place, "b_found": (similarity << 32) | index}
    (returned,), memory = run(select._PUT.value, constraints, [values[operand] for operand in operands])
    assert int(returned) == place % 2**32
    expected = {base + 8 * place: index, base + 8 * place + 4: similarity}
    assert memory == (expected if place >= 0 else {})
    constraints, operands = call_of(select._note)
    values = {"p_number.to(tl.int64)": base, "b_place": place, "b_number": index}
    (returned,), memory = run(select._NOTE.value, constraints, [values[operand] for operand in operands])
    assert int(returned) == place % 2**32
    assert memory == ({base + 4 * place: index} if place >= 0 else {})
