"""The counted cost: parsing on small texts, and ceilings on what the kernels compile to."""

from __future__ import annotations

import ast
import json
import math
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from synco_fast.bench import compile_cache
from synco_fast.bench.cost.counts import count
from synco_fast.bench.cost.model import DEVICES, occupancy
from synco_fast.bench.cost.sass import read, spans
from synco_fast.bench.cost.stated import STATED
from synco_fast.bench.cost.stated import candidates as candidates_of
from synco_fast.bench.cost.trips import Unknown, constructs_of, mean_trips
from synco_fast.bench.loss import Shape
from synco_fast.kernels.triton import config
from synco_fast.kernels.triton.config import sampling_of
from tests.support.rotation import in_turn

SOURCE = """
def helper(p, COUNT, part):
    for block in range(part, COUNT, 4):
        p += block

def kernel(p, size, flag, STEP):
    row = tl.program_id(0)
    WIDE: tl.constexpr = STEP * 2
    for start in range(0, size, WIDE):
        p += start
    for family in tl.static_range(0, 2):
        helper(p, (8, 2)[family], tl.program_id(1))
    if row < 1:
        p += 1
    if tl.load(p) > 0:
        p += 2
    while size > p:
        p += 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "kernel.py"
    path.write_text(SOURCE)
    return str(path)


def trips(source, line, values, grid, turn=0, inner=None):
    frames = ((source, inner), (source, line)) if inner else ((source, line),)
    (node, scope) = constructs_of(frames, "kernel")[-1]
    return mean_trips(node, scope, values, grid, turn)


def test_trips_come_from_the_source_and_what_was_launched(source):
    assert trips(source, 10, {"size": 100, "STEP": 8}, (1, 1)) == [7.0]
    assert sum(trips(source, 14, {}, (10, 1))) == 1, "one program of ten takes the branch"
    with pytest.raises(Unknown):
        trips(source, 16, {}, (1, 1))
    with pytest.raises(Unknown):
        trips(source, 18, {"size": 5, "p": 1}, (1, 1))


def test_trips_of_a_function_that_was_inlined_know_the_call(source):
    # Two programs: the first family has blocks 0, 4 and 1, 5; the second has 0 and 1.
    assert trips(source, 12, {}, (1, 2), turn=0, inner=4) == [2.0, 2.0]
    assert trips(source, 12, {}, (1, 2), turn=1, inner=4) == [1.0, 1.0]
    # An older compiler leaves the call out.
    (node, scope) = constructs_of(((source, 4),), "kernel")[-1]
    assert isinstance(node, ast.For)
    assert mean_trips(node, scope, {}, (1, 4), 1) == [1.0, 1.0, 0.0, 0.0]


def sass(source, body):
    """A text as nvdisasm writes it, from lines of `label:`, `@line N` and instructions.

    `; sets N` and `; waits N` behind an instruction name its scoreboards.
    """
    out, address = [], 0
    for line in textwrap.dedent(body).strip().splitlines():
        if line.startswith("@line"):
            out.append(f'\t//## File "{source}", line {line.split()[1]}')
        elif line.startswith(".L"):
            out.append(line)
        else:
            text, *control = line.split("; ")
            boards = {word: int(board) for word, board in (each.split() for each in control)}
            code = boards.get("sets", 7) << 46 | (1 << 52 + boards["waits"] if "waits" in boards else 0)
            out.append(f"        /*{address:04x}*/                   {text} ;   /* 0x{address:016x} */")
            out.append(f"{'':50}/* 0x{code:016x} */")
            address += 16
    return "\n".join(out)


LOOP = """
    @line 7
    S2R R0, SR_CTAID.X
    @line 10
    .L_x_0:
    LDG.E.128 R4, desc[UR4][R2.64]; sets 0
    FADD R1, R1, R4; waits 0
    @P0 BRA `(.L_x_0)
    @line 7
    STG.E R2, R1
    EXIT
    .L_x_1:
    BRA `(.L_x_1)
    NOP
