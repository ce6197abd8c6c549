"""The arguments of the batch norm, for all backends, and their checks.

Errors name the argument, what was found and what is expected, in one line.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Arguments", "check_arguments"]


class Arguments(NamedTuple):
    """The arguments of `synco_fast.kernels.norm.batch_norm`, by name. Backends get them checked."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    groups: int = 1
    residual: Tensor | None = None
    relu: bool = False
    training: bool = True
    momentum: float | None = 0.1
    eps: float = 1e-5
    num_batches_tracked: Tensor | None = None


def check_arguments(given: Arguments) -> None:
    """Check the arguments of the batch norm. Reads shapes and types only, never values on a device.

    Raises:
        TypeError: A tensor is not floating point, or is not on the device of x.
        ValueError: A shape or a number is out of range.
    """
    x, groups, residual, momentum, tracked = (
        given.x,
        given.groups,
        given.residual,
        given.momentum,
        given.num_batches_tracked,
    )
    if not x.is_floating_point():
        raise TypeError(f"x: found {x.dtype}, expected a floating-point tensor")
    if x.dim() != 4:
        raise ValueError(f"x: found {x.dim()} dimensions, expected 4, (B, C, H, W)")
    batch, channels = x.shape[:2]
    for name, tensor in (
        ("weight", given.weight),
        ("bias", given.bias),
        ("running_mean", given.running_mean),
        ("running_var", given.running_var),
    ):
        if tensor is None:
            continue
        if tensor.shape != (channels,):
            raise ValueError(f"{name}: found shape {tuple(tensor.shape)}, expected ({channels},), the channels of x")
        if not tensor.is_floating_point() or tensor.device != x.device:
            raise TypeError(f"{name}: found {tensor.dtype} on {tensor.device}, expected floating point on {x.device}")
    if (given.running_mean is None) != (given.running_var is None):
        missing = "running_mean" if given.running_mean is None else "running_var"
        raise ValueError(f"{missing}: found None, expected a tensor where its counterpart is given")
    if residual is not None:
        if residual.shape != x.shape:
            raise ValueError(f"residual: found shape {tuple(residual.shape)}, expected {tuple(x.shape)}, that of x")
        if not residual.is_floating_point() or residual.device != x.device:
            raise TypeError(
                f"residual: found {residual.dtype} on {residual.device}, expected floating point on {x.device}"
            )
    if not (isinstance(given.eps, (int, float)) and math.isfinite(given.eps) and given.eps >= 0):
        raise ValueError(f"eps: found {given.eps!r}, expected a finite number, 0 or more")
    if not given.training:
        if given.running_mean is None:
            raise ValueError("running_mean: found None, expected a tensor in evaluation")
        return
    if isinstance(groups, bool) or not isinstance(groups, int) or groups < 1:
        raise ValueError(f"groups: found {groups!r}, expected a whole number of at least 1")
    for name, running in (("running_mean", given.running_mean), ("running_var", given.running_var)):
        if running is not None and not running.is_contiguous() and running.stride(0) == 0:
            raise ValueError(f"{name}: found an expanded tensor, expected memory for each channel, updated in training")
    if not x.numel():
        raise ValueError(f"x: found shape {tuple(x.shape)}, expected at least two values a channel in training")
    if batch % groups:
        raise ValueError(f"x: found a batch of {batch}, expected a multiple of {groups} groups")
    if batch * x.shape[2] * x.shape[3] == groups:
        raise ValueError(
            f"x: found shape {tuple(x.shape)} in {groups} groups, one value a channel in each, "
            "expected more than one in training"
        )
    if momentum is None and given.running_mean is not None and tracked is None:
        raise ValueError("num_batches_tracked: found None, expected a tensor if momentum is None")
    if tracked is not None and (tracked.dtype != torch.int64 or tracked.dim()):
        found = f"{tracked.dtype} of shape {tuple(tracked.shape)}"
        raise ValueError(f"num_batches_tracked: found {found}, expected a 0-dimensional int64 tensor")
