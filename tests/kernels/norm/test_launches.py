"""Launches and bytes, counted: what the launcher's docstring states, whatever the number of groups."""

from __future__ import annotations

import pytest
import torch

triton = pytest.importorskip("triton")

from synco_fast.kernels.norm.triton import launch  # noqa: E402
from synco_fast.kernels.norm.triton.config import shape_of  # noqa: E402

#: What a pass over x is, in kernels by name: tensors of x's size that each touches once.
PASSES = {
    "statistics": [("partial_statistics", 1), ("finish_statistics", 0)],
    "apply": [("normalise", 2)],
    "apply with residual": [("normalise", 3)],
    "backward": [("partial_sums", 2), ("finish_sums", 0), ("of_input", 3)],
    "backward of ReLU with residual": [("partial_sums", 4), ("finish_sums", 0), ("of_input", 3)],
}


@pytest.fixture
def launched(monkeypatch):
    """Launches recorded instead of made: the kernel, and the bytes of each tensor that it gets."""
    found = []

    def record(kernel, *arguments, grid, warmup, **options):
        assert all(size > 0 for size in grid)
        assert all(size < 65536 for size in grid[1:]), "CUDA's limit"
        found.append((kernel.__name__, [value.nbytes for value in arguments if isinstance(value, torch.Tensor)]))

    monkeypatch.setattr(triton.runtime.jit.JITFunction, "run", record)
    return found


def run(kind, x, groups):
    """Call the launcher as a step of this kind does."""
    channels = x.shape[1]
    vector, matrix = torch.empty(channels), torch.empty(groups, channels)
    if kind == "statistics":
        launch.statistics(x, vector, vector, torch.zeros((), dtype=torch.int64), groups=groups, momentum=0.1)
    elif kind.startswith("apply"):
        residual = x if "residual" in kind else None
        launch.apply(x, matrix, matrix, vector, vector, residual, relu=True, eps=1e-5)
    else:
        output = x if "residual" in kind else None
        launch.backward(x, x, output, matrix, matrix, vector, vector, relu=True, training=True, eps=1e-5)


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", PASSES)
@pytest.mark.parametrize(("channels", "side"), [(64, 56), (256, 56), (2048, 7)])
def test_as_stated(launched, kind, groups, channels, side):
    x = torch.empty(64, channels, side, side, dtype=torch.bfloat16, memory_format=torch.channels_last)
    run(kind, x, groups)
    assert [(name, sizes.count(x.nbytes)) for name, sizes in launched] == PASSES[kind]
    small = sum(size for _, sizes in launched for size in sizes if size != x.nbytes)
    assert small < 0.12 * x.nbytes


@pytest.mark.parametrize("groups", [1, 8, 256])
def test_shares_are_small_and_programs_many(groups):
    """At full size: the room for shares is below 1 MB, and no reduction has too few programs for a GPU."""
    for channels, side in ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7)):
        x = torch.empty(256, channels, side, side, device="meta", dtype=torch.bfloat16)
        shape = shape_of(x, groups)
        assert shape.splits * shape.rows >= shape.values > (shape.splits - 1) * shape.rows
        assert shape.chunks * 4 * shape.block_rows >= shape.values
        programs = shape.columns * shape.splits * groups
        assert programs >= 256
        assert programs <= max(512, shape.columns * groups)


def test_the_docstring_states_the_passes():
    for line in ("| `statistics` |", "| `apply` |", "| `backward` |", "| `backward` of ReLU with residual |"):
        assert line in launch.__doc__
    assert "dy, y, dr, x twice | dr, dx" in launch.__doc__


@pytest.mark.parametrize("groups", [1, 8])
def test_sizes_need_no_value(launched, groups):
    """On the meta device there are no values: nothing of the launcher reads one."""
    x = torch.empty(64, 64, 8, 8, device="meta").to(memory_format=torch.channels_last)
    vector = torch.empty(64, device="meta")
    mean, variance = launch.statistics(x, vector, vector, None, groups=groups, momentum=0.1)
    y = launch.apply(x, mean, variance, vector, vector, x, relu=True, eps=1e-5)
    launch.backward(x, x, y, mean, variance, vector, vector, relu=True, training=True, eps=1e-5)
    assert len(launched) == 6
