"""The kernels compiled as the launcher would launch them, without a device: one of three generations each day.

``SYNCO_FAST_ALL=1`` takes all of them. Other widths, and every kernel in every dtype, take minutes:
`python tests/kernels/triton/compile_all.py 90 --wide`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.support.kernels import lines_of_compiler
from tests.support.rotation import in_turn, todays

pytest.importorskip("triton")

KERNELS = {"sample", "rank", "scan", "select", "fill", "choose", "mix", "reduce", "_update"}


compiled = partial(lines_of_compiler, Path(__file__).parent / "compile_all.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays(["80", "90", "100"]))
def test_no_kernel_spills_or_waits_after_every_product(capability):
    lines = compiled(capability, "--dtypes", "bfloat16")
    assert {line.split()[0] for line in lines} == KERNELS
    assert all("stack 0 local 0 " in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays(["90", "100", "80"]))
def test_the_scan_at_every_width_and_in_every_dtype(capability):
    lines = compiled(capability, "--dims", "64", "128", "256", "512", "--only", "scan")
    assert len(lines) == 12
    assert not any("serialised" in line for line in lines)


@pytest.mark.slow
@in_turn(2, 3)
def test_the_scan_with_a_short_last_split():
    # 54 splits, as many as an A100 gets.
    for mask in ([], ["--plain"]):
        lines = compiled("80", *mask, "--splits", "54", "--only", "scan")
        assert len(lines) == 3
        assert all("stack 0 local 0 " in line for line in lines)


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays(["100", "80", "90"]))
def test_the_small_launches_at_every_width_and_in_every_dtype(capability):
    lines = compiled(capability, "--dims", "64", "128", "256", "512", "--plain", "--only", "sample,reduce")
    assert len(lines) == 24
    assert all("stack 0 local 0 " in line for line in lines)


@pytest.mark.slow
@in_turn(1, 3)
def test_the_three_products_of_float32_without_a_mask():
    lines = compiled("90", "--plain", "--dtypes", "float32", "--only", "rank,scan,select")
    assert {line.split()[0] for line in lines} == {"rank", "scan", "select"}
    assert all("stack 0 local 0 " in line for line in lines)
    assert not any("serialised" in line for line in lines)


@pytest.mark.slow
@in_turn(2, 3)
def test_the_selection_of_float32_where_candidates_fill_half_the_registers():
    # 16,384 places, as for every N from 1,500 to 6,000 or so at K = 65,536.
    for setting in ("none", "tf32"):
        (line,) = compiled("90", "--dtypes", "float32", "--float32", setting, "--hard", "4096", "--only", "select")
        assert "stack 0 local 0 " in line


@pytest.mark.slow
def test_the_switch_for_overlapping_launches_reaches_the_kernels():
    chain = {"sample", "rank", "scan", "select", "fill", "choose", "mix", "reduce"}
    for options, expected in (([], chain), (["--overlap", "0"], set())):
        lines = compiled("90", "--dtypes", "bfloat16", "--plain", *options, "--only", ",".join(chain))
        assert {line.split()[0] for line in lines if line.endswith(" overlapped")} == expected
    assert not [line for line in compiled("80", "--only", "rank") if "overlapped" in line]
