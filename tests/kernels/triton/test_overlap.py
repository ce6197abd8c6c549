"""What a kernel does before it waits for the previous one (`synco_fast.kernels.triton.overlap`), by its source."""

from __future__ import annotations

import ast
import importlib
import inspect
import textwrap

import pytest

pytest.importorskip("triton")

from synco_fast.kernels.triton import config

#: The module of each kernel of the chain, and what it reads before it waits: of the operator's inputs, and of what
#: kernels before the previous one wrote.
CHAIN = {
    "sample": ("sample", set(), set()),
    "rank": ("sample", {"p_q", "p_k"}, set()),
    "scan": ("scan", {"p_q"}, set()),
    "select": ("select", set(), set()),
    "fill": ("full_select", set(), set()),
    "choose": ("full_select", set(), set()),
    "mix": ("mix", {"p_q", "p_available", "p_step"}, {"p_shift"}),
    # Without synthetic negatives the previous one is not `mix`, and it waits first.
    "reduce": ("reduce", {"p_k"}, {"p_positive", "p_shift", "p_hard"}),
}
#: Functions that only compute.
HARMLESS = {"before", "begin", "len", "range", "summed"}


def function_of(name):
    module = importlib.import_module(f"synco_fast.kernels.triton.{CHAIN[name][0]}")
    (found,) = ast.parse(textwrap.dedent(inspect.getsource(getattr(module, name).fn))).body
    return found


def calls_in(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call)]


def called(call):
    return call.func.attr if isinstance(call.func, ast.Attribute) else call.func.id


@pytest.mark.parametrize("name", CHAIN)
def test_a_kernel_waits_before_it_writes_or_reads_what_the_previous_one_wrote(name):
    function = function_of(name)
    _, inputs, earlier = CHAIN[name]
    waits = [call.lineno for call in calls_in(function) if called(call) == "begin"]
    # That of `reduce` is in one of two branches.
    assert len(waits) == (2 if name == "reduce" else 1)
    early = [call for call in calls_in(function) if call.lineno < max(waits)]
    own = {called(call) for call in early if isinstance(call.func, ast.Name)}
    # `add_splits` reads, through L2, what the scan wrote, which is the previous kernel of `select`.
    assert own <= HARMLESS | ({"add_splits"} if name == "reduce" else set()), "what these do is unknown"
    assert not {"store", "inline_asm_elementwise", "debug_barrier"} & {called(call) for call in early}
    for call in early:
        if called(call) != "load":
            continue
        (pointer,) = {node.id for node in ast.walk(call.args[0]) if isinstance(node, ast.Name) and node.id[:2] == "p_"}
        assert pointer in inputs | earlier, pointer
        if pointer in earlier:
            modifiers = [word.value.value for word in call.keywords if word.arg == "cache_modifier"]
            assert modifiers == [".cg"], f"{pointer} may be in L1 as it was"


def test_reduce_waits_first_where_the_previous_kernel_wrote_what_it_reads():
    branches = [
        node
        for node in ast.walk(function_of("reduce"))
        if isinstance(node, ast.If) and any(called(call) == "begin" for call in calls_in(ast.Module(node.body[:1], [])))
    ]
    assert [ast.unparse(branch.test) for branch in branches] == ["PARTS == 0", "PARTS"]
    first = min(call.lineno for call in calls_in(function_of("reduce")) if called(call) == "load")
    assert branches[0].lineno < first


@pytest.mark.parametrize(
    ("driver", "generation", "on"), [(13000, 9, True), (0, 10, True), (12020, 9, False), (13000, 8, False)]
)
def test_which_devices_and_drivers_have_it(monkeypatch, driver, generation, on):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(config, "driver_version", lambda: driver)
    expected = {"OVERLAP": config.OVERLAP, "launch_pdl": True} if on else {"OVERLAP": 0}
    assert config.overlap_of(generation) == expected
