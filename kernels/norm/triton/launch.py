"""Launcher of the batch norm kernels: allocates the buffers and launches in order.

Every decision depends on shapes and dtypes, so the host never waits and a CUDA graph can capture everything. Data is
channels-last: (B, C, H, W) is a matrix of B H W rows of C numbers, and a group is a range of rows.

Launches, for any number of groups, and the tensors of x's size that they read and write once:

| function | launches | reads | writes |
|---|---|---|---|
| `statistics` | `partial_statistics`, `finish_statistics` | x | |
| `apply` | `normalise` | x, r | y |
| `backward` | `partial_sums`, `finish_sums`, `of_input` | dy twice, x twice | dx |
| `backward` of ReLU with residual | the same | dy, y, dr, x twice | dr, dx |

Other buffers are small: a few numbers for each channel, and partial sums of 12 C bytes for each split and group.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from synco_fast.kernels.norm.triton.apply import normalise
from synco_fast.kernels.norm.triton.backward import finish_sums, of_input, partial_sums
from synco_fast.kernels.norm.triton.config import (
    SHARED_CHANNELS,
    SHARES,
    TILES,
    Shape,
    interpreted,
    shape_of,
    unserved,
)
from synco_fast.kernels.norm.triton.statistics import finish_statistics, partial_statistics

__all__ = ["apply", "backward", "statistics", "unserved"]

P = ParamSpec("P")
Result = TypeVar("Result")


def empty(*shape: int, dtype: torch.dtype = torch.float32, device: torch.device) -> Tensor:
    """Memory for a kernel to fill. Tests replace this to fill it with poison values."""
    return torch.empty(shape, dtype=dtype, device=device)


def empty_like(x: Tensor) -> Tensor:
    """Memory of x's size, channels-last, for a kernel to fill. Tests replace this, too."""
    return torch.empty_like(x, memory_format=torch.channels_last)


def _on_its_device(launch: Callable[Concatenate[Tensor, P], Result]) -> Callable[Concatenate[Tensor, P], Result]:
    """Triton launches on the current device and stream, which may differ from those of the first argument."""

    @wraps(launch)
    def launched(first: Tensor, /, *arguments: P.args, **options: P.kwargs) -> Result:
        with torch.cuda.device_of(first):
            return launch(first, *arguments, **options)

    return launched


def _adding(shape: Shape) -> dict[str, int]:
    """Arguments for adding partial sums: usually all of a channel in one or two iterations."""
    return {"GROUPS": shape.at_once, "SPLITS": SHARES // shape.at_once, "CHANNELS": SHARED_CHANNELS}


def _tile(shape: Shape) -> dict[str, int]:
    return {"BLOCK_ROWS": shape.block_rows, "BLOCK_CHANNELS": shape.block_channels, "num_warps": 8}


@_on_its_device
def statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    *,
    groups: int,
    momentum: float | None,
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each group, (G, C) float32. Updates the running statistics in place.

    Args:
        x: (B, C, H, W), channels-last; `unserved` must return None for it.
        running_mean, running_var, num_batches_tracked, groups, momentum: As in
            `synco_fast.kernels.norm.batch_norm`.
    """
    shape, device = shape_of(x, groups), x.device
    shares = [empty(groups, shape.splits, shape.channels, device=device) for _ in range(3)]
    partial_statistics[(shape.columns, shape.splits, groups)](
        x,
        *shares,
        num_batches_tracked,
        shape.channels,
        shape.values,
        shape.tiles,
        shape.splits,
        **_tile(shape),
    )
    mean, variance = (empty(groups, shape.channels, device=device) for _ in range(2))
    finish_statistics[(-(-shape.channels // SHARED_CHANNELS),)](
        *shares,
        mean,
        variance,
        running_mean,
        running_var,
        num_batches_tracked,
        shape.channels,
        groups,
        shape.values,
        shape.rows,
        shape.splits,
        0.0 if momentum is None else float(momentum),
        CUMULATIVE=momentum is None,
        **_adding(shape),
        num_warps=8,
    )
    return mean, variance


@_on_its_device
def apply(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    *,
    relu: bool,
    eps: float,
) -> Tensor:
    """y, (B, C, H, W), channels-last, in the dtype of x.

    Args:
        x: (B, C, H, W), channels-last.
        mean, variance: (G, C); in evaluation the running ones, (1, C).
        weight, bias: (C,), or None.
        residual: Like x, or None.
        relu, eps: As in `synco_fast.kernels.norm.batch_norm`.
    """
    shape = shape_of(x, len(mean))
    y = empty_like(x)
    normalise[(shape.columns * shape.chunks, 1, shape.groups)](
        x,
        mean,
        variance,
        weight,
        bias,
        residual,
        y,
        shape.channels,
        shape.values,
        shape.columns,
        float(eps),
        RELU=relu,
        EMULATE=interpreted(),
        TILES=TILES,
        **_tile(shape),
    )
    return y


@_on_its_device
def backward(
    gradient: Tensor,
    x: Tensor,
    y: Tensor | None,
    mean: Tensor,
    variance: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    relu: bool,
    training: bool,
    eps: float,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """dx, dr if ``y`` is given, both channels-last in the dtype of x, and dw and db, (C,) float32.

    Args:
        gradient: Gradient of y, like x.
        y: The output, with ReLU and residual, to read the ReLU mask from it; otherwise None.
        x, mean, variance, weight, bias, relu, eps: As in `apply`.
        training: Whether mean and variance are computed from x, so that the gradient passes through them.
    """
    shape, device = shape_of(x, len(mean)), x.device
    masked = None if y is None else empty_like(x)
    shares = [empty(shape.groups, shape.splits, shape.channels, device=device) for _ in range(2)]
    options = {"RECOMPUTE": relu and y is None, "EMULATE": interpreted(), **_tile(shape)}
    partial_sums[(shape.columns, shape.splits, shape.groups)](
        gradient,
        x,
        y,
        mean,
        variance,
        weight,
        bias,
        masked,
        *shares,
        shape.channels,
        shape.values,
        shape.tiles,
        shape.splits,
        float(eps),
        **options,
    )
    of_weight, of_bias = (empty(shape.channels, device=device) for _ in range(2))
    constant, slope = (
        (empty(shape.groups, shape.channels, device=device) for _ in range(2)) if training else (None, None)
    )
    finish_sums[(-(-shape.channels // SHARED_CHANNELS),)](
        *shares,
        mean,
        variance,
        weight,
        constant,
        slope,
        of_weight,
        of_bias,
        shape.channels,
        shape.groups,
        shape.values,
        shape.splits,
        float(eps),
        TRAINING=training,
        **_adding(shape),
        num_warps=8,
    )
    of_x = empty_like(x)
    of_input[(shape.columns * shape.chunks, 1, shape.groups)](
        gradient if masked is None else masked,
        x,
        mean,
        variance,
        weight,
        bias,
        constant,
        slope,
        of_x,
        shape.channels,
        shape.values,
        shape.columns,
        float(eps),
        TRAINING=training,
        TILES=TILES,
        **options,
    )
    return of_x, masked, of_weight, of_bias
