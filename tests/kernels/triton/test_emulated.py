"""The kernels as they are compiled for a device, run by `tests.support.ptx_machine` without one.

``SYNCO_FAST_ALL=1`` takes all capabilities and dtypes.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from synco_fast.kernels import Negatives  # noqa: E402
from synco_fast.kernels.triton import launch  # noqa: E402
from synco_fast.kernels.validation import Inputs, exact_inputs, reference_answer  # noqa: E402
from tests.support.answers import compare  # noqa: E402
from tests.support.kernels import check_compiled  # noqa: E402
from tests.support.ptx_machine import Fault, emulated  # noqa: E402
from tests.support.rotation import in_turn, todays  # noqa: E402

#: A fault of Triton, mended in 3.8.
UNFENCED = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 8)
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
KERNELS = ["sample", "rank", "scan", "select", "fill", "choose", "mix", "reduce"]
COUNTS = ("interpolated", "extrapolated", "mixed", "noisy", "perturbed", "adversarial")
#: Files of checks, and which of them. The search alone is no kernel; its check counts calls of the interpreter.
CHECKS = [
    ("check_selection.py", "selection_is_exact"),
    ("check_selection.py", "few_bits or margin or reported"),
    ("check_selection.py", "(nan or ties or room or unevenly) and not search"),
    ("check_full_select.py", "test"),
]
CASES = list(itertools.product((90, 80), DTYPES, (True, False)))


@triton.jit
def _product(p_x, p_y, p_z, p_sum, DEPTH, ROWS: tl.constexpr, PIECE: tl.constexpr, STAGES: tl.constexpr):
    """x y^T of (ROWS, DEPTH) matrices, piece by piece with reads ahead, and sums and running sums of its rows."""
    o_row = tl.arange(0, ROWS)
    b_total = tl.zeros([ROWS, ROWS], tl.float32)
    for start in tl.range(0, DEPTH, PIECE, num_stages=STAGES):
        o_piece = start + tl.arange(0, PIECE)
        x = tl.load(p_x + o_row[:, None] * DEPTH + o_piece[None, :])
        y = tl.load(p_y + o_row[:, None] * DEPTH + o_piece[None, :])
        b_total = tl.dot(x, tl.trans(y), b_total)
    tl.store(p_z + o_row[:, None] * ROWS + o_row[None, :], b_total)
    b_sum = tl.sum(b_total, axis=0)
    tl.store(p_sum + o_row, tl.cumsum(b_sum, 0))


#: Everything that orders accesses to memory.
ORDER = re.compile(
    r"^\s*(bar\.sync|bar\.warp\.sync|cp\.async\.wait_group|wgmma\.wait_group|wgmma\.fence|fence\.proxy)", re.MULTILINE
)


def product_of(capability, change):
    """The kernel's answer with a changed PTX, the exact one, and the PTX."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randint(-4, 5, (64, 128), generator=generator).bfloat16() for _ in range(2))
    with emulated(capability) as emulator:
        emulator.change, emulator.unfenced_copies = change, UNFENCED
        z, total = torch.empty(64, 64), torch.empty(64)
        _product[(1,)](x, y, z, total, 128, ROWS=64, PIECE=32, STAGES=3, num_warps=4)
    exact = x.float() @ y.float().T
    right = torch.equal(z, exact) and torch.equal(total, exact.sum(0).cumsum(0))
    return right, emulator.launches[0][2]


@pytest.mark.parametrize("capability", todays([80, 90]))
def test_every_barrier_wait_and_fence_is_missed(capability):
    right, text = product_of(capability, lambda name, text: text)
    assert right
    places = [found.start() for found in ORDER.finditer(text)]
    assert len(places) > 12
    spare = []
    for begin in places:
        end = text.index(";", begin) + 1
        try:
            right, _ = product_of(capability, lambda name, text, cut=(begin, end): text[: cut[0]] + text[cut[1] :])
        except Fault:
            continue
        if right:
            spare.append(begin)
    # Triton has a barrier between the copies of the first two pieces, before anything is read.
    assert len(spare) <= 1
    assert all("ld.shared" not in text[:begin] and "ldmatrix" not in text[:begin] for begin in spare)


def name(case):
    capability, dtype, masked = case
    return f"{capability} {str(dtype).removeprefix('torch.')}{' masked' * masked}"


