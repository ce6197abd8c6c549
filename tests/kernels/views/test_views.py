"""The views' kernels: in the interpreter, compiled without a device, and what they refuse."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("pydantic")  # the other GPU tests of the kernels run without, as bench/gpu.sh does

from synco_fast.data.augment.draw import JITTER, ViewParameters
from synco_fast.kernels.views import PARAMETERS, WORDS, as_parameters, as_words, make_views
from tests.support.kernels import check_interpreted, lines_of_compiler
from tests.support.rotation import in_turn, todays

HERE = Path(__file__).parent


@pytest.mark.slow
@in_turn(2, 3)
def test_under_the_interpreter():
    check_interpreted(HERE / "interpreted" / "check_views.py")


@pytest.mark.slow
@pytest.mark.parametrize("capability", todays([80, 90, 100]))
def test_compiles_without_spills(capability):
    lines = lines_of_compiler(HERE / "compile_all.py", str(capability))
    assert {line.split()[0] for line in lines} == {"crop", "colour", "blur_rows", "blur_columns"}
    assert all("stack 0 local 0" in line for line in lines), lines


def test_parameters_are_those_that_are_drawn():
    assert list(PARAMETERS) == [field.name for field in fields(ViewParameters)]
    assert JITTER == ("brightness", "contrast", "saturation", "hue"), "the kernels know the parts by number"


def arguments(views=2):
    kinds = {"integer": torch.int64, "floating": torch.float32, "bool": torch.bool}
    return {
        "pixels": torch.zeros(300, dtype=torch.uint8),
        "offsets": torch.tensor([0]),
        "sizes": torch.tensor([[10, 10]]),
        "images": torch.zeros(views, dtype=torch.int64),
        "parameters": {
            name: torch.ones(views, *shape, dtype=kinds[kind]) for name, (shape, kind) in PARAMETERS.items()
        },
        "size": 8,
    }


def test_words_hold_the_parameters():
    given = arguments(3)["parameters"] | {
        "crop": torch.arange(12).view(3, 4),
        "factors": torch.tensor([[0.5, 1.25, -3.0, 1e-30]]).expand(3, 4),
        "sigma": torch.tensor([0.0, 0.1, 2.0]),
        "flip": torch.tensor([True, False, True]),
    }
    words = as_words(given)
    assert (words.shape, words.dtype) == ((3, WORDS), torch.int32)
    found = as_parameters(words)
    assert list(found) == list(PARAMETERS)
    for name, values in found.items():
        assert torch.equal(values, given[name].to(values.dtype)), name


def with_parameter(name, value):
    return {"parameters": arguments()["parameters"] | {name: value}}


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"pixels": torch.zeros(300)}, TypeError, "pixels: found torch.float32 of shape"),
        ({"pixels": torch.zeros(3, 100, dtype=torch.uint8)}, TypeError, "pixels: found torch.uint8 of shape"),
        ({"offsets": torch.tensor([0, 1])}, ValueError, "offsets: found shape"),
        ({"sizes": torch.tensor([[10.0, 10.0]])}, TypeError, "sizes: found torch.float32, expected integer"),
        ({"images": torch.zeros(3, dtype=torch.int64)}, ValueError, "images: found 3 for 2 views, expected a divisor"),
        ({"images": torch.zeros(0, dtype=torch.int64)}, ValueError, "images: found 0 for 2 views, expected a divisor"),
        ({"parameters": torch.zeros(2, 15, dtype=torch.int32)}, ValueError, r"parameters: found shape \(2, 15\)"),
        ({"parameters": torch.zeros(2, 16, dtype=torch.int64)}, TypeError, "parameters: found torch.int64, expected"),
        ({"parameters": {}}, ValueError, "parameters: found crop missing or unknown"),
        (with_parameter("sigma", torch.ones(2, dtype=torch.int64)), TypeError, "sigma: found torch.int64"),
        (with_parameter("flip", torch.ones(2)), TypeError, "flip: found torch.float32, expected bool"),
        (with_parameter("order", torch.ones(2, 3, dtype=torch.int64)), ValueError, r"order: found shape \(2, 3\)"),
        (
            with_parameter("crop", torch.ones(2, 4, dtype=torch.int64, device="meta")),
            ValueError,
            "crop: found .* on meta",
        ),
        ({"size": 1}, ValueError, "size: found 1"),
        ({"channels": 2}, ValueError, "channels: found 2, expected 1 or 3"),
        ({"dtype": torch.float64}, TypeError, "dtype: found torch.float64"),
    ],
)
def test_wrong_arguments(changes, error, says):
    with pytest.raises(error, match=says):
        make_views(**(arguments() | changes))


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="served by the interpreter")
def test_a_cpu_is_refused():
    with pytest.raises(RuntimeError, match="pixels are on cpu; the kernels run on CUDA devices"):
        make_views(**arguments())