"""


def test_a_loop_counts_its_instructions_as_often_as_it_turns(source):
    found = count(sass(source, LOOP), {"size": 100, "STEP": 8}, (3, 1), 4, "kernel")
    assert found.instructions == 1 + 7 * 3 + 2
    assert found.loaded == 7 * 32 * 16 * 4
    assert found.stored == 32 * 4 * 4
    assert found.waits == 7
    (loop,) = found.loops
    assert (loop.source, loop.instructions, loop.trips, loop.how) == (
        "for start in range(0, size, WIDE)",
        3,
        7,
        "counted",
    )


APART = "LDG.E R4, desc[UR4][R2.64]; sets 0\nFADD R1, R1, R4; waits 0\n"
TOGETHER = "LDG.E R4, desc[UR4][R2.64]; sets 0\nLDG.E R5, desc[UR4][R2.64]; sets 1\n"
USES = "FADD R1, R1, R4; waits 0\nFADD R1, R1, R5; waits 1\n"


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (APART * 3, 3),
        (TOGETHER + USES, 1),
        (TOGETHER + "LDS R6, [R2]; sets 2\n" + USES + "FADD R1, R1, R6; waits 2\n", 1),
        ("LDG.E R4, desc[UR4][R2.64]; sets 0\n" + "FADD R1, R1, R1\n" * 300 + "FADD R1, R1, R4; waits 0\n", 0.5),
        ("LDG.E R4, desc[UR4][R2.64]; sets 0\n", 0),
        ("LDS R4, [R2]; sets 0\nFADD R1, R1, R4; waits 0\n", 0),
    ],
)
def test_loads_that_are_issued_together_are_waited_for_once(body, expected):
    found = count(sass("x.py", body + "EXIT"), {}, (1,), 4, "kernel")
    assert found.waits == pytest.approx(expected, abs=0.02)


def test_what_is_stated_goes_before_what_is_counted(source):
    found = count(sass(source, LOOP), {"size": 100, "STEP": 8}, (3, 1), 4, "kernel", lambda line: 2.0)
    assert found.instructions == 1 + 2 * 3 + 2
    assert found.loops[0].how == "stated"


def test_a_span_that_is_skipped_counts_as_often_as_it_is_entered(source):
    filler = "\n".join(["    FADD R1, R1, R4"] * 30)
    text = f"""
    @line 13
    @!P0 BRA `(.L_x_0)
    @line 14
{filler}
    @line 7
    .L_x_0:
    EXIT
    """
    found = count(sass(source, textwrap.dedent(text)), {}, (10, 1), 1, "kernel")
    assert found.instructions == pytest.approx(1 + 30 / 10 + 1)
    assert not found.assumed
    unknown = text.replace("@line 13", "@line 15").replace("@line 14", "@line 16")
    found = count(sass(source, textwrap.dedent(unknown)), {}, (10, 1), 1, "kernel")
    assert found.instructions == 32
    assert found.assumed == ["if tl.load(p) > 0"]


def test_code_out_of_line_makes_no_loop():
    text = sass(
        "x.py",
        """
        @!P0 BRA `(.L_x_1)
        .L_x_0:
        FADD R1, R1, R4
        EXIT
        .L_x_1:
        BRA `(.L_x_0)
        .L_x_2:
        BRA `(.L_x_2)
        """,
    )
    instructions, labels = read(text)
    assert len(instructions) == 4
    assert spans(instructions, labels).inner == []


def test_code_of_parted_warps_neither_counts_nor_hides_a_loop(source):
    parted = LOOP.replace("    FADD R1", "    BRA.DIV UR5, `(.L_x_2)\n    .L_x_3:\n    FADD R1").replace(
        "    .L_x_1:", "    .L_x_2:\n    SHFL.BFLY PT, R1, R1, 0x2, 0x1f\n    BRA `(.L_x_3)\n    .L_x_1:"
    )
    found = count(sass(source, parted), {"size": 100, "STEP": 8}, (3, 1), 4, "kernel")
    assert found.instructions == 1 + 7 * 4 + 2
    assert found.shuffles == 0
    assert found.loops[0].trips == 7


def test_matrix_instructions_are_counted_by_their_shape():
    text = sass("x.py", "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0\nHMMA.16816.F32 R4, R8, R2, R4\nEXIT")
    found = count(text, {}, (1,), 4, "kernel")
    assert found.flops == 2 * 64 * 128 * 16 + 4 * 2 * 16 * 8 * 16


def test_occupancy():
    device = DEVICES[90]
    assert occupancy(4, 163, 66 << 10, device) == 3, "registers"
    assert occupancy(8, 44, 100 << 10, device) == 2, "shared memory"
    assert occupancy(16, 32, 0, device) == 4, "warps"


def halvings(order, low, high, wanted, most, middle=None):
    """How often a bisection as in the kernels counts until `wanted` to `most` numbers reach the lower bound."""
    steps, reached = 0, len(order)
    while low < high and reached > most:
        middle = (low + high + 1) >> 1 if middle is None else middle
        count, steps = int((order >= middle).sum()), steps + 1
        low, reached, high = (middle, count, high) if count >= wanted else (low, reached, middle - 1)
        middle = None
    return steps, low


def log2(number):
    """`_log2` of the selection."""
    fraction, exponent = math.frexp(number)
    fraction = 2 * fraction - 1
    return exponent - 1 + fraction * (1.344 - 0.344 * fraction)


def searches(order, low, high, needed):
    """How often `_cut` of the selection counts."""
    reached, steps, side = len(order), 0, 0
    target = log2(needed + 0.5)
    above, below = log2(reached + 0.5) - target, target + 1
    while low < high and reached != needed:
        share = 0.5 if steps == 7 or steps > 14 else above / (above + below)
        middle = low + min(max(int(share * (high - low)), 1), high - low)
        count, steps = int((order >= middle).sum()), steps + 1
        distance, moved = log2(count + 0.5) - target, 1 if count >= needed else -1
        kept = 0.5 if moved == side else 1
        if count >= needed:
            low, reached, above, below = middle, count, distance, below * kept
        else:
            high, above, below = middle - 1, above * kept, -distance
        side = moved
    return steps


def test_searches_turn_as_often_as_stated():
    shape = Shape(256, 65536, 128, 1024)
    stride, wanted, _ = sampling_of(shape.length, shape.hard)
    random = np.random.default_rng(0)
    found = []
    for _ in range(24):
        # The similarity of two random unit rows: its square has a beta distribution.
        similarity = random.beta(0.5, (shape.dim - 1) / 2, shape.length) ** 0.5 * random.choice((-1, 1), shape.length)
        bits = torch.from_numpy(similarity).float().view(torch.int32)
        order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
        sample = order[::stride]
        high = int(sample.max())
        eighth = int((sample.max().int().view(torch.float32) / 8).view(torch.int32))
        once, threshold = halvings(sample, int(sample.min()), high, wanted, wanted + wanted // 16, eighth)
        candidates = order[order > threshold]
        again = searches(candidates, threshold, int(candidates.max()), shape.hard)
        found.append((once, again, len(candidates)))
    rank, select, many = (sum(numbers) / len(numbers) for numbers in zip(*found, strict=True))
    (of_rank,), (*_, of_select) = (STATED[name].turns.values() for name in ("rank", "select"))
    assert rank == pytest.approx(of_rank(shape), abs=1.5)
    assert select == pytest.approx(of_select(shape), abs=1)
    assert many == pytest.approx(candidates_of(shape), rel=0.15)


#: For H100, B = 256, K = 65,536, D = 128, N = 1,024, bfloat16: instructions of all warps in millions, by launch.
CEILINGS = {
    "sample": 0.3,
    "rank": 0.9,
    "scan": 9.8,
    "select": 5,
    "fill": 0.2,
    "choose": 0.3,
    "mix": 11.6,
    "reduce": 1.2,
}


#: The same launches' waits for loads, one after another.
WAITS = {
    "sample": 3.2,
    "rank": 1.4,
    "scan": 2,
    "select": 5,
    "fill": 2.2,
    "choose": 1.4,
    "mix": 7,
    "reduce": 2.2,
}


@pytest.mark.slow
@in_turn(2, 3)
def test_no_launch_costs_more_than_its_ceiling(tmp_path):
    """A regression is seen here, on a machine without a GPU."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    file = tmp_path / "model.json"
    words = ["bench", "loss", "--model", "--capability", "90", "--json", str(file)]
    done = subprocess.run(
        [sys.executable, "-m", "synco_fast", *words],
        env=environment | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "…" not in done.stdout, "nothing is cut at 80 columns"
    assert "nothing was measured" in done.stdout
    (found,) = json.loads(file.read_text())["shapes"]
    launches = {launch["name"]: launch for launch in found["launches"]}
    assert not [name for name, launch in launches.items() if launch["serialised"]], "C7515: a wait behind each wgmma"
    assert set(launches) == set(CEILINGS)
    above = {
        name: launches[name]["instructions"] / 1e6
        for name, ceiling in CEILINGS.items()
        if launches[name]["instructions"] > 1e6 * ceiling
    }
    assert not above
    assert not {name: launches[name]["waits"] for name, most in WAITS.items() if launches[name]["waits"] > most}
    assert found["total"]["instructions"] < 28e6
    assert found["total"]["used"] < 178e6
    assert found["total"]["l2"] < 204e6
    assert found["total"]["microseconds"] < 76
    assert not [name for name, launch in launches.items() if launch["spilled"]]
    assert not [launch["assumed"] for launch in found["launches"] if launch["assumed"]], "every branch is known"
    # The two products, each of 2 B K D operations.
    assert launches["scan"]["flops"] == 4 * 256 * 65536 * 128
    assert launches["scan"]["hbm"] == pytest.approx(65536 * 128 * 2, rel=0.01)


def test_the_interpreter_is_refused_by_the_model(monkeypatch, capsys):
    from synco_fast.cli import main

    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert main(["bench", "loss", "--model"]) == 2
    assert "found TRITON_INTERPRET=1" in capsys.readouterr().err


def test_the_carried_cache_covers_blocks_of_rows_and_every_variant(monkeypatch):
    asked, used = [], []

    def call(shape, *_):
        asked.append(shape.rows)
        used.append(config.SELECT_PER_WARP)

    monkeypatch.setattr(compile_cache, "_call", call)
    compile_cache.compile_all(90, compile_cache.SHAPES[:1])
    assert {256, 128, 64} == set(asked)
    assert len(set(used)) > 1, "a variant is in force while its kernels are compiled"
    assert used[0] == config.SELECT_PER_WARP