@pytest.mark.slow
@in_turn(1, 3)
@pytest.mark.parametrize(("capability", "checks"), todays(list(itertools.product((90, 80), CHECKS))))
def test_nasty_inputs_of_the_selection(capability, checks):
    file, names = checks
    check_compiled(Path(__file__).parent / "interpreted" / file, capability, "-k", names)


@pytest.mark.slow
@pytest.mark.parametrize("case", todays(CASES), ids=name)
def test_the_whole_loss(monkeypatch, within, case):
    capability, dtype, masked = case
    # Two splits of several tiles, so that the scan reads ahead. Whole tiles, or none of any size.
    monkeypatch.setattr(launch, "splits_of", lambda *_: 2)
    if masked:
        rows, length, dim, negatives = 3, 500, 72, Negatives.synco(40, **dict.fromkeys(COUNTS, 7))
    else:
        rows, length, dim, negatives = 128, 512, 64, Negatives(hard=16, noisy=2, mixed=3)
    inputs = exact_inputs(rows, length, dim, dtype, peaked=masked).guarded()
    ids = {"image_ids": torch.arange(rows), "queue_ids": torch.arange(length) * 7 % 10} if masked else {}
    settings = {"temperature": 0.1, "seed": 3, "step": 7, **ids}
    with emulated(capability, error=todays([0, 1, -1])[0]) as emulator:
        emulator.unfenced_copies = UNFENCED
        found = launch.contrast_and_gradient(*inputs, negatives, **settings)
    assert [launched[0] for launched in emulator.launches] == KERNELS
    exact, plain = (reference_answer(inputs, negatives, one, **settings) for one in (torch.float64, torch.float32))
    # Softmax weights are rounded for the second product.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 0}[dtype] / settings["temperature"]
    units = 64 + rounding / torch.finfo(torch.float32).eps
    compare(within, found, plain, exact, 16, of_gradient=units, of_statistics=1e-5)
    assert not found.fallback.any()


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays([90, 80]))
def test_weights_of_synthetic_negatives_are_as_exact_as_float32(within, capability):
    # Interpolated ones are far closer to q than any key, whose weights alone are rounded.
    counts = {"interpolated": 64, "mixed": 64, "interpolated_range": (0.3, 0.5)}
    inputs = exact_inputs(2, 256, 128, torch.bfloat16)
    negatives, settings = Negatives(hard=64, **counts), {"temperature": 0.02, "seed": 3, "step": 7}
    with emulated(capability) as emulator:
        emulator.unfenced_copies = UNFENCED
        found = launch.contrast_and_gradient(*inputs, negatives, **settings)
    exact, plain = (reference_answer(inputs, negatives, one, **settings) for one in (torch.float64, torch.float32))
    compare(within, found, plain, exact, 16)


@pytest.mark.slow
@pytest.mark.parametrize(("capability", "dtype"), todays(list(itertools.product((90, 80), DTYPES))))
def test_slots_whose_vectors_cancel(within, capability, dtype):
    """Threads that share such a slot read its mark before one of them writes its similarity there."""
    q, k, queue = exact_inputs(2, 24, 48, dtype)
    # The first query cancels with some of its keys, and the second with none. Keys cancel with one another.
    queue[:8], queue[8:16], queue[16:] = -q[0], queue[8].clone(), -queue[8]
    inputs = Inputs(q, k, queue).guarded()
    near = {"interpolated_range": (0.47, 0.53), "mixed_range": (0.5 - 2.0**-10, 0.5 + 2.0**-10)}
    counts = {"interpolated": 11, "extrapolated": 5, "mixed": 22, **near}
    negatives, settings = Negatives(hard=24, **counts), {"temperature": 0.2, "seed": 3, "step": 7}
    with emulated(capability) as emulator:
        emulator.unfenced_copies = UNFENCED
        found = launch.contrast_and_gradient(*inputs, negatives, **settings)
    exact, plain = (reference_answer(inputs, negatives, one, **settings) for one in (torch.float64, torch.float32))
    # Softmax weights of keys are rounded for the second product.
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10, torch.float32: 0}[dtype] / settings["temperature"]
    units = 64 + rounding / torch.finfo(torch.float32).eps
    compare(within, found, plain, exact, 16, of_gradient=units, of_statistics=1e-5)
